import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import type { DynamoError } from "../../errors/index.ts";
import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import type { EngineInfo } from "../base.ts";
import type { VllmEngineConfig } from "../config.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "../engine.recorder.ts";
import type { ForeignEngine } from "../foreign/index.ts";
import { createVllmEngine } from "./vllm-engine.ts";

/** vLLM servers that the worker starts itself: the fake one as a process, with everything that can happen to one. */
const LIMIT = { timeout: 60_000 };
const SCRATCH = mkdtempSync(join(tmpdir(), "vllm-server-test-"));
after(() => rmSync(SCRATCH, { recursive: true, force: true }));
const FAKE = [process.execPath, join(import.meta.dirname, "fixtures/fake-vllm-main.ts")];

interface Launch {
  readonly env?: Record<string, string>;
  readonly args?: readonly string[];
  readonly port?: number;
  readonly command?: readonly string[];
  readonly overrides?: Partial<VllmEngineConfig>;
}

let logs = 0;

function configOf({ env = {}, args = [], port = 0, command = FAKE, overrides = {} }: Launch): VllmEngineConfig {
  return {
    kind: "vllm",
    modelPath: "/no/model/is/needed",
    engineModel: "tiny",
    vocabularySize: 4_096,
    launch: { command, args: ["--num-gpu-blocks-override", "320", ...args], env: { VLLM_SERVER_DEV_MODE: "1", ...env }, port, logPath: join(SCRATCH, `${++logs}.log`) },
    startTimeoutMs: 30_000,
    kvEvents: true,
    maxSequences: 8,
    maxBatchedTokens: 512,
    contextLength: 512,
    blockSizeTokens: 16,
    metricsIntervalMs: 50,
    ...overrides,
  };
} // prettier-ignore

function launched(launch: Launch = {}): Promise<ForeignEngine> {
  return createVllmEngine(configOf(launch), { clock: systemClock, logger: silentLogger });
}

const promptOf = (length: number): Uint32Array => Uint32Array.from({ length }, (_, i) => 100 + ((i * 37) % 3_000));

interface ServerFacts {
  readonly pid: number;
  readonly lives: number;
  readonly log_path: string;
}

function serverOf(engine: ForeignEngine): ServerFacts {
  return engine.describe()["server"] as ServerFacts;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    // A zombie that its parent has not asked for yet is dead.
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "latin1"));
  } catch {
    return false;
  }
}

async function until(isDone: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 30_000;
  while (!isDone()) {
    assert.ok(Date.now() < deadline, `${what} did not come in 30 s`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** A recorder that also hears of going away and coming back. */
class Watcher extends EngineRecorder {
  readonly away: DynamoError[] = [];
  readonly back: EngineInfo[] = [];
  onUnavailable(error: DynamoError): void {
    this.away.push(error);
  }
  onAvailable(info: EngineInfo): void {
    this.back.push(info);
  }
}

async function withEngine(
  launch: Launch,
  body: (engine: ForeignEngine, watcher: Watcher) => Promise<void>,
): Promise<void> {
  const engine = await launched(launch);
  const watcher = new Watcher(engine);
  try {
    await watcher.start();
    await body(engine, watcher);
  } finally {
    await watcher.stop();
  }
  watcher.check();
}

describe("vLLM server of ours", () => {
  test("start: what it is, its log in a file and in memory; stop leaves nothing", LIMIT, async () => {
    let pids: number[] = [];
    await withEngine({}, async (engine) => {
      const { pid, log_path: path } = serverOf(engine);
      const helper = Number(/EngineCore pid=(\d+)/.exec(readFileSync(path, "utf8"))?.[1]);
      pids = [pid, helper];
      assert.ok(pids.every(isAlive), "the server and its helper run");
      assert.match(readFileSync(path, "utf8"), /Application startup complete/);
      assert.equal(engine.searchLog("resolved ARCHITECTURE", 10).length, 1);
      await until(() => engine.ownMetrics() !== "", "a scrape");
      assert.match(engine.ownMetrics(), /^vllm:num_requests_running\{/m);
      assert.doesNotMatch(engine.ownMetrics(), /^python_/m);
    });
    // A helper of its own is no child of ours: whoever reaps it does so in its own time.
    await until(() => !pids.some(isAlive), "the end of both");
  });

  test("killed while answers run: they end with engine-stopped, it comes back, and answers", LIMIT, () =>
    withEngine({ env: { FAKE_VLLM_STEP_MS: "5" } }, async (engine, watcher) => {
      const before = await watcher.run(aRequest(promptOf(40), { stop: { maxTokens: 3 } }));
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size >= 2, "the prompt's blocks");
      const ids = [1, 2, 3].map(() => watcher.submit(aRequest(promptOf(20), { stop: { maxTokens: 400 } })));
      await watcher.until(() => ids.every((id) => watcher.record(id).tokens.length > 0), "first tokens");
      process.kill(serverOf(engine).pid, "SIGKILL");
      await watcher.ended(ids);
      for (const id of ids) assert.equal(watcher.record(id).error?.reason, "engine-stopped");
      await until(() => watcher.away.length === 1, "the word that it is away");
      assert.match(watcher.away[0]!.publicMessage, /was ended by SIGKILL|connection/);
      assert.equal(replayKvEvents(watcher.kvEvents).size, 0, "its cache is forgotten");
      const refused = await watcher.run(aRequest(promptOf(4)));
      assert.equal(refused.error?.reason, "engine-stopped");
      await until(() => watcher.back.length === 1, "the way back");
      assert.equal(serverOf(engine).lives, 2);
      const again = await watcher.run(aRequest(promptOf(40), { stop: { maxTokens: 3 } }));
      assert.deepEqual(again.tokens, before.tokens);
      assert.equal(again.first?.cachedTokens, 0);
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size >= 2, "the prompt's blocks, again");
    }),
  );

  test("stopped by SIGSTOP: taken for hung, killed, started again", LIMIT, () =>
    withEngine({ overrides: { hangTimeoutMs: 300, metricsIntervalMs: 20 } }, async (engine, watcher) => {
      const id = watcher.submit(aRequest(promptOf(20), { stop: { maxTokens: 400 } }));
      await watcher.until(() => watcher.record(id).tokens.length > 0, "a token");
      const { pid } = serverOf(engine);
      process.kill(pid, "SIGSTOP");
      const stalled = watcher.submit(aRequest(promptOf(21), { stop: { maxTokens: 4 } }));
      await watcher.ended([stalled]);
      assert.equal(watcher.record(stalled).error?.reason, "engine-stopped");
      assert.match(watcher.record(stalled).error!.publicMessage, /hangs: no answer to anything/);
      await until(() => watcher.back.length === 1, "the way back");
      assert.equal(isAlive(pid), false);
      assert.equal((await watcher.run(aRequest(promptOf(5), { stop: { maxTokens: 2 } }))).tokens.length, 2);
    }),
  );

  test("slow start: waited for, and given up at the limit with the last lines", LIMIT, async () => {
    await withEngine({ env: { FAKE_VLLM_START_MS: "1200" } }, async (engine) => {
      assert.equal(engine.describe()["state"], "up");
      await Promise.resolve();
    });
    const engine = await launched({ env: { FAKE_VLLM_START_MS: "60000" }, overrides: { startTimeoutMs: 700 } });
    const watcher = new Watcher(engine);
    await assert.rejects(watcher.start(), (error: DynamoError) => {
      assert.equal(error.reason, "engine-failed");
      assert.match(error.publicMessage, /did not serve within 0.7 s.*--engine-start-timeout-secs/s);
      return true;
    });
    const { pid } = serverOf(engine);
    await watcher.stop();
    assert.equal(isAlive(pid), false);
  });

  test("out of memory at start: the reason is in the error, and where all of the log is", LIMIT, async () => {
    const text = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB";
    const engine = await launched({ env: { FAKE_VLLM_FAIL: text } });
    const watcher = new Watcher(engine);
    await assert.rejects(watcher.start(), (error: DynamoError) => {
      assert.equal(error.reason, "engine-failed");
      assert.match(error.publicMessage, /vLLM ended with exit code 1 before it served; all of its log is in .*\.log/);
      assert.ok(error.publicMessage.includes(text));
      return true;
    });
    await watcher.stop();
  });

  test("no such program: says how to name it", LIMIT, async () => {
    const engine = await launched({ command: ["/no/such/vllm"] });
    const watcher = new Watcher(engine);
    await assert.rejects(
      watcher.start(),
      /could not be started: the command is not there \(install it, or .*--engine-command/,
    );
    await watcher.stop();
  });

  test("version too old: refused with the version that will do", LIMIT, async () => {
    const engine = await launched({ env: { FAKE_VLLM_VERSION: "0.9.2" } });
    const watcher = new Watcher(engine);
    await assert.rejects(watcher.start(), /vLLM 0\.9\.2 is too old: 0\.11 is the first/);
    await watcher.stop();
  });

  test("another tokenizer: refused, with the text that shows it", LIMIT, async () => {
    const engine = await launched({ overrides: { tokenizerSamples: [{ text: "abc", tokenIds: [1, 2, 3] }] } });
    const watcher = new Watcher(engine);
    await assert.rejects(watcher.start(), (error: DynamoError) => {
      assert.equal(error.reason, "invalid-config");
      assert.match(
        error.publicMessage,
        /the tokenizer of --model is another than that of the vLLM server.*"abc" is \[1, 2, 3\] here/,
      );
      return true;
    });
    await watcher.stop();
  });

  test("port taken by another program: refused before anything is started", LIMIT, async () => {
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as { port: number };
    await assert.rejects(launched({ port }), (error: DynamoError) => {
      assert.equal(error.reason, "address-in-use");
      assert.match(error.publicMessage, new RegExp(`--engine-port: port ${port} on 127.0.0.1 is in use`));
      return true;
    });
    await new Promise<void>((resolve) => server.close(() => resolve()));
  });

  test(
    "two workers claim one port: the second is refused while the first starts, and may have it afterwards",
    LIMIT,
    async () => {
      const first = await launched();
      const url = new URL(first.describe()["url"] as string);
      const port = Number(url.port);
      await assert.rejects(launched({ port }), (error: DynamoError) => {
        assert.match(error.publicMessage, new RegExp(`is claimed by process ${process.pid}`));
        return true;
      });
      await first.stop();
      const second = await launched({ port });
      await second.stop();
    },
  );

  test("the arguments of the user win, and what cannot work is said before the start", LIMIT, async () => {
    await withEngine({ args: ["--max-num-seqs=3", "--max_model_len", "256"] }, async (engine, watcher) => {
      assert.equal(engine.load().totalBlocks, 320);
      const { error } = await watcher.run(aRequest(promptOf(300)));
      assert.match(error!.publicMessage, /the model's context is 256 tokens/);
    });
    await assert.rejects(launched({ args: ["--headless", "--disable-log-stats"] }), (error: DynamoError) => {
      assert.deepEqual(
        error.publicMessage.split("\n").map((line) => line.split(":")[0]),
        ["--headless", "--disable-log-stats"],
      );
      return true;
    });
  });

  test("its worker is killed: the server and its helper go with it", LIMIT, async () => {
    const script = `
      import { createVllmEngine } from ${JSON.stringify(join(import.meta.dirname, "vllm-engine.ts"))};
      import { silentLogger } from ${JSON.stringify(join(import.meta.dirname, "../../observability/index.ts"))};
      import { systemClock } from ${JSON.stringify(join(import.meta.dirname, "../../std/index.ts"))};
      const engine = await createVllmEngine(${JSON.stringify(configOf({}))}, { clock: systemClock, logger: silentLogger });
      await engine.start({ onStep() {}, onKvEvents() {}, onFatal() {} }, new AbortController().signal);
      process.stdout.write(JSON.stringify(engine.describe().server) + "\\n");
      setInterval(() => undefined, 1e6);
    `;
    const worker = spawn(process.execPath, ["--input-type=module", "-e", script], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    let said = "";
    worker.stdout.on("data", (bytes: Buffer) => (said += bytes.toString()));
    await until(() => said.includes("\n"), "the server");
    const { pid, log_path: path } = JSON.parse(said) as ServerFacts;
    const helper = Number(/EngineCore pid=(\d+)/.exec(readFileSync(path, "utf8"))?.[1]);
    assert.ok(isAlive(pid) && isAlive(helper));
    worker.kill("SIGKILL");
    await until(() => !isAlive(pid) && !isAlive(helper), "the end of both");
    assert.ok(existsSync(path));
  });

  test("comes back no more after a crash: given up after three starts, with its last lines", LIMIT, async () => {
    const failing = join(SCRATCH, "fail-now");
    const engine = await launched({ env: { FAKE_VLLM_FAIL_FILE: failing } });
    const watcher = new Watcher(engine);
    await watcher.start();
    writeFileSync(failing, "RuntimeError: the device is gone");
    process.kill(serverOf(engine).pid, "SIGKILL");
    await until(() => watcher.fatal !== undefined, "the last word");
    assert.match(
      watcher.fatal!.publicMessage,
      /ended with exit code 1 before it served.*RuntimeError: the device is gone/s,
    );
    assert.equal(serverOf(engine).lives, 4);
    await watcher.stop();
  });
});
