import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import type { DynamoError } from "../../errors/index.ts";
import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { EngineInfo } from "../base.ts";
import { aRequest, replayKvEvents } from "../engine.recorder.ts";
import { EngineWatcher as Watcher, isAlive, until } from "./fixtures/engine-watcher.ts";
import type { FakeTokenServer, FakeTokenOptions } from "./fixtures/fake-token-server.ts";
import type { ForeignEngineConfig } from "./foreign-config.ts";
import { claimFreePorts, type ForeignEngine } from "./index.ts";

/** What can happen to an engine that is a process of its own, as tests that each of them runs over its fake server. */
const LIMIT = { timeout: 60_000 };
export const OPTIONS = { clock: systemClock, logger: silentLogger };
export const SIZES: FakeTokenOptions = { contextLength: 512, blockSize: 16, totalBlocks: 320, maxSequences: 8 };

export const promptOf = (length: number, from = 100): Uint32Array =>
  Uint32Array.from({ length }, (_, i) => from + ((i * 37) % 3_000));

type Fake = Omit<FakeTokenServer<unknown, FakeTokenOptions>, "options"> & { readonly options: FakeTokenOptions };
type Overrides = Partial<Omit<ForeignEngineConfig, "url" | "launch">>;

export interface AttachedUnderTest<F extends Fake, O extends FakeTokenOptions> {
  readonly fake: (options: O) => F;
  /** `kvEvents` as the server was given them; undefined = it has none, or they are not wanted. */
  readonly create: (
    url: string,
    kvEvents: NonNullable<FakeTokenOptions["kvEvents"]> | undefined,
    overrides: Overrides,
  ) => Promise<ForeignEngine>;
  /** A request as another client would send it, of so many tokens after the prompt. */
  readonly otherClient: (prompt: readonly number[], tokens: number) => { readonly path: string; readonly body: object };
  /** Events are numbered, and lost ones come again. */
  readonly replays: boolean;
  readonly refusals: readonly (readonly [O, Overrides, RegExp])[];
}

export interface AttachedPlace<F extends Fake, O extends FakeTokenOptions> {
  readonly fake: F;
  readonly url: string;
  readonly engine: ForeignEngine;
  readonly watcher: Watcher;
  readonly info: EngineInfo;
  /** Ends the server and starts another at the same addresses. */
  restart(options?: O): Promise<void>;
}

export async function withAttached<F extends Fake, O extends FakeTokenOptions>(
  under: AttachedUnderTest<F, O>,
  setup: { readonly fake?: O; readonly config?: Overrides; readonly withoutEvents?: boolean },
  body: (place: AttachedPlace<F, O>) => Promise<void>,
): Promise<void> {
  const ranks = setup.fake?.dataParallelSize ?? 1;
  const ports = await claimFreePorts("127.0.0.1", 2 * ranks + 1, Math.random);
  const kvEvents = {
    publisher: "zmq",
    endpoint: `tcp://*:${ports.port}`,
    replay_endpoint: `tcp://127.0.0.1:${ports.port + ranks}`,
    topic: "kv",
  };
  const make = (options?: O): F => under.fake({ ...SIZES, ...setup.fake, ...options, kvEvents } as unknown as O);
  const port = ports.port + 2 * ranks;
  let fake = make();
  const url = await fake.listen(port);
  const engine = await under.create(url, setup.withoutEvents === true ? undefined : kvEvents, {
    metricsIntervalMs: 20,
    ...setup.config,
  });
  const watcher = new Watcher(engine);
  try {
    const info = await watcher.start();
    await body({
      get fake() {
        return fake;
      },
      url,
      engine,
      watcher,
      info,
      restart: async (options) => {
        await fake.close();
        fake = make(options);
        await fake.listen(port);
      },
    });
  } finally {
    await watcher.stop();
    await fake.close();
    ports.release();
  }
  watcher.check();
}

export function attachedBattery<F extends Fake, O extends FakeTokenOptions>(name: string, under: AttachedUnderTest<F, O>): void {
  type Setup = Parameters<typeof withAttached<F, O>>[1];
  const withServer = (setup: Setup, body: (place: AttachedPlace<F, O>) => Promise<void>): Promise<void> =>
    withAttached(under, setup, body);
  const fakeOptions = (options: FakeTokenOptions): O => options as unknown as O;
  const told = (watcher: Watcher): number => replayKvEvents(watcher.kvEvents).size;
  const inCache = (fake: F): number => fake.caches[0]!.cachedBlocks;

  void describe(`${name} that runs already`, () => {
    void test("nobody there: says what to start, or which flag to correct", LIMIT, async () => {
      const ports = await claimFreePorts("127.0.0.1", 1, Math.random);
      const engine = await under.create(`http://127.0.0.1:${ports.port}`, undefined, {});
      const watcher = new Watcher(engine);
      await assert.rejects(watcher.start(), /answers at .*; start it first, or correct --engine-url/);
      await watcher.stop();
      ports.release();
    });

    void test("what cannot work is refused with the reason and the fix", LIMIT, async () => {
      for (const [options, overrides, pattern] of under.refusals) {
        const fake = under.fake({ ...SIZES, ...options });
        const kvEvents = { publisher: "zmq", endpoint: "tcp://127.0.0.1:*" };
        const engine = await under.create(await fake.listen(), kvEvents, overrides);
        const watcher = new Watcher(engine);
        await assert.rejects(watcher.start(), pattern);
        await watcher.stop();
        await fake.close();
      }
    });

    void test("two workers for one engine: the second is refused, and may have it when the first is gone", LIMIT, async () => {
      const fake = under.fake(fakeOptions(SIZES));
      const url = await fake.listen();
      const make = (): Promise<ForeignEngine> => under.create(url, undefined, {});
      const first = await make();
      await assert.rejects(make(), new RegExp(`process ${process.pid} is a worker of the engine at ${url} already`));
      await first.stop();
      await (await make()).stop();
      await fake.close();
    });

    void test("without events: what it has is guessed, and the guess is right while nobody else asks", LIMIT, () =>
      withServer({ withoutEvents: true }, async ({ watcher, engine, info }) => {
        assert.equal(info.kvEvents, "estimated");
        const prompt = promptOf(50);
        await watcher.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
        assert.equal(told(watcher), 3);
        assert.equal((await watcher.run(aRequest(prompt, { stop: { maxTokens: 1 } }))).first?.cachedTokens, 48);
        assert.equal(engine.counts.unpredicted, 0);
      }));

    void test("a token id that the model does not have does not reach it", LIMIT, () =>
      withServer({}, async ({ fake, watcher }) => {
        const before = fake.requests.length;
        const { error } = await watcher.run(aRequest(Uint32Array.of(1, 4_096)));
        assert.equal(error?.reason, "invalid-field");
        assert.equal(fake.requests.length, before);
      }));

    void test("a broken connection is told as one, and the server is well", LIMIT, () =>
      withServer({ fake: fakeOptions({ stepMs: 5 }) }, async ({ fake, watcher, engine }) => {
        const ids = [1, 2].map(() => watcher.submit(aRequest(promptOf(9), { stop: { maxTokens: 400 } })));
        await watcher.until(() => ids.every((id) => watcher.record(id).tokens.length > 0), "first tokens");
        fake.breakConnections();
        await watcher.ended(ids);
        for (const id of ids) assert.equal(watcher.record(id).error?.reason, "engine-stopped");
        assert.equal((await watcher.run(aRequest(promptOf(9), { stop: { maxTokens: 2 } }))).tokens.length, 2);
        assert.equal(engine.describe()["state"], "up");
      }));

    void test("reuse: what is predicted with the first token is what the engine says in the end", LIMIT, () =>
      withServer({}, async ({ watcher, engine, fake }) => {
        for (let i = 0; i < 40; i++) {
          const shared = promptOf(16 * (1 + (i % 5)));
          const prompt = Uint32Array.from([...shared, ...promptOf(20 + (i % 3), 500 + 10 * (i % 4))]);
          const before = inCache(fake);
          await watcher.run(aRequest(prompt, { stop: { maxTokens: 2 } }));
          if (inCache(fake) !== before) await watcher.until(() => told(watcher) === inCache(fake), "its blocks");
        }
        assert.equal(engine.counts.unpredicted, 0);
        assert.ok(engine.load().cachedPromptTokens > 1_000);
      }));

    void test("restarted behind the worker: noticed, its blocks forgotten, back when it answers", LIMIT, () =>
      withServer({}, async (place) => {
        const { watcher, engine } = place;
        await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
        await watcher.until(() => told(watcher) === 3, "the prompt's blocks");
        await place.restart();
        await until(() => watcher.back.length === 1, "the way back");
        assert.match(watcher.away[0]!.publicMessage, /is gone: nobody listens|was restarted by somebody/);
        assert.equal(told(watcher), 0);
        const again = await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
        assert.equal(again.first?.cachedTokens, 0);
        await watcher.until(() => told(watcher) === 3, "the prompt's blocks, again");
        assert.equal(await engine.countBlocks(hashBlocks(promptOf(48), 16, blockHashSeed()).sequenceHashes), 3);
      }));

    void test("restarted with another block size: the worker ends with the reason", LIMIT, () =>
      withServer({}, async (place) => {
        await place.restart(fakeOptions({ blockSize: 32 }));
        await until(() => place.watcher.fatal !== undefined, "the last word");
        assert.match(
          place.watcher.fatal!.publicMessage,
          /came back with another KV block size \(32, was 16\); start the worker again/,
        );
      }));

    void test("hung: nothing answers while the port is open; its requests end, and it is back when it answers again", LIMIT, () =>
      withServer({ fake: fakeOptions({ stepMs: 5 }), config: { hangTimeoutMs: 1_000 } }, async ({ fake, watcher }) => {
        const id = watcher.submit(aRequest(promptOf(9), { stop: { maxTokens: 400 } }));
        await watcher.until(() => watcher.record(id).tokens.length > 0, "a token");
        fake.isHung = true;
        await watcher.ended([id]);
        assert.match(watcher.record(id).error!.publicMessage, /the engine hangs: no answer to anything for/);
        fake.isHung = false;
        await until(() => watcher.back.length === 1, "the way back");
        assert.equal((await watcher.run(aRequest(promptOf(9), { stop: { maxTokens: 2 } }))).tokens.length, 2);
      }));

    if (under.replays) {
      void test("events lost on the way: replayed, nothing is missing and nothing too much", LIMIT, () =>
        withServer({}, async ({ fake, watcher }) => {
          await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
          fake.publishers[0]!.dropNext = 2;
          for (const from of [200, 300, 400]) {
            await watcher.run(aRequest(promptOf(40, from), { stop: { maxTokens: 1 } }));
          }
          await watcher.until(() => told(watcher) === inCache(fake), "all blocks");
        }));
    }

    void test("what is removed for want of room is told", LIMIT, () =>
      withServer({ fake: fakeOptions({ totalBlocks: 40 }) }, async ({ fake, watcher }) => {
        for (let i = 0; i < 12; i++) {
          await watcher.run(aRequest(promptOf(80, 100 + 60 * i), { stop: { maxTokens: 20 } }));
        }
        await watcher.until(() => told(watcher) === inCache(fake), "the last state");
        assert.ok(watcher.kvEvents.some(({ type }) => type === "removed"));
      }));

    void test("load of others is seen, and nothing is concluded from a scrape that is old", LIMIT, () =>
      withServer(
        { fake: fakeOptions({ stepMs: 20 }), config: { metricsMaxAgeMs: 150, hangTimeoutMs: 60_000 } },
        async ({ fake, url, engine }) => {
          const { path, body } = under.otherClient([...promptOf(200)], 300);
          const others = new AbortController();
          const init = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
          const answer = await fetch(`${url}${path}`, { ...init, signal: others.signal });
          await until(() => engine.load().runningRequests === 1, "the request of somebody else");
          await until(() => engine.load().activeBlocks >= 13, "its blocks");
          fake.isHung = true;
          await until(() => (engine.describe()["metrics"] as { stale: boolean }).stale, "the word that it is stale");
          assert.deepEqual([engine.load().runningRequests, engine.load().activeBlocks], [0, 0]);
          assert.equal(engine.ownMetrics(), "");
          others.abort();
          await answer.body?.cancel().catch(() => undefined);
        },
      ));
  });
} // prettier-ignore

export interface Launch {
  /** `STEP_MS`, `START_MS`, `FAIL`, `FAIL_FILE`, `VERSION`: see the fake's main file. */
  readonly env?: Readonly<Record<string, string>>;
  readonly args?: readonly string[];
  readonly port?: number;
  readonly command?: readonly string[];
  readonly overrides?: Overrides;
}

export interface LaunchedUnderTest {
  /** `SGLang`, as it is called in messages. */
  readonly title: string;
  readonly create: (launch: Launch) => Promise<ForeignEngine>;
  readonly oldVersion: string;
  /** A line that its start writes. */
  readonly startLine: RegExp;
  readonly metric: RegExp;
  /** Arguments with which it cannot work, and the flags that are complained of. */
  readonly badArgs: readonly (readonly [readonly string[], readonly string[]])[];
}

interface ServerFacts {
  readonly pid: number;
  readonly lives: number;
  readonly log_path: string;
}

export function serverOf(engine: ForeignEngine): ServerFacts {
  return engine.describe()["server"] as ServerFacts;
}

export function launchedBattery(under: LaunchedUnderTest): void {
  const { title, create } = under;
  const withEngine = async (
    launch: Launch,
    body: (engine: ForeignEngine, watcher: Watcher) => Promise<void>,
  ): Promise<void> => {
    const engine = await create(launch);
    const watcher = new Watcher(engine);
    try {
      await watcher.start();
      await body(engine, watcher);
    } finally {
      await watcher.stop();
    }
    watcher.check();
  };
  const failsToStart = async (launch: Launch, check: RegExp | ((error: DynamoError) => true)): Promise<ForeignEngine> => {
    const engine = await create(launch);
    const watcher = new Watcher(engine);
    await assert.rejects(watcher.start(), check);
    await watcher.stop();
    return engine;
  };

  void describe(`${title} server of ours`, () => {
    void test("start: what it is, its log in a file and in memory; stop leaves nothing", LIMIT, async () => {
      let pid = 0;
      await withEngine({}, async (engine) => {
        const facts = serverOf(engine);
        pid = facts.pid;
        assert.ok(isAlive(pid));
        assert.match(readFileSync(facts.log_path, "utf8"), under.startLine);
        await until(() => engine.ownMetrics() !== "", "a scrape");
        assert.match(engine.ownMetrics(), under.metric);
        assert.doesNotMatch(engine.ownMetrics(), /^python_/m);
      });
      await until(() => !isAlive(pid), "its end");
    });

    void test("killed while answers run: they end with engine-stopped, it comes back, and answers", LIMIT, () =>
      withEngine({ env: { STEP_MS: "5" } }, async (engine, watcher) => {
        const before = await watcher.run(aRequest(promptOf(40), { stop: { maxTokens: 3 } }));
        await watcher.until(() => replayKvEvents(watcher.kvEvents).size >= 2, "the prompt's blocks");
        const ids = [1, 2, 3].map(() => watcher.submit(aRequest(promptOf(20), { stop: { maxTokens: 400 } })));
        await watcher.until(() => ids.every((id) => watcher.record(id).tokens.length > 0), "first tokens");
        process.kill(serverOf(engine).pid, "SIGKILL");
        await watcher.ended(ids);
        for (const id of ids) assert.equal(watcher.record(id).error?.reason, "engine-stopped");
        await until(() => watcher.away.length === 1, "the word that it is away");
        assert.equal(replayKvEvents(watcher.kvEvents).size, 0, "its cache is forgotten");
        assert.equal((await watcher.run(aRequest(promptOf(4)))).error?.reason, "engine-stopped");
        await until(() => watcher.back.length === 1, "the way back");
        assert.equal(serverOf(engine).lives, 2);
        const again = await watcher.run(aRequest(promptOf(40), { stop: { maxTokens: 3 } }));
        assert.deepEqual(again.tokens, before.tokens);
        assert.equal(again.first?.cachedTokens, 0);
        await watcher.until(() => replayKvEvents(watcher.kvEvents).size >= 2, "the prompt's blocks, again");
      }));

    void test("stopped by SIGSTOP: taken for hung, killed, started again", LIMIT, () =>
      withEngine({ overrides: { hangTimeoutMs: 400, metricsIntervalMs: 20 } }, async (engine, watcher) => {
        await watcher.run(aRequest(promptOf(20), { stop: { maxTokens: 2 } }));
        const { pid } = serverOf(engine);
        process.kill(pid, "SIGSTOP");
        const stalled = watcher.submit(aRequest(promptOf(21), { stop: { maxTokens: 4 } }));
        await watcher.ended([stalled]);
        assert.match(watcher.record(stalled).error!.publicMessage, /hangs: no answer to anything/);
        await until(() => watcher.back.length === 1, "the way back");
        assert.equal(isAlive(pid), false);
        assert.equal((await watcher.run(aRequest(promptOf(5), { stop: { maxTokens: 2 } }))).tokens.length, 2);
      }));

    void test("slow start: waited for, and given up at the limit with the last lines", LIMIT, async () => {
      await withEngine({ env: { START_MS: "900" } }, (engine) => {
        assert.equal(engine.describe()["state"], "up");
        return Promise.resolve();
      });
      const launch = { env: { START_MS: "60000" }, overrides: { startTimeoutMs: 700 } };
      const engine = await failsToStart(launch, (error) => {
        assert.equal(error.reason, "engine-failed");
        assert.match(error.publicMessage, /did not serve within 0.7 s.*--engine-start-timeout-secs/s);
        return true;
      });
      assert.equal(isAlive(serverOf(engine).pid), false);
    });

    void test("out of memory at start: the reason is in the error, and where all of the log is", LIMIT, async () => {
      const text = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB";
      await failsToStart({ env: { FAIL: text } }, (error) => {
        assert.equal(error.reason, "engine-failed");
        assert.match(error.publicMessage, new RegExp(`${title} ended with exit code 1 before it served; all of its log is in .*\\.log`));
        assert.ok(error.publicMessage.includes(text));
        return true;
      });
    });

    void test("no such program: says how to name it", LIMIT, async () => {
      await failsToStart({ command: ["/no/such/engine"] }, /could not be started: the command is not there \(install it, or .*--engine-command/);
    });

    void test("version too old: refused with the version that will do", LIMIT, async () => {
      await failsToStart({ env: { VERSION: under.oldVersion } }, /which is too old: .* is the first/);
    });

    void test("another tokenizer: refused, with the text that shows it", LIMIT, async () => {
      const tokenizerSamples = [{ text: "abc", tokenIds: [1, 2, 3] }];
      await failsToStart({ overrides: { tokenizerSamples } }, (error) => {
        assert.equal(error.reason, "invalid-config");
        assert.match(error.publicMessage, /the tokenizer of --model is another than that of the .* server.*"abc" is \[1, 2, 3\] here/);
        return true;
      });
    });

    void test("port taken by another program: refused before anything is started", LIMIT, async () => {
      const server = createServer();
      await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
      const { port } = server.address() as { port: number };
      await assert.rejects(create({ port }), new RegExp(`--engine-port: port ${port} on 127.0.0.1 is in use`));
      await new Promise<void>((resolve) => server.close(() => resolve()));
    });

    void test("two workers claim one port: the second is refused while the first starts, and may have it afterwards", LIMIT, async () => {
      const first = await create({});
      const port = Number(new URL(first.describe()["url"] as string).port);
      await assert.rejects(create({ port }), new RegExp(`is claimed by process ${process.pid}`));
      await first.stop();
      await (await create({ port })).stop();
    });

    void test("arguments that cannot work are refused before the start, all at once", LIMIT, async () => {
      for (const [args, flags] of under.badArgs) {
        await assert.rejects(create({ args }), (error: DynamoError) => {
          assert.deepEqual(error.publicMessage.split("\n").map((line) => line.split(":")[0]), flags);
          return true;
        });
      }
    });

    void test("comes back no more after a crash: given up after three starts, with its last lines", LIMIT, async () => {
      const folder = mkdtempSync(join(tmpdir(), "engine-fails-"));
      const failing = join(folder, "reason");
      const engine = await create({ env: { FAIL_FILE: failing } });
      const watcher = new Watcher(engine);
      try {
        await watcher.start();
        writeFileSync(failing, "RuntimeError: the device is gone");
        process.kill(serverOf(engine).pid, "SIGKILL");
        await until(() => watcher.fatal !== undefined, "the last word");
        assert.match(watcher.fatal!.publicMessage, /ended with exit code 1 before it served.*RuntimeError: the device is gone/s);
        assert.equal(serverOf(engine).lives, 4);
      } finally {
        await watcher.stop();
        rmSync(folder, { recursive: true });
      }
    });
  });
} // prettier-ignore
