import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { DynamoError } from "../errors/index.ts";
import type { KvEvent, PreprocessedRequest } from "../protocol/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import type { Engine, EngineInfo } from "./base.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "./engine.recorder.ts";

/**
 * The promises of `base.ts`, as tests that every engine runs. What an engine cannot do it says with a flag, and the
 * battery then checks that it refuses.
 */
export interface EngineUnderTest {
  /** Not started. */
  readonly engine: Engine;
  /** A prompt of that many tokens that makes sense to the model; the same length gives the same prompt. */
  readonly promptTokenIds: (length: number) => Uint32Array;
  /** A stop token of the model, for tests that want one that does not come by itself. */
  readonly stopTokenId?: number;
  readonly supportsExport: boolean;
  /** Streams that may wait beyond `maxSequences`; undefined = too many to try. */
  readonly maxWaitingRequests?: number;
  /**
   * Kinds of sampling with which a resumed answer goes on as the whole one did. Servers that take a prompt for a prompt know
   * nothing of the random numbers drawn and the penalties given before. @default all
   */
  readonly resumesExactly?: readonly ("greedy" | "seeded" | "penalised")[];
  /** What it cannot do: it must refuse it, with `unsupported-operation`. @default nothing */
  readonly refuses?: readonly (
    "min-tokens" | "logprobs" | "alternatives" | "prompt-logprobs" | "namespaces" | "clearing"
  )[];
  /** Its cache has no blocks: it finds the tokens behind the last whole one too. @default false */
  readonly reusesPartsOfBlocks?: boolean;
}

interface Context extends EngineUnderTest {
  readonly recorder: EngineRecorder;
  readonly info: EngineInfo;
  readonly skip: (reason: string) => void;
}

export function engineBattery(name: string, make: () => Promise<EngineUnderTest>): void {
  /** One test on one started engine; afterwards the engine is stopped and must have kept its promises. */
  const check = (title: string, body: (context: Context) => Promise<void>): void => {
    void test(title, async (t) => {
      const underTest = await make();
      const recorder = new EngineRecorder(underTest.engine);
      const info = await recorder.start();
      try {
        await body({ ...underTest, recorder, info, skip: (reason) => t.skip(reason) });
      } finally {
        await recorder.stop();
      }
      await loopTurns(3);
      recorder.check();
    });
  };

  void describe(`${name}: engine battery`, () => {
    check("start says what the engine is", async ({ info }) => {
      for (const field of ["contextLength", "blockSizeTokens", "totalBlocks", "maxSequences"] as const) {
        assert.ok(Number.isInteger(info[field]) && info[field] > 0, `${field} is a positive integer`);
      }
      assert.ok(info.maxBatchedTokens >= info.maxSequences, "a step has room for one token of each sequence");
      assert.ok(info.vocabularySize > 0 && info.dataParallelSize >= 1);
      assert.notEqual(info.engine, "");
      await Promise.resolve();
    });

    check("a stream gets its tokens and ends once, with length", async ({ recorder, promptTokenIds }) => {
      const record = await recorder.run(aRequest(promptTokenIds(20), { stop: { maxTokens: 5 } }));
      assert.equal(record.finish, "length");
      assert.equal(record.tokens.length, 5);
      assert.equal(record.first?.promptTokens, 20);
      assert.ok(record.first.queueMs >= 0 && record.first.prefillMs >= 0);
    });

    check("one token is enough to ask for", async ({ recorder, promptTokenIds }) => {
      const record = await recorder.run(aRequest(promptTokenIds(1), { stop: { maxTokens: 1 } }));
      assert.equal(record.tokens.length, 1);
      assert.equal(record.finish, "length");
    });

    check("more streams than fit run to their ends, and the load goes back to zero", async (context) => {
      const { recorder, promptTokenIds, info, engine } = context;
      const streamIds: number[] = [];
      for (let i = 0; i < Math.min(info.maxSequences, 16) + 5; i++) {
        streamIds.push(recorder.submit(aRequest(promptTokenIds(3 + i), { stop: { maxTokens: 1 + (i % 7) } })));
      }
      await recorder.ended(streamIds);
      streamIds.forEach((id, i) => {
        assert.equal(recorder.record(id).finish, "length");
        assert.equal(recorder.record(id).tokens.length, 1 + (i % 7));
      });
      const load = engine.load();
      assert.deepEqual(
        [load.runningRequests, load.waitingRequests, load.activeBlocks, load.pendingPrefillTokens],
        [0, 0, 0, 0],
      );
      assert.ok(load.generatedTokens >= streamIds.reduce((sum, _, i) => sum + 1 + (i % 7), 0));
      assert.ok(load.steps > 0 && load.totalBlocks === info.totalBlocks);
    });

    check("an abort before the first step ends the stream with cancelled", async ({ recorder, promptTokenIds }) => {
      const streamId = recorder.submit(aRequest(promptTokenIds(30), { stop: { maxTokens: 1000 } }));
      recorder.abort(streamId);
      await recorder.ended([streamId]);
      assert.equal(recorder.record(streamId).finish, "cancelled");
    });

    check("an abort while decoding ends that stream within a step and no other", async (context) => {
      const { recorder, promptTokenIds, info } = context;
      const maxTokens = Math.min(40, info.contextLength - 20);
      const aborted = recorder.submit(aRequest(promptTokenIds(10), { stop: { maxTokens: info.contextLength } }));
      const other = recorder.submit(aRequest(promptTokenIds(11), { stop: { maxTokens } }));
      await recorder.until(() => recorder.record(aborted).tokens.length >= 2, "two tokens");
      recorder.abort(aborted);
      recorder.abort(aborted);
      // What the engine is told afterwards can show in the next step at the earliest: by then the abort has.
      const later = recorder.submit(aRequest(promptTokenIds(3), { stop: { maxTokens: 1 } }));
      await recorder.ended([aborted, other, later]);
      const { finishedAtStep } = recorder.record(aborted);
      assert.ok(finishedAtStep <= recorder.record(later).firstAtStep, "work stops with the step that was running");
      assert.equal(recorder.record(aborted).finish, "cancelled");
      assert.equal(recorder.record(other).finish, "length");
      assert.equal(recorder.record(other).tokens.length, maxTokens);
    });

    check("aborts of waiting streams leave the others alone", async ({ recorder, promptTokenIds, info }) => {
      const streamIds: number[] = [];
      for (let i = 0; i < info.maxSequences + 6; i++) {
        streamIds.push(recorder.submit(aRequest(promptTokenIds(5), { stop: { maxTokens: 3 } })));
      }
      for (const id of streamIds.slice(-6, -3)) recorder.abort(id);
      await recorder.ended(streamIds);
      const finishes = streamIds.map((id) => recorder.record(id).finish);
      assert.equal(finishes.filter((finish) => finish === "cancelled").length, 3);
      assert.equal(finishes.filter((finish) => finish === "length").length, info.maxSequences + 3);
    });

    check("an abort of an unknown or ended stream is ignored", async ({ recorder, promptTokenIds }) => {
      recorder.abort(4_000_000_000);
      const first = recorder.submit(aRequest(promptTokenIds(4), { stop: { maxTokens: 2 } }));
      await recorder.ended([first]);
      recorder.abort(first);
      const second = await recorder.run(aRequest(promptTokenIds(4), { stop: { maxTokens: 2 } }));
      assert.equal(second.finish, "length");
    });

    check("a stop token ends the stream and is not part of the output", async (context) => {
      const { recorder, promptTokenIds } = context;
      const free = await recorder.run(aRequest(promptTokenIds(12), { stop: { maxTokens: 6 } }));
      await clear(context);
      const stopTokenId = free.tokens[3]!;
      const stopped = await recorder.run(
        aRequest(promptTokenIds(12), { stop: { maxTokens: 6, stopTokenIds: [stopTokenId] } }),
      );
      assert.equal(stopped.finish, "stop");
      assert.deepEqual(stopped.tokens, free.tokens.slice(0, free.tokens.indexOf(stopTokenId)));
    });

    check("a stream that stops at its first token still says what its prompt was", async (context) => {
      const { recorder, promptTokenIds } = context;
      const free = await recorder.run(aRequest(promptTokenIds(12), { stop: { maxTokens: 1 } }));
      await clear(context);
      const stopped = await recorder.run(aRequest(promptTokenIds(12), { stop: { stopTokenIds: free.tokens } }));
      assert.equal(stopped.finish, "stop");
      assert.deepEqual(stopped.tokens, []);
      assert.equal(stopped.first?.promptTokens, 12);
    });

    check("before min_tokens no stop token comes, and the stream goes on", async (context) => {
      const { recorder, promptTokenIds } = context;
      const free = await recorder.run(aRequest(promptTokenIds(12), { stop: { maxTokens: 1 } }));
      await clear(context);
      const stop = { maxTokens: 6, minTokens: 6, stopTokenIds: free.tokens };
      if (refuses(context, "min-tokens")) return checkRefused(context, aRequest(promptTokenIds(12), { stop }));
      const record = await recorder.run(aRequest(promptTokenIds(12), { stop }));
      assert.equal(record.tokens.length, 6);
      assert.ok(!record.tokens.includes(free.tokens[0]!));
    });

    check("a prompt that does not fit the context ends with context-length", async (context) => {
      const { recorder, promptTokenIds, info } = context;
      const record = await recorder.run(aRequest(promptTokenIds(info.contextLength + 1)));
      assert.equal(record.finish, "error");
      assert.equal(record.error?.reason, "context-length");
      assert.equal((await recorder.run(aRequest(promptTokenIds(4)))).finish, "length");
    });

    check("logprobs come one per token, best first, and name the greedy token", async (context) => {
      const { recorder, promptTokenIds } = context;
      const request = aRequest(promptTokenIds(12), { stop: { maxTokens: 5 }, output: { topLogprobs: 4 } });
      if (refuses(context, "logprobs") || refuses(context, "alternatives")) return checkRefused(context, request);
      const { tokens, logprobs } = await recorder.run(request);
      assert.equal(logprobs.length, tokens.length);
      logprobs.forEach(({ logprob, topIds, topLogprobs }, i) => {
        assert.ok(logprob <= 0 && Number.isFinite(logprob));
        assert.equal(topIds.length, 4);
        assert.equal(topIds[0], tokens[i]);
        assert.equal(topLogprobs[0], logprob);
        assert.deepEqual(
          topLogprobs,
          topLogprobs.toSorted((a, b) => b - a),
        );
        assert.equal(new Set(topIds).size, 4);
      });
    });

    check("logprobs without alternatives have none", async (context) => {
      const { recorder, promptTokenIds } = context;
      const request = aRequest(promptTokenIds(12), { stop: { maxTokens: 3 }, output: { topLogprobs: 0 } });
      if (refuses(context, "logprobs")) return checkRefused(context, request);
      const { logprobs } = await recorder.run(request);
      assert.deepEqual(
        logprobs.map(({ topIds }) => topIds.length),
        [0, 0, 0],
      );
    });

    check("prompt logprobs come for every token but the first, without the cache", async (context) => {
      const { recorder, promptTokenIds, info } = context;
      const prompt = promptTokenIds(2 * info.blockSizeTokens + 3);
      await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      const output = { topLogprobs: 2, promptLogprobs: true };
      const request = aRequest(prompt, { stop: { maxTokens: 2 }, output });
      if (refuses(context, "prompt-logprobs")) return checkRefused(context, request);
      const record = await recorder.run(request);
      assert.equal(record.promptLogprobs?.length, prompt.length - 1);
      assert.ok(record.promptLogprobs.every(({ logprob, topIds }) => logprob <= 0 && topIds.length === 2));
      assert.equal(record.first?.cachedTokens, 0);
    });

    check("the same seed gives the same tokens", async (context) => {
      const { recorder, promptTokenIds } = context;
      const request = aRequest(promptTokenIds(12), { sampling: { temperature: 1, seed: 7 } });
      const first = await recorder.run(request);
      await clear(context);
      const second = await recorder.run(aRequest(promptTokenIds(12), { sampling: { temperature: 1, seed: 7 } }));
      assert.deepEqual(second.tokens, first.tokens);
    });

    for (const [title, sampling] of [
      ["greedy", {}],
      ["seeded", { temperature: 1, seed: 7 }],
      ["penalised", { presencePenalty: 1.5, frequencyPenalty: 1, repetitionPenalty: 1.2 }],
    ] as const) {
      check(`${title}: an answer that is resumed anywhere is the whole one, to its last token`, async (context) => {
        const { recorder, promptTokenIds, resumesExactly } = context;
        if (resumesExactly?.includes(title) === false) return context.skip("the engine says that it cannot");
        const prompt = promptTokenIds(11);
        const stop = { maxTokens: 12, minTokens: 6 };
        const hasLogprobs = !refuses(context, "logprobs");
        const output = { topLogprobs: hasLogprobs ? (refuses(context, "alternatives") ? 0 : 1) : -1 };
        const whole = await recorder.run(aRequest(prompt, { sampling, stop, output }));
        for (const resumedTokens of [1, 5, 11]) {
          const tokenIds = Uint32Array.from([...prompt, ...whole.tokens.slice(0, resumedTokens)]);
          const rest = await recorder.run(aRequest(tokenIds, { sampling, stop, output, resumedTokens }));
          assert.deepEqual(rest.tokens, whole.tokens.slice(resumedTokens), `after ${resumedTokens}`);
          assert.equal(rest.logprobs.length, hasLogprobs ? rest.tokens.length : 0);
          assert.equal(rest.first?.promptTokens, prompt.length);
          assert.equal(rest.finish, whole.finish);
        }
      });
    }

    check("a resumed answer counts against the whole context", async ({ recorder, promptTokenIds, info }) => {
      const resumedTokens = 3;
      const tokenIds = promptTokenIds(info.contextLength - 2);
      const stop = { maxTokens: info.contextLength };
      const record = await recorder.run(aRequest(tokenIds, { stop, resumedTokens }));
      assert.deepEqual([record.tokens.length, record.finish], [2, "length"]);
      assert.equal(record.first?.promptTokens, tokenIds.length - resumedTokens);
    });

    check("a repeated prompt comes from the cache in whole blocks, all but its end", async (context) => {
      const { recorder, promptTokenIds, info } = context;
      const prompt = promptTokenIds(4 * info.blockSizeTokens);
      const cold = await recorder.run(aRequest(prompt, { stop: { maxTokens: 2 } }));
      const warm = await recorder.run(aRequest(prompt, { stop: { maxTokens: 2 } }));
      assert.equal(cold.first?.cachedTokens, 0);
      const cached = warm.first?.cachedTokens ?? 0;
      const found =
        context.reusesPartsOfBlocks === true
          ? Math.floor(cached / info.blockSizeTokens)
          : cached / info.blockSizeTokens;
      assert.equal(found, 3, `${cached} tokens: the last one is always computed`);
    });

    check("a cache namespace shares nothing with others", async (context) => {
      const { recorder, promptTokenIds, info } = context;
      const prompt = promptTokenIds(2 * info.blockSizeTokens + 1);
      if (refuses(context, "namespaces")) return checkRefused(context, aRequest(prompt, { cacheNamespace: "one" }));
      await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 }, cacheNamespace: "one" }));
      const other = await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 }, cacheNamespace: "two" }));
      const same = await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 }, cacheNamespace: "one" }));
      assert.equal(other.first?.cachedTokens, 0);
      assert.equal(same.first?.cachedTokens, 2 * info.blockSizeTokens);
    });

    check("KV events name the prompt's blocks with the public hashes", async ({ recorder, promptTokenIds, info }) => {
      const prompt = promptTokenIds(3 * info.blockSizeTokens + 2);
      await recorder.run(aRequest(prompt, { stop: { maxTokens: 2 } }));
      const { sequenceHashes, localHashes } = hashBlocks(prompt, info.blockSizeTokens, blockHashSeed());
      // Engines that are processes of their own tell on another connection than the one the tokens come by.
      const told = () => sinceCleared(recorder.kvEvents).filter((event) => event.type === "stored");
      await recorder.until(() => told().flatMap((event) => [...event.sequenceHashes]).length >= 6, "three blocks");
      const stored = told();
      assert.deepEqual(stored.flatMap((event) => [...event.sequenceHashes]).slice(0, 6), [...sequenceHashes]);
      assert.deepEqual(stored.flatMap((event) => [...event.localHashes]).slice(0, 6), [...localHashes]);
    });

    check("KV events stay true over shared prefixes, aborts and clearing", async (context) => {
      const { recorder, engine, promptTokenIds, info } = context;
      const block = info.blockSizeTokens;
      const long = promptTokenIds(4 * block);
      for (let round = 0; round < 3; round++) {
        const streamIds = [4, 2, 3, 1].map((blocks) => recorder.submit(aRequest(long.subarray(0, blocks * block))));
        const forked = long.slice();
        forked[2 * block] = forked[2 * block]! ^ (round + 1);
        streamIds.push(recorder.submit(aRequest(forked)), recorder.submit(aRequest(long)));
        recorder.abort(streamIds[round]!);
        await recorder.ended(streamIds);
        if (round === 1) await clear(context);
        replayKvEvents(recorder.kvEvents);
      }
      const cached = replayKvEvents(recorder.kvEvents).size;
      const load = engine.load();
      assert.equal(cached, load.activeBlocks + load.cachedBlocks);
    });

    check("clearing drops every block that no stream uses", async (context) => {
      const { recorder, engine, promptTokenIds, info } = context;
      if (refuses(context, "clearing")) return clear(context);
      const prompt = promptTokenIds(3 * info.blockSizeTokens);
      await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      await recorder.until(() => replayKvEvents(recorder.kvEvents).size >= 3, "the prompt's blocks");
      const cached = replayKvEvents(recorder.kvEvents).size;
      assert.equal(await engine.clearBlocks(), cached);
      assert.equal(replayKvEvents(recorder.kvEvents).size, 0);
      const cold = await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      assert.equal(cold.first?.cachedTokens, 0);
    });

    check("a full queue refuses with worker-full and keeps what it has", async (context) => {
      const { recorder, promptTokenIds, info, maxWaitingRequests } = context;
      if (maxWaitingRequests === undefined) return context.skip("the engine states no bound of its queue");
      const fitting = info.maxSequences + maxWaitingRequests;
      const streamIds: number[] = [];
      for (let i = 0; i < fitting + 3; i++) {
        streamIds.push(recorder.submit(aRequest(promptTokenIds(2), { stop: { maxTokens: 1 } })));
      }
      await recorder.ended(streamIds);
      const reasons = streamIds.map((id) => recorder.record(id).error?.reason);
      assert.deepEqual(reasons.slice(-3), ["worker-full", "worker-full", "worker-full"]);
      assert.ok(reasons.slice(0, fitting).every((reason) => reason === undefined));
    });

    check("draining refuses new streams, finishes the others and resolves then", async (context) => {
      const { recorder, promptTokenIds } = context;
      const running = recorder.submit(aRequest(promptTokenIds(6), { stop: { maxTokens: 10 } }));
      let isDrained = false;
      const drained = recorder.drain().then(() => {
        isDrained = true;
      });
      const late = recorder.submit(aRequest(promptTokenIds(6)));
      await recorder.ended([late]);
      assert.equal(recorder.record(late).error?.reason, "draining");
      await recorder.until(() => recorder.record(running).finish !== undefined || isDrained, "the end");
      await drained;
      assert.equal(recorder.record(running).finish, "length");
      await recorder.drain();
    });

    check("stop ends running and waiting streams with engine-stopped", async (context) => {
      const { recorder, promptTokenIds, info } = context;
      const streamIds: number[] = [];
      for (let i = 0; i < info.maxSequences + 2; i++) {
        streamIds.push(recorder.submit(aRequest(promptTokenIds(4), { stop: { maxTokens: info.contextLength } })));
      }
      await recorder.until(() => recorder.record(streamIds[0]!).tokens.length > 0, "a token");
      await Promise.all([recorder.stop(), recorder.stop()]);
      for (const id of streamIds) assert.equal(recorder.record(id).error?.reason, "engine-stopped");
      await recorder.stop();
      const load = recorder.engine.load();
      assert.deepEqual([load.runningRequests, load.waitingRequests], [0, 0]);
    });

    check("after stop the engine tells nothing any more", async ({ recorder, engine, promptTokenIds }) => {
      await recorder.stop();
      // It may refuse aloud; it may not answer.
      try {
        engine.submit(1, aRequest(promptTokenIds(3)));
      } catch (error) {
        assert.ok(error instanceof DynamoError);
      }
      engine.abort(1);
      await engine.drain();
      await loopTurns(5);
      assert.equal(recorder.stepCount, 0);
    });

    void test("stop works without a start", async () => {
      const { engine } = await make();
      await engine.stop();
      await engine.stop();
    });

    void test("a start that is cancelled fails, and stop works after it", async () => {
      const { engine } = await make();
      const recorder = new EngineRecorder(engine);
      await assert.rejects(recorder.start(AbortSignal.abort()));
      await recorder.stop();
      await loopTurns(3);
      recorder.check();
    });

    check(
      "blocks that are followed come in order, before the token behind them, and no more after the end",
      async (context) => {
        const { recorder, engine, promptTokenIds, info } = context;
        if (engine.followBlocks === undefined) return;
        const prompt = promptTokenIds(3 * info.blockSizeTokens + 1);
        const { sequenceHashes } = hashBlocks(prompt, info.blockSizeTokens, blockHashSeed());
        const followed: Uint8Array[] = [];
        const unfollow = engine.followBlocks(sequenceHashes, (data) => followed.push(data));
        let ended = 0;
        const other = engine.followBlocks(sequenceHashes, () => ended++);
        other();
        const id = recorder.submit(aRequest(prompt, { stop: { maxTokens: 1 } }));
        await recorder.ended([id]);
        const data = Buffer.concat(followed);
        const exported = await engine.exportBlocks(sequenceHashes);
        assert.ok(data.equals(exported.data), "what came is what is there");
        assert.equal(ended, 0);
        unfollow();
        unfollow();
        // Of a chain that is there already, all at once; and from its middle.
        const again = Promise.withResolvers<Uint8Array>();
        const stop = engine.followBlocks(sequenceHashes, (blocks) => again.resolve(blocks));
        assert.ok(Buffer.from(await again.promise).equals(exported.data));
        stop();
        const rest = await engine.exportBlocks(sequenceHashes.subarray(2));
        assert.ok(Buffer.from(rest.data).equals(exported.data.subarray(exported.blockBytes)));
        await recorder.run(aRequest(promptTokenIds(2 * info.blockSizeTokens), { stop: { maxTokens: 1 } }));
        assert.equal(Buffer.concat(followed).length, exported.data.length);
      },
    );

    check("blocks can be exported, cleared and imported, or are refused", async (context) => {
      const { recorder, engine, promptTokenIds, info, supportsExport } = context;
      const prompt = promptTokenIds(3 * info.blockSizeTokens + 1);
      const { sequenceHashes } = hashBlocks(prompt, info.blockSizeTokens, blockHashSeed());
      await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      if (!supportsExport) {
        assert.equal(info.blockBytes, 0);
        const isRefusal = (error: unknown): boolean =>
          error instanceof DynamoError && error.reason === "unsupported-operation";
        await assert.rejects(engine.exportBlocks(sequenceHashes), isRefusal);
        const blocks = { sequenceHashes, blockBytes: 0, data: new Uint8Array(0), tokenIds: prompt };
        await assert.rejects(engine.importBlocks(blocks), isRefusal);
        return;
      }
      const exported = await engine.exportBlocks(sequenceHashes);
      assert.deepEqual(exported.sequenceHashes, sequenceHashes);
      assert.equal(exported.data.length, 3 * exported.blockBytes);
      await engine.clearBlocks();
      assert.equal((await engine.exportBlocks(sequenceHashes)).sequenceHashes.length, 0);
      const tokenIds = prompt.subarray(0, 3 * info.blockSizeTokens);
      assert.equal(await engine.importBlocks({ ...exported, tokenIds }), 3);
      const warm = await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      assert.equal(warm.first?.cachedTokens, 3 * info.blockSizeTokens);
      replayKvEvents(recorder.kvEvents);
    });
  });
}

function refuses(
  { refuses: list = [] }: EngineUnderTest,
  what: NonNullable<EngineUnderTest["refuses"]>[number],
): boolean {
  return list.includes(what);
}

async function checkRefused({ recorder }: Context, request: PreprocessedRequest): Promise<void> {
  const { error, tokens } = await recorder.run(request);
  assert.equal(error?.reason, "unsupported-operation");
  assert.deepEqual(tokens, []);
}

/** Where it can be cleared at all. */
async function clear(context: Context): Promise<void> {
  if (!refuses(context, "clearing")) return void (await context.engine.clearBlocks());
  await assert.rejects(context.engine.clearBlocks(), { reason: "unsupported-operation" });
}

/** A server that ran before may tell of its past first. */
function sinceCleared(events: readonly KvEvent[]): readonly KvEvent[] {
  return events.slice(events.findLastIndex(({ type }) => type === "cleared") + 1);
}

/** Lets what is already scheduled on the loop happen. */
async function loopTurns(count: number): Promise<void> {
  for (let i = 0; i < count; i++) await new Promise<void>((resolve) => setImmediate(resolve));
}
