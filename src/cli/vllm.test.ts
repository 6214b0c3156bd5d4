import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { byteArtifact } from "../model/index.ts";
import { resolveOptions } from "./resolve-options.ts";
import { splitWords } from "./split-words.ts";
import { tokenEngineConfig } from "./vllm-config.ts";
import { splitEngineArgs } from "./engine-worker.ts";

const ROOT = mkdtempSync(join(tmpdir(), "vllm-cli-"));
after(() => rmSync(ROOT, { recursive: true }));

function modelFolder(name: string, config: object = {}): string {
  const folder = join(ROOT, name);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, "tokenizer.json"), JSON.stringify(byteArtifact().tokenizerJson));
  writeFileSync(join(folder, "config.json"), JSON.stringify(config));
  return folder;
}

async function configOf(argv: readonly string[], env: NodeJS.ProcessEnv = {}) {
  return tokenEngineConfig(
    await resolveOptions({ command: "worker", argv: ["--engine=vllm", ...argv], env }),
    env,
    "vllm",
  );
}

describe("dynamo vllm: whose flag is it", () => {
  test("ours and Dynamo's are ours, all others vLLM's, with the words behind them", () => {
    const split = (line: string) => splitEngineArgs("vllm", splitWords(line, "test"));
    assert.deepEqual(
      split("--model /m --tensor-parallel-size 2 --enforce-eager --namespace n -tp 4 --is-prefill-worker"),
      {
        ours: ["--model", "/m", "--namespace", "n", "--is-prefill-worker"],
        theirs: ["--tensor-parallel-size", "2", "--enforce-eager", "-tp", "4"],
      },
    );
    assert.deepEqual(split("--max-model-len=4k --served-model-name q --trust-remote-code -- --model other"), {
      ours: ["--served-model-name", "q"],
      theirs: ["--max-model-len=4k", "--trust-remote-code", "--model", "other"],
    });
    assert.deepEqual(split("--limit-mm-per-prompt '{\"image\": 2}' --connector nixl").theirs, ["--limit-mm-per-prompt", '{"image": 2}']); // prettier-ignore
  });

  test("SGLang's and TensorRT-LLM's names for what we have are taken for ours", () => {
    const split = (engine: "sglang" | "trtllm", line: string) => splitEngineArgs(engine, splitWords(line, "test"));
    assert.deepEqual(
      split("sglang", "--model-path /m --page-size=64 --tp 2 --mem-fraction-static 0.8 --served-model-name q"),
      {
        ours: ["--model", "/m", "--kv-cache-block-size=64", "--served-model-name", "q"],
        theirs: ["--tp", "2", "--mem-fraction-static", "0.8"],
      },
    );
    assert.deepEqual(
      split(
        "trtllm",
        "--model-path /m --max_seq_len 4096 --max-batch-size=8 --tp_size 2 --extra_llm_api_options f.yaml",
      ),
      {
        ours: ["--model", "/m", "--context-length", "4096", "--max-num-seqs=8"],
        theirs: ["--tp_size", "2", "--extra_llm_api_options", "f.yaml"],
      },
    );
  });

  test("words as a shell splits them", () => {
    assert.deepEqual(splitWords(`a  'b c' "d\\"e" f\\ g '' `, "x"), ["a", "b c", 'd"e', "f g", ""]);
    assert.throws(() => splitWords("a 'b", "--engine-args"), /--engine-args: a quote \('\) is not closed/);
  });
});

describe("options of a vLLM worker", () => {
  test("started: command, arguments in order, sizes only when given, samples by the model's tokenizer", async () => {
    const folder = modelFolder("m", { vocab_size: 300 });
    const config = await configOf(
      [`--model=${folder}`, "--model-name=q", "--engine-command=nice /opt/vllm", "--max-num-seqs=512", "--", "--enforce-eager"], // prettier-ignore
      { DYN_ENGINE_ARGS: "--dtype 'bfloat16'" },
    );
    assert.deepEqual(config.launch?.command, ["nice", "/opt/vllm"]);
    assert.deepEqual(config.launch?.args, ["--dtype", "bfloat16", "--enforce-eager"]);
    assert.deepEqual([config.modelPath, config.engineModel, config.url], [folder, "q", undefined]);
    assert.deepEqual([config.maxSequences, config.maxBatchedTokens, config.blockSizeTokens], [512, 0, 0]);
    assert.equal(config.vocabularySize, 300);
    assert.ok(config.tokenizerSamples!.length >= 10);
    for (const { text, tokenIds } of config.tokenizerSamples!) assert.deepEqual(tokenIds, [...Buffer.from(text)]);
  });

  test("attached: the engine's own name for the model is not ours", async () => {
    const folder = modelFolder("n");
    const config = await configOf([`--model=${folder}`, "--model-name=q", "--engine-url=http://h:1"], { DYN_ENGINE_API_KEY: "k" }); // prettier-ignore
    assert.deepEqual([config.url, config.engineModel, config.launch, config.apiKey], ["http://h:1", undefined, undefined, "k"]); // prettier-ignore
  });

  test("a model of the hub's cache by its name; what is none says what is wanted", async () => {
    const snapshot = modelFolder("hub/models--o--name/snapshots/abc");
    mkdirSync(join(ROOT, "hub/models--o--name/refs"));
    writeFileSync(join(ROOT, "hub/models--o--name/refs/main"), "abc\n");
    assert.equal((await configOf(["--model=o/name"], { HF_HUB_CACHE: join(ROOT, "hub") })).modelPath, snapshot);
    await assert.rejects(configOf(["--model=o/other"], { HF_HUB_CACHE: join(ROOT, "hub") }), /hf download o\/other/);
    const file = join(ROOT, "model.gguf");
    writeFileSync(file, "GGUF");
    await assert.rejects(configOf([`--model=${file}`]), /GGUF files are for --engine llama/);
    await assert.rejects(configOf([]), /--model: expected the folder of the model/);
  });

  test("arguments behind -- are for engines that have a command line", async () => {
    const { foreignEngine } = await import("./worker.ts");
    const resolved = await resolveOptions({ command: "worker", argv: ["--", "--x"], env: {} });
    await assert.rejects(foreignEngine(resolved, {}), /the llama engine has no command line of its own, got --x/);
  });
});

describe("dynamo doctor --engine vllm", () => {
  async function doctor(...argv: string[]) {
    const { run } = await import("./doctor.ts");
    let text = "";
    const code = await run({ argv, env: {}, out: (part) => void (text += part), err: () => undefined });
    return { code, text };
  }

  test("takes the flags of a worker and of the engine, for people and for machines", async () => {
    const flags = ["--engine=vllm", "--http-port=0", `--model=${modelFolder("d")}`, "--engine-command=/no/such/vllm", "--max-num-seqs=4", "--namespace=n"]; // prettier-ignore
    const { code, text } = await doctor(...flags, "--json", "--", "--no-enable-prefix-caching");
    assert.equal(code, 1);
    const findings = JSON.parse(text) as { check: string; result: string; detail: string; fix?: string }[];
    const failed = findings.filter(({ result }) => result === "fail");
    assert.deepEqual(failed.map(({ check }) => check), ["command", "known bad"]); // prettier-ignore
    assert.match(failed[1]!.detail, /^prefix-cache-off-with-kv-events: /);
    const accepted = await doctor(...flags, "--accept-known-bad=prefix-cache-off-with-kv-events", "--", "--no-enable-prefix-caching"); // prettier-ignore
    assert.match(accepted.text, /^warn {2}known bad {2}prefix-cache-off-with-kv-events: .*\n {17}fix: take/m);
  });

  test("a model that is not there, an unknown id, arguments for an engine without a command line", async () => {
    const missing = await doctor("--engine=vllm", "--http-port=0", "--model=/no/such/model");
    assert.equal(missing.code, 1);
    assert.match(missing.text, /^fail {2}model /m);
    const unknown = await doctor("--engine=vllm", "--http-port=0", `--model=${modelFolder("e")}`, "--accept-known-bad=all"); // prettier-ignore
    assert.match(unknown.text, /--accept-known-bad: expected ids from docs\/engines\/known-bad\.md, got all/);
    await assert.rejects(doctor("--engine=echo", "--", "--x"), /the echo engine has no command line of its own/);
  });
});
