import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { REAL_VLLM, REAL_VLLM_ARGS, REAL_VLLM_ENV, whyNoVllm } from "../../../test/helpers/real-vllm.ts";
import { writeTinyLlama } from "../../../test/helpers/tiny-llama.ts";
import { decodeVllmMessage } from "../../engine-events/index.ts";
import { vllmEventHashes } from "../../engine-events/vllm-block-hash.ts";
import { silentLogger } from "../../observability/index.ts";
import { openEngineLink } from "../../runtime/event-plane/index.ts";
import { systemClock } from "../../std/index.ts";
import type { EngineInfo } from "../base.ts";
import type { VllmEngineConfig } from "../config.ts";
import { engineBattery } from "../engine.battery.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "../engine.recorder.ts";
import { claimFreePorts, type ForeignEngine } from "../foreign/index.ts";
import { createVllmEngine } from "./vllm-engine.ts";

/**
 * The same engine over a real vLLM with random weights: the battery, and what only a real one shows. One server is started
 * for all of it, through the engine that starts servers; the others attach to it.
 */
const SKIP = whyNoVllm();
const BLOCK = 32;
const promptOf = (length: number): Uint32Array => Uint32Array.from({ length }, (_, i) => (i * 37 + (i >> 3)) % 250);

interface Server {
  readonly engine: ForeignEngine;
  readonly recorder: Watcher;
  readonly info: EngineInfo;
  readonly kvEventsConfig: string;
  readonly url: string;
  stop(): Promise<void>;
}

class Watcher extends EngineRecorder {
  readonly back: EngineInfo[] = [];
  away = 0;
  onUnavailable(): void {
    this.away++;
  }
  onAvailable(info: EngineInfo): void {
    this.back.push(info);
  }
}

async function startServer(): Promise<Server> {
  const root = mkdtempSync(join(tmpdir(), "vllm-real-"));
  writeTinyLlama(join(root, "tiny"));
  const ports = await claimFreePorts("127.0.0.1", 2, Math.random);
  const kvEventsConfig = JSON.stringify({
    enable_kv_cache_events: true,
    publisher: "zmq",
    endpoint: `tcp://*:${ports.port}`,
    replay_endpoint: `tcp://127.0.0.1:${ports.port + 1}`,
    topic: "kv@real",
  });
  const args = [...REAL_VLLM_ARGS, "--dtype=float32", "--kv-cache-memory-bytes=96M", "--max-num-batched-tokens=2048", "--prefix-caching-hash-algo=sha256_cbor", "--kv-events-config", kvEventsConfig]; // prettier-ignore
  const engine = await createVllmEngine(
    {
      kind: "vllm",
      modelPath: join(root, "tiny"),
      engineModel: "tiny",
      vocabularySize: 259,
      launch: { command: [REAL_VLLM!], args, env: { ...REAL_VLLM_ENV, VLLM_CACHE_ROOT: join(root, "cache") }, port: 0, logPath: join(root, "log") }, // prettier-ignore
      startTimeoutMs: 240_000,
      kvEvents: true,
      maxSequences: 0,
      maxBatchedTokens: 0,
      contextLength: 1_024,
      blockSizeTokens: BLOCK,
      metricsIntervalMs: 200,
      tokenizerSamples: [{ text: "Zoë\n", tokenIds: [90, 111, 195, 171, 10] }],
    },
    { clock: systemClock, logger: silentLogger },
  );
  const recorder = new Watcher(engine);
  const info = await recorder.start();
  return {
    engine,
    recorder,
    info,
    kvEventsConfig,
    url: engine.describe()["url"] as string,
    stop: async () => {
      await recorder.stop();
      ports.release();
      rmSync(root, { recursive: true, force: true });
    },
  };
}

/** Beside the one that started it, as a worker that was told of it. */
async function attached({ url, kvEventsConfig }: Server): Promise<ForeignEngine> {
  const config: VllmEngineConfig = {
    kind: "vllm",
    url,
    kvEventsConfig,
    vocabularySize: 259,
    startTimeoutMs: 10_000,
    kvEvents: true,
    maxSequences: 0,
    maxBatchedTokens: 0,
    contextLength: 0,
    blockSizeTokens: 0,
    metricsIntervalMs: 50,
  };
  const engine = await createVllmEngine(config, { clock: systemClock, logger: silentLogger });
  // What earlier tests left in the cache is replayed to it first, and then cleared: each test begins with nothing.
  const start = engine.start.bind(engine);
  return Object.assign(engine, {
    start: async (...args: Parameters<typeof start>) => {
      const info = await start(...args);
      const deadline = Date.now() + 10_000;
      while (!engine.processState().isKvWhole) {
        assert.ok(Date.now() < deadline, "its past was not told");
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
      await engine.clearBlocks();
      return info;
    },
  });
}

describe("real vLLM", { skip: SKIP, timeout: 900_000 }, () => {
  let server: Server;
  before(async () => {
    server = await startServer();
  });
  after(() => server.stop());

  test("start: sizes as the server was told, memory and log told", () => {
    const { info, engine } = server;
    assert.deepEqual(
      [info.contextLength, info.blockSizeTokens, info.maxSequences, info.kvEvents],
      [1_024, BLOCK, 8, "exact"],
    );
    const facts = engine.describe()["server"] as { pid: number; memory_bytes: number; log_path: string };
    const { pid, memory_bytes: memory, log_path: path } = facts;
    assert.ok(pid > 0 && memory > 100e6, `${pid} ${memory}`);
    assert.match(readFileSync(path, "utf8"), /Application startup complete/);
  });

  engineBattery("real vLLM, attached", async () => ({
    engine: await attached(server),
    promptTokenIds: promptOf,
    supportsExport: false,
    resumesExactly: ["greedy"],
  }));

  test("an abort frees the engine: nothing runs there a moment later", async () => {
    const { recorder, url } = server;
    const id = recorder.submit(aRequest(promptOf(200), { stop: { maxTokens: 800 } }));
    await recorder.until(() => recorder.record(id).tokens.length >= 2, "two tokens");
    recorder.abort(id);
    const startMs = performance.now();
    for (;;) {
      const page = await (await fetch(`${url}/metrics`)).text();
      if (/^vllm:num_requests_running\{[^}]*\} 0\.0$/m.test(page)) break;
      assert.ok(performance.now() - startMs < 5_000, "the request still runs 5 s after its abort");
    }
    assert.equal(recorder.record(id).finish, "cancelled");
  });

  test("200 requests with shared prefixes: predicted reuse is what the engine reports, each time", async () => {
    const { recorder, engine } = server;
    const before = engine.counts.unpredicted;
    for (let i = 0; i < 200; i++) {
      const prompt = Uint32Array.from([...promptOf(BLOCK * (1 + (i % 4))), ...promptOf(10 + (i % 7)).map((id) => (id + i % 5) % 250)]); // prettier-ignore
      const events = recorder.kvEvents.length;
      const { first } = await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      const isNew = first!.cachedTokens < Math.floor(prompt.length / BLOCK) * BLOCK;
      if (isNew) await recorder.until(() => recorder.kvEvents.length > events, "its blocks");
    }
    assert.equal(engine.counts.unpredicted, before);
    replayKvEvents(recorder.kvEvents);
  });

  test("our reproduction of its block hashes is what its events say", async () => {
    const { url, kvEventsConfig } = server;
    const { endpoint } = JSON.parse(kvEventsConfig) as { endpoint: string };
    const heard: Buffer[][] = [];
    const connected = Promise.withResolvers<void>();
    const link = await openEngineLink(
      { endpoint: endpoint.replace("*", "127.0.0.1"), clock: systemClock },
      { onConnected: connected.resolve, onFrames: (frames) => void heard.push([...frames]), onFailed: (error) => connected.reject(error) }, // prettier-ignore
    );
    await connected.promise;
    const tokenIds = Uint32Array.from({ length: 3 * BLOCK + 5 }, (_, i) => (i * 11 + 3) % 250);
    const ask = async (salt: string | undefined): Promise<number[]> => {
      heard.length = 0;
      const body = JSON.stringify({ token_ids: [...tokenIds], ...(salt === undefined ? {} : { cache_salt: salt }), sampling_params: { max_tokens: 1, temperature: 0 } }); // prettier-ignore
      await (await fetch(`${url}/inference/v1/generate`, { method: "POST", body, headers: { "content-type": "application/json" } })).text(); // prettier-ignore
      const deadline = Date.now() + 10_000;
      for (;;) {
        const stored = heard.flatMap((frames) => decodeVllmMessage(frames).events).filter((event) => event.type === "stored"); // prettier-ignore
        if (stored.length > 0) return stored.flatMap(({ hashes }) => [...hashes]);
        assert.ok(Date.now() < deadline, "no event came");
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    };
    const own = (salt?: string): number[] =>
      vllmEventHashes(tokenIds, BLOCK, { algorithm: "sha256_cbor", seed: "0", ...(salt === undefined ? {} : { salt }) })
        .flatMap((hash) => [Number(hash & 0xffff_ffffn), Number(hash >> 32n)]); // prettier-ignore
    assert.deepEqual(await ask(undefined), own());
    assert.deepEqual(await ask("dynamo-cache-salt:t"), own("dynamo-cache-salt:t"));
    link.close();
  });

  test("killed: its requests end, it is started again and answers the same", async () => {
    const { recorder, engine } = server;
    const before = await recorder.run(aRequest(promptOf(70), { stop: { maxTokens: 6 } }));
    const id = recorder.submit(aRequest(promptOf(50), { stop: { maxTokens: 800 } }));
    await recorder.until(() => recorder.record(id).tokens.length > 0, "a token");
    process.kill((engine.describe()["server"] as { pid: number }).pid, "SIGKILL");
    await recorder.ended([id]);
    assert.equal(recorder.record(id).error?.reason, "engine-stopped");
    const deadline = Date.now() + 240_000;
    while (recorder.back.length === 0) {
      assert.ok(Date.now() < deadline, "it did not come back");
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    const again = await recorder.run(aRequest(promptOf(70), { stop: { maxTokens: 6 } }));
    assert.deepEqual(again.tokens, before.tokens);
    assert.equal(again.first?.cachedTokens, 0);
    await recorder.until(() => replayKvEvents(recorder.kvEvents).size >= 2, "its blocks");
  });
});
