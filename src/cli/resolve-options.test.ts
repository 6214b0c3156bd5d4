import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { DynamoError } from "../errors/index.ts";
import { DEFAULT_LIMITS } from "../frontend/index.ts";
import { ModelStore } from "../model/index.ts";
import type { CommandName } from "./options.ts";
import { describeOptions, forwardedFlags, resolveOptions, type ResolvedOptions } from "./resolve-options.ts";
import { frontendConfig, workerConfig } from "./role-config.ts";

let folder = "";
before(() => (folder = mkdtempSync(join(tmpdir(), "options-test-"))));
after(() => rmSync(folder, { recursive: true, force: true }));

interface Case {
  command?: CommandName;
  env?: Record<string, string>;
  yaml?: string;
}

function resolve(argv: string[], { command = "local", env = {}, yaml }: Case = {}): Promise<ResolvedOptions> {
  const path = join(folder, "dynamo.yaml");
  if (yaml !== undefined) writeFileSync(path, yaml);
  return resolveOptions({ command, argv: yaml === undefined ? argv : [...argv, `--config=${path}`], env });
}

async function mistakes(argv: string[], options: Case = {}): Promise<string[]> {
  try {
    await resolve(argv, options);
  } catch (error) {
    assert.ok(error instanceof DynamoError, String(error));
    assert.equal(error.reason, "invalid-config");
    return error.message.replaceAll(folder, "").split("\n");
  }
  throw new assert.AssertionError({ message: "no mistake was found" });
}

test("options: a flag wins over a variable, a variable over the file, the file over the default", async () => {
  const yaml = "http-port: 3\nworkers: 3\nrouter-mode: random\n";
  const env = { DYN_HTTP_PORT: "2", DYN_WORKERS: "5", DYN_NAMESPACE: "" };
  const { values, sources } = await resolve(["--http-port=1"], { env, yaml });
  assert.equal(values["http-port"], 1);
  assert.equal(values.workers, 5);
  assert.equal(values["router-mode"], "random");
  assert.equal(values.namespace, "dynamo", "an empty variable is not set");
  assert.deepEqual(
    [sources["http-port"], sources.workers, sources["router-mode"], sources.namespace],
    ["flag", "environment", "file", "default"],
  );
});

test("options: every mistake is reported, each naming the field, what was expected and what came", async () => {
  const found = await mistakes(
    ["--http-port", "eighty", "--htp-host=x", "--engine=lama", "--workers=0", "--once", "stray", "--threads"],
    {
      env: { DYN_MAX_CHOICES: "1.5" },
      yaml: "wrokers: 2\nnamespace: [a, b]\n",
    },
  );
  assert.deepEqual(found.toSorted(), [
    "--engine: expected llama, vllm, sglang, trtllm, llama-server, openai or echo, got lama",
    "--htp-host: no such option; did you mean --http-host?",
    "--http-port: expected a whole number from 0 to 65535, got eighty",
    "--once: not an option of dynamo local; it belongs to dynamo status",
    "--threads: expected a whole number from 0 to 1024, got nothing",
    "--workers: expected a whole number from 1 to 64, got 0",
    "DYN_MAX_CHOICES: expected a whole number from 1 to 1024, got 1.5",
    "namespace in /dynamo.yaml: expected a text, got a list or a map",
    "stray: unexpected word",
    "wrokers in /dynamo.yaml: no such option; did you mean workers?",
  ]);
});

test("options: a flag without its value does not swallow the next flag", async () => {
  assert.deepEqual(await mistakes(["--http-host", "--http-port", "x"]), [
    "--http-host: expected a text, got nothing",
    "--http-port: expected a whole number from 0 to 65535, got x",
  ]);
});

test("options: given twice, short forms, and a value for a switch are mistakes", async () => {
  assert.deepEqual(await mistakes(["--workers=1", "--workers=2"]), ["--workers: given twice"]);
  assert.deepEqual(await mistakes(["-p", "80"]), ["-p: no such option"]);
  assert.deepEqual(await mistakes(["--router-kv-events=false"]), ["--router-kv-events: takes no value, got false"]);
  assert.deepEqual(await mistakes(["--totally-unheard-of", "value"]), ["--totally-unheard-of: no such option"]);
});

test("options: a file that is missing or no YAML, or holds no options, is one mistake", async () => {
  const [missing] = await mistakes([`--config=${join(folder, "none.yaml")}`]);
  assert.match(missing!, /^--config: .*none\.yaml: ENOENT/);
  assert.match((await mistakes([], { yaml: "a: [1" }))[0]!, /^--config/);
  assert.match((await mistakes([], { yaml: "- a\n- b" }))[0]!, /expected options as "name: value" lines/);
  assert.equal((await resolve([], { yaml: "" })).values.workers, 2);
  assert.match((await mistakes([], { yaml: "__proto__: 1\nconstructor: x" }))[0]!, /no such option/);
});

test("options: one file serves several commands; what belongs to another is left aside", async () => {
  const yaml = "http-port: 8001\nkv-cache-tokens: 4096\nonce: true\n";
  assert.equal((await resolve([], { command: "frontend", yaml })).values["http-port"], 8001);
  assert.equal((await resolve([], { command: "worker", yaml })).values["kv-cache-tokens"], 4096);
});

test("options: switches are set and unset by flag, variable and file", async () => {
  const at = async (argv: string[], options: Case): Promise<boolean> =>
    (await resolve(argv, options)).values["router-kv-events"];
  assert.equal(await at([], {}), true);
  assert.equal(await at(["--no-router-kv-events"], {}), false);
  assert.equal(await at([], { env: { DYN_ROUTER_USE_KV_EVENTS: "off" } }), false);
  assert.equal(await at([], { yaml: "no-router-kv-events: true" }), false);
  assert.equal(await at(["--router-kv-events"], { yaml: "router-kv-events: false" }), true);
  assert.match(
    (await mistakes([], { env: { DYN_ROUTER_USE_KV_EVENTS: "maybe" } }))[0]!,
    /expected true or false, got maybe/,
  );
});

test("options: spellings of 0.9.1 are accepted with one line that names the new one", async () => {
  const { values, warnings } = await resolve(["--store-kv", "mem", "--no-kv-events"], { command: "frontend" });
  assert.equal(values["discovery-backend"], "memory");
  assert.equal(values["router-kv-events"], false);
  assert.deepEqual(warnings, ["--store-kv is now --discovery-backend", "--no-kv-events is now --no-router-kv-events"]);
  const prefill = await resolve(["--is-prefill-worker"], { command: "worker" });
  assert.equal(prefill.values["disaggregation-mode"], "prefill");
  assert.deepEqual(prefill.warnings, ["--is-prefill-worker is now --disaggregation-mode=prefill"]);
});

test("options: other spellings of today mean the same", async () => {
  const { values, warnings } = await resolve(["--model-path=m.gguf", "--served-model-name=n"], {
    env: { DYN_EVENT_PLANE: "auto" },
  });
  assert.deepEqual([values.model, values["model-name"], warnings], ["m.gguf", "n", []]);
  assert.equal((await resolve([], { env: { DYN_MODEL_PATH: "m2.gguf" } })).values.model, "m2.gguf");
  assert.deepEqual(await mistakes(["--model=a", "--model-path=b"]), ["--model-path: given twice"]);
});

test("options: the cluster secret is taken from the environment, refused as a flag and never shown", async () => {
  const resolved = await resolve([], { command: "worker", env: { DYN_CLUSTER_SECRET: "hunter2" } });
  assert.equal(resolved.values["cluster-secret"], "hunter2");
  assert.equal(describeOptions(resolved, []).join(), "--cluster-secret=*** (environment)");
  assert.deepEqual(forwardedFlags(resolved, "worker"), []);
  const [refused] = await mistakes(["--cluster-secret=hunter2"], { command: "worker" });
  assert.match(refused!, /set DYN_CLUSTER_SECRET instead/);
  assert.doesNotMatch(refused!, /hunter2/);
});

test("options: the printed configuration has what is not a default, with its source, and the defaults asked for", async () => {
  const resolved = await resolve(["--engine=echo"], { env: { DYN_HTTP_PORT: "0" } });
  assert.deepEqual(describeOptions(resolved, ["workers", "model"]), [
    "--engine=echo (flag)",
    "--workers=2 (default)",
    "--http-port=0 (environment)",
  ]);
});

test("options: a child gets the flags it knows and that are not defaults", async () => {
  const resolved = await resolve(["--http-port=0", "--no-router-kv-events", "--max-num-seqs=8", "--log=warn"]);
  assert.deepEqual(forwardedFlags(resolved, "frontend"), ["--http-port=0", "--no-router-kv-events", "--log=warn"]);
  assert.deepEqual(forwardedFlags(resolved, "worker"), ["--max-num-seqs=8", "--log=warn"]);
  const again = await resolveOptions({ command: "frontend", argv: forwardedFlags(resolved, "frontend"), env: {} });
  assert.equal(again.values["router-kv-events"], false);
});

test("options: the defaults are the frontend's own limits, in the units of the code", async () => {
  const { values } = await resolve([], { command: "frontend" });
  const config = frontendConfig(values);
  assert.deepEqual(config.limits, DEFAULT_LIMITS);
  assert.deepEqual(
    [config.httpHost, config.httpPort, config.routerMode, config.drainTimeoutMs],
    ["127.0.0.1", 8000, "round-robin", 10_000],
  );
});

test("options: a worker's engine is configured from them; a model that is not there is named with the next command", async () => {
  const store = new ModelStore({ env: { DYN_MODEL_DIR: folder } });
  const own = join(folder, "own.gguf");
  writeFileSync(own, "");
  const llama = workerConfig(
    (await resolve([`--model=${own}`, "--threads=3"], { command: "worker" })).values,
    store,
    {},
  );
  assert.equal(llama.modelName, "own");
  assert.deepEqual(llama.engine, {
    kind: "llama",
    modelPath: own,
    contextLength: 0,
    kvCacheTokens: 8_192,
    maxSequences: 64,
    maxBatchedTokens: 512,
    blockSizeTokens: 16,
    threads: 3,
    batchInvariant: true,
  });
  const echo = workerConfig((await resolve(["--engine=echo"], { command: "worker" })).values, store, {});
  assert.deepEqual([echo.modelName, echo.engine.kind, echo.engine.contextLength], ["echo", "echo", 8_192]);
  const { values } = await resolve([], { command: "worker" });
  assert.throws(() => workerConfig(values, store, {}), /run "dynamo model pull SmolLM2-135M-Instruct" first/);
  const unknown = await resolve(["--model=nothing"], { command: "worker" });
  assert.throws(() => workerConfig(unknown.values, store, {}), /no model "nothing"/);
});
