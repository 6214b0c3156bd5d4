import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import type { VllmEngineConfig } from "../config.ts";
import { aRequest } from "../engine.recorder.ts";
import { readVllmArgs, vllmLaunchPlan } from "./vllm-launch.ts";
import type { VllmFacts } from "./vllm-probe.ts";
import { VllmTransfer, readKvTransfer } from "./vllm-transfer.ts";

const PORTS = { http: 1, events: 2, replay: 3, sideChannel: 4 };
const CONFIG: VllmEngineConfig = {
  kind: "vllm",
  modelPath: "/model",
  vocabularySize: 100,
  startTimeoutMs: 1,
  kvEvents: false,
  maxSequences: 0,
  maxBatchedTokens: 0,
  contextLength: 0,
  blockSizeTokens: 0,
  launch: { command: ["vllm"], args: [], env: {}, port: 0 },
};
const planOf = (config: Partial<VllmEngineConfig>, args: readonly string[] = [], env: NodeJS.ProcessEnv = {}) => {
  const all = { ...CONFIG, ...config, launch: { ...CONFIG.launch!, args } };
  return vllmLaunchPlan(all, readVllmArgs(args), PORTS, env, "topic");
};

test("vLLM's connector: by name, as JSON without a role, as JSON that the user gives the engine", () => {
  const named = readKvTransfer({ role: "prefill", given: "NixlPushConnector", isCpu: false });
  assert.deepEqual([named.kind, named.roles, named.leaseMs], ["nixl-push", ["prefill"], 28_000]);
  assert.deepEqual(JSON.parse(named.json), {
    kv_connector: "NixlPushConnector",
    kv_role: "kv_producer",
    kv_load_failure_policy: "fail",
  });
  const json = '{"kv_connector":"NixlConnector","kv_connector_extra_config":{"kv_lease_duration":2}}';
  const given = readKvTransfer({ role: "decode", given: json, isCpu: false });
  assert.deepEqual([given.kind, given.leaseMs], ["nixl-pull", 1_000]);
  assert.equal((JSON.parse(given.json) as { kv_role: string }).kv_role, "kv_consumer");
  const both = '{"kv_connector":"NixlPullConnector","kv_role":"kv_both"}';
  assert.deepEqual(readKvTransfer({ role: "decode", given: both, isCpu: false }).roles, ["prefill", "decode"]);
});

test("vLLM's connector: what cannot work is refused with the reason", () => {
  const refuses = (given: string, pattern: RegExp): void => {
    assert.throws(() => readKvTransfer({ role: "decode", given, isCpu: false }), pattern);
  };
  refuses("P2pNcclConnector", /expected one of NixlConnector, .* as kv_connector, got P2pNcclConnector/);
  refuses("{nonsense", /expected a JSON object or the name of a connector/);
  refuses('{"kv_connector":"NixlConnector","kv_role":"kv_producer"}', /not for --disaggregation-mode decode; it takes kv_consumer/);
  refuses('{"kv_connector":"ExampleConnector"}', /needs a folder that both servers see/);
  refuses('{"kv_connector":"NixlConnector","kv_connector_extra_config":{"kv_lease_duration":0}}', /number of seconds as kv_lease_duration/);
}); // prettier-ignore

test("vLLM's command line: side channel of the worker's own, NIXL's thread quiet, the user's words kept", () => {
  const own = planOf({ role: "prefill" }, [], { PYTHONPATH: "/theirs" });
  const { args, env } = own.command;
  assert.match(args[args.indexOf("--kv-transfer-config") + 1]!, /"kv_role":"kv_producer"/);
  assert.equal(env!.VLLM_NIXL_SIDE_CHANNEL_PORT, "4");
  assert.equal(env!.VLLM_NIXL_SIDE_CHANNEL_HOST, "127.0.0.1");
  assert.equal(env!.DYN_NIXL_POLL_PAUSE_US, "500");
  assert.match(env!.PYTHONPATH!, /python:\/theirs$/);
  const loud = planOf({ role: "decode", nixlPauseUs: 0 }, [], { VLLM_NIXL_SIDE_CHANNEL_HOST: "10.0.0.1" }).command.env!;
  assert.deepEqual([loud.PYTHONPATH, loud.VLLM_NIXL_SIDE_CHANNEL_HOST], [undefined, "10.0.0.1"]);
  const theirs = '{"kv_connector":"NixlPushConnector","kv_role":"kv_both"}';
  const given = planOf({ role: "decode" }, ["--kv-transfer-config", theirs]);
  assert.equal(given.kvTransfer!.kind, "nixl-push");
  assert.equal(given.command.args.filter((word) => word === "--kv-transfer-config").length, 1);
  assert.match(planOf({ role: "decode" }, [], { VLLM_CPU_OMP_THREADS_BIND: "0" }).kvTransfer!.json, /"kv_buffer_device":"cpu"/);
  const whole = planOf({ kvTransferConfig: '{"kv_connector":"OffloadingConnector"}' });
  assert.equal(whole.kvTransfer, undefined);
  assert.ok(whole.command.args.includes('{"kv_connector":"OffloadingConnector"}'), "of an aggregated server it is the engine's own");
}); // prettier-ignore

test("vLLM's first token: the prefill server's only where nothing hangs on what was generated, and blocks match", () => {
  const facts = { blockSizeTokens: 16, contextLength: 64, dataParallelSize: 1, route: "generate" } as VllmFacts;
  const folder = mkdtempSync(join(tmpdir(), "vllm-transfer-"));
  try {
    const transfer = new VllmTransfer(readKvTransfer({ role: "prefill", given: undefined, isCpu: false }), folder);
    const greedy = aRequest(Uint32Array.from({ length: 32 }, (_, i) => i + 1));
    const tokensOf = (length: number): number => {
      const request = { ...greedy, tokenIds: greedy.tokenIds.subarray(0, length) };
      const body = JSON.parse(transfer.prefillCall(request, facts, "r").body) as { sampling_params: { max_tokens: number } };
      return body.sampling_params.max_tokens;
    };
    assert.deepEqual([tokensOf(31), tokensOf(32), tokensOf(1)], [1, 2, 1]);
    const { sampling } = greedy;
    assert.equal(transfer.takesFirstToken(greedy, facts), true);
    assert.equal(transfer.takesFirstToken({ ...greedy, sampling: { ...sampling, temperature: 0.7 } }, facts), false);
    assert.equal(transfer.takesFirstToken({ ...greedy, sampling: { ...sampling, frequencyPenalty: 1 } }, facts), false);
    assert.equal(transfer.takesFirstToken({ ...greedy, answerForm: { kind: "json" } }, facts), false);
    assert.equal(transfer.takesFirstToken(greedy, { ...facts, contextLength: 33 }), false);
    writeFileSync(join(folder, "config.json"), '{"layer_types":["mamba2","full_attention"]}');
    const hybrid = new VllmTransfer(readKvTransfer({ role: "prefill", given: undefined, isCpu: false }), folder);
    assert.equal(hybrid.takesFirstToken(greedy, facts), false);
  } finally {
    rmSync(folder, { recursive: true });
  }
}); // prettier-ignore
