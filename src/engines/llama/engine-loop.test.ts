import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import {
  EngineOutput,
  GREEDY,
  decodeEngineOutput,
  forEachStepEntry,
  type KvEvent,
  type PreprocessedRequest,
  type TokenLogprob,
} from "../../protocol/index.ts";
import { ManualClock, SeededRandom } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import { EngineLoop, type EngineLoopOptions } from "./engine-loop.ts";
import { FakeModel } from "./fake-model.ts";

const BLOCK = 4;

interface Overrides {
  maxTokens?: number;
  minTokens?: number;
  stopTokenIds?: number[];
  priority?: number;
  promptLogprobs?: boolean;
  topLogprobs?: number;
  cacheNamespace?: string;
}

function aRequest(tokenIds: readonly number[], overrides: Overrides = {}): PreprocessedRequest {
  return {
    requestId: "r",
    model: "m",
    tokenIds: Uint32Array.from(tokenIds),
    sampling: GREEDY,
    stop: {
      maxTokens: overrides.maxTokens ?? 8,
      minTokens: overrides.minTokens ?? 0,
      stopTokenIds: overrides.stopTokenIds ?? [],
      ignoreEos: false,
    },
    output: { topLogprobs: overrides.topLogprobs ?? -1, promptLogprobs: overrides.promptLogprobs ?? false },
    priority: overrides.priority ?? 0,
    cacheNamespace: overrides.cacheNamespace ?? "",
  };
}

interface Ended {
  tokens: number[];
  finish: string | undefined;
  reason: string | undefined;
  promptTokens: number;
  cachedTokens: number;
  promptLogprobs: TokenLogprob[];
  logprobs: TokenLogprob[];
}

/** An engine loop over the fake model, with everything that it reported. */
class Harness {
  readonly clock = new ManualClock();
  readonly model: FakeModel;
  readonly loop: EngineLoop;
  readonly streams = new Map<number, Ended>();
  /** Hashes that the events say are in the cache. */
  readonly announced = new Set<string>();
  readonly order: number[] = [];
  readonly #maxSequences: number;

  constructor(overrides: Partial<EngineLoopOptions> = {}) {
    const options: EngineLoopOptions = {
      contextLength: 64,
      totalBlocks: 64,
      spareBlocks: 2,
      keepsOrder: true,
      blockSizeTokens: BLOCK,
      maxSequences: 4,
      maxBatchedTokens: 16,
      maxWaitingRequests: 100,
      sequenceIds: 24,
      extraLogitRows: 5,
      clock: this.clock,
      random: new SeededRandom(1),
      ...overrides,
    };
    const { totalBlocks, spareBlocks, blockSizeTokens, maxBatchedTokens, sequenceIds } = options;
    this.model = new FakeModel({ cells: (totalBlocks + spareBlocks) * blockSizeTokens, maxBatchedTokens, sequenceIds });
    this.loop = new EngineLoop(this.model, options);
    this.#maxSequences = options.maxSequences;
    this.model.decodedTokens = 0;
  }

  submit(id: number, request: PreprocessedRequest): void {
    this.streams.set(id, {
      tokens: [],
      finish: undefined,
      reason: undefined,
      promptTokens: -1,
      cachedTokens: -1,
      promptLogprobs: [],
      logprobs: [],
    });
    this.loop.submit(id, request);
  }

  step(): void {
    this.clock.advance(1);
    this.loop.step();
    this.collect();
    for (let id = 0; id < this.#maxSequences; id++) assert(this.model.isOrdered(id), "cells lie in order");
  }

  collect(): void {
    for (const event of this.loop.takeEvents()) this.#apply(event);
    const step = this.loop.takeStep();
    if (step === undefined) return;
    const output = new EngineOutput();
    forEachStepEntry(step, (id, start, end) => {
      decodeEngineOutput(step, start, end, output);
      const stream = this.streams.get(id)!;
      assert.equal(stream.finish, undefined, "nothing follows a stream's end");
      stream.tokens.push(...output.tokenIds.subarray(0, output.tokenCount));
      stream.finish = output.finish;
      stream.reason = output.error?.reason;
      stream.logprobs.push(...(output.logprobs ?? []));
      if (output.promptLogprobs !== undefined) stream.promptLogprobs = output.promptLogprobs;
      if (output.finish !== undefined) this.order.push(id);
      if (!output.hasFirst) return;
      stream.promptTokens = output.promptTokens;
      stream.cachedTokens = output.cachedTokens;
    });
  }

  #apply(event: KvEvent): void {
    assert(event.type !== "cleared");
    for (let i = 0; i < event.sequenceHashes.length; i += 2) {
      const key = hashKey(event.sequenceHashes, i / 2);
      if (event.type === "stored") {
        assert(!this.announced.has(key), "a block is announced once");
        this.announced.add(key);
      } else {
        assert(this.announced.delete(key), "a block that is removed was announced");
      }
    }
    if (event.type !== "stored" || event.parentHash === undefined) return;
    assert(this.announced.has(`${event.parentHash[0]}:${event.parentHash[1]}`), "a parent is announced before");
  }

  run(maxSteps = 2000): void {
    let steps = 0;
    for (; this.loop.hasWork; steps++) {
      assert(steps < maxSteps, "the engine comes to an end");
      this.step();
    }
    this.collect();
  }

  /** What must hold when nothing runs. */
  checkIdle(): void {
    const load = this.loop.load();
    assert.equal(load.activeBlocks, 0);
    assert.equal(load.runningRequests + load.waitingRequests, 0);
    assert.equal(load.pendingPrefillTokens, 0);
    assert.equal(load.cachedBlocks, this.announced.size, "the events tell what is cached");
    assert.equal(this.model.usedCells, load.cachedBlocks * BLOCK, "no cell is lost and none is used twice");
  }
}

function hashKey(hashes: Uint32Array, block: number): string {
  return `${hashes[2 * block]}:${hashes[2 * block + 1]}`;
}

function range(count: number, first = 1): number[] {
  return Array.from({ length: count }, (_, i) => (first + i) % 64);
}

test("engine loop: a prompt is continued as the model would without a cache", () => {
  const harness = new Harness();
  harness.submit(1, aRequest(range(10), { maxTokens: 7 }));
  harness.run();
  const stream = harness.streams.get(1)!;
  assert.deepEqual(stream.tokens, FakeModel.continuation(range(10), 7));
  assert.equal(stream.finish, "length");
  assert.equal(stream.promptTokens, 10);
  assert.equal(stream.cachedTokens, 0);
  harness.checkIdle();
});

test("engine loop: the second time all full blocks but the last token's come from the cache", () => {
  const harness = new Harness();
  harness.submit(1, aRequest(range(12)));
  harness.run();
  harness.model.decodedTokens = 0;
  harness.submit(2, aRequest(range(12), { maxTokens: 1 }));
  harness.run();
  // 12 tokens are 3 blocks, but the last token is computed again for its logits.
  assert.equal(harness.streams.get(2)!.cachedTokens, 8);
  assert.equal(harness.model.decodedTokens, 4);
  assert.deepEqual(harness.streams.get(2)!.tokens, FakeModel.continuation(range(12), 1));
  harness.checkIdle();
});

test("engine loop: generated blocks are found by the next turn of a conversation", () => {
  const harness = new Harness();
  harness.submit(1, aRequest(range(6), { maxTokens: 10 }));
  harness.run();
  const turn = [...range(6), ...harness.streams.get(1)!.tokens, 60, 61];
  harness.submit(2, aRequest(turn, { maxTokens: 3 }));
  harness.run();
  // 6 + 10 tokens, of which the last was sampled but never computed: 3 full blocks.
  assert.equal(harness.streams.get(2)!.cachedTokens, 12);
  assert.deepEqual(harness.streams.get(2)!.tokens, FakeModel.continuation(turn, 3));
});

test("engine loop: another cache namespace shares nothing", () => {
  const harness = new Harness();
  harness.submit(1, aRequest(range(12)));
  harness.run();
  harness.submit(2, aRequest(range(12), { cacheNamespace: "tenant" }));
  harness.run();
  assert.equal(harness.streams.get(2)!.cachedTokens, 0);
});

test("engine loop: identical prompts that come together compute their prefix once", () => {
  const harness = new Harness();
  for (let id = 0; id < 4; id++) harness.submit(id, aRequest(range(40), { maxTokens: 5 }));
  harness.run();
  const expected = FakeModel.continuation(range(40), 5);
  for (const stream of harness.streams.values()) assert.deepEqual(stream.tokens, expected);
  assert.deepEqual(
    [0, 1, 2, 3].map((id) => harness.streams.get(id)!.cachedTokens),
    [0, 36, 36, 36],
  );
  // 40 once, then 3 x the last block, then 4 x 4 decodes.
  assert.equal(harness.model.decodedTokens, 40 + 3 * 4 + 4 * 4);
  harness.checkIdle();
});

test("engine loop: a long prefill comes in chunks beside decodes that go on", () => {
  const harness = new Harness({ contextLength: 128 });
  harness.submit(1, aRequest(range(3), { maxTokens: 20 }));
  harness.step();
  harness.submit(2, aRequest(range(60, 5), { maxTokens: 2 }));
  for (let i = 0; i < 4; i++) harness.step();
  // 15 + 15 + 15 + 15 tokens of prefill, each step with one token for the other stream.
  assert.equal(harness.streams.get(1)!.tokens.length, 5);
  assert.equal(harness.streams.get(2)!.tokens.length, 1);
  assert.equal(harness.model.largestBatch, 16);
  harness.run();
  assert.deepEqual(harness.streams.get(2)!.tokens, FakeModel.continuation(range(60, 5), 2));
});

test("engine loop: a stop token ends the stream and is not among its tokens", () => {
  const harness = new Harness();
  const expected = FakeModel.continuation(range(10), 8);
  const stop = expected[4]!;
  const first = expected.indexOf(stop);
  harness.submit(1, aRequest(range(10), { stopTokenIds: [stop] }));
  harness.run();
  assert.deepEqual(harness.streams.get(1)!.tokens, expected.slice(0, first));
  assert.equal(harness.streams.get(1)!.finish, "stop");
});

test("engine loop: before minTokens no stop token is sampled", () => {
  const harness = new Harness();
  const [first] = FakeModel.continuation(range(10), 1);
  harness.submit(1, aRequest(range(10), { stopTokenIds: [first!], minTokens: 3, maxTokens: 3 }));
  harness.run();
  const { tokens, finish } = harness.streams.get(1)!;
  assert.equal(tokens.length, 3);
  assert(!tokens.includes(first!));
  assert.equal(finish, "length");
});

test("engine loop: what cannot run ends with its reason", () => {
  const harness = new Harness({ contextLength: 32, maxWaitingRequests: 2, maxSequences: 1, maxBatchedTokens: 8 });
  harness.submit(1, aRequest([]));
  harness.submit(2, aRequest([3, 64]));
  harness.submit(3, aRequest(range(32)));
  harness.submit(4, aRequest(range(3), { maxTokens: 0 }));
  for (let id = 5; id < 9; id++) harness.submit(id, aRequest(range(4, id)));
  harness.collect();
  assert.deepEqual(
    [1, 2, 3, 4, 5, 7, 8].map((id) => harness.streams.get(id)!.reason),
    ["invalid-field", "invalid-field", "context-length", "invalid-field", undefined, undefined, "worker-full"],
  );
  harness.run();
  assert.equal(harness.streams.get(7)!.finish, "length");
});

test("engine loop: the context's end finishes a stream with length", () => {
  const harness = new Harness({ contextLength: 32 });
  harness.submit(1, aRequest(range(20), { maxTokens: 1000 }));
  harness.run();
  assert.equal(harness.streams.get(1)!.tokens.length, 12);
  assert.equal(harness.streams.get(1)!.finish, "length");
});

test("engine loop: a sequence that alone exceeds the cache ends with context-length, others go on", () => {
  const harness = new Harness({ contextLength: 64, totalBlocks: 6 });
  harness.submit(1, aRequest(range(30), { maxTokens: 2 }));
  harness.submit(2, aRequest(range(8, 9), { maxTokens: 40 }));
  harness.submit(3, aRequest(range(8, 20), { maxTokens: 4 }));
  harness.run();
  assert.equal(harness.streams.get(1)!.reason, "context-length");
  assert.equal(harness.streams.get(2)!.reason, "context-length");
  assert.deepEqual(harness.streams.get(3)!.tokens, FakeModel.continuation(range(8, 20), 4));
  harness.checkIdle();
});

test("engine loop: with a cache too small for all, sequences are preempted and every text is right", () => {
  const harness = new Harness({ contextLength: 48, totalBlocks: 12 });
  for (let id = 0; id < 8; id++) harness.submit(id, aRequest(range(9, id * 7), { maxTokens: 30 }));
  harness.run();
  assert(harness.loop.load().preemptions > 0);
  for (let id = 0; id < 8; id++) {
    assert.deepEqual(harness.streams.get(id)!.tokens, FakeModel.continuation(range(9, id * 7), 30), `stream ${id}`);
  }
  harness.checkIdle();
});

test("engine loop: an abort takes effect before the next step, waiting, in prefill and in decode", () => {
  const harness = new Harness({ maxSequences: 2, contextLength: 128 });
  harness.submit(1, aRequest(range(50)));
  harness.submit(2, aRequest(range(2, 30), { maxTokens: 50 }));
  harness.submit(3, aRequest(range(5, 40)));
  harness.step();
  for (const id of [1, 2, 3]) harness.loop.abort(id);
  harness.loop.abort(99);
  harness.collect();
  for (const id of [1, 2, 3]) assert.equal(harness.streams.get(id)!.finish, "cancelled");
  assert.equal(harness.loop.hasWork, false);
  harness.checkIdle();
});

test("engine loop: higher priority starts first, then arrival decides", () => {
  const harness = new Harness({ maxSequences: 1, maxBatchedTokens: 16 });
  [0, 5, 0, 5, -1].forEach((priority, id) =>
    harness.submit(id, aRequest(range(4, id * 9), { priority, maxTokens: 1 })),
  );
  harness.run();
  assert.deepEqual(harness.order, [1, 3, 0, 2, 4]);
});

test("engine loop: prompt logprobs cover every prompt token but the first, and skip the cache", () => {
  const harness = new Harness();
  harness.submit(1, aRequest(range(20)));
  harness.run();
  harness.submit(2, aRequest(range(20), { promptLogprobs: true, topLogprobs: 2, maxTokens: 3 }));
  harness.run();
  const stream = harness.streams.get(2)!;
  assert.equal(stream.cachedTokens, 0);
  assert.equal(stream.promptLogprobs.length, 19);
  assert.equal(stream.logprobs.length, 3);
  // The first record judges token 1 after token 0: its best alternative is the model's choice there.
  assert.deepEqual(
    stream.promptLogprobs.map((record) => record.topIds[0]),
    range(19).map((_, i) => FakeModel.continuation(range(i + 1), 1)[0]),
  );
  assert.deepEqual(stream.tokens, FakeModel.continuation(range(20), 3));
  harness.checkIdle();
});

test("engine loop: prompt logprobs survive a preemption in the middle of the prompt", () => {
  const harness = new Harness({ totalBlocks: 12, contextLength: 48, extraLogitRows: 2 });
  harness.submit(1, aRequest(range(4, 50), { maxTokens: 40 }));
  harness.submit(2, aRequest(range(3, 9), { maxTokens: 30 }));
  harness.step();
  harness.submit(3, aRequest(range(26), { promptLogprobs: true, topLogprobs: 1, maxTokens: 2 }));
  harness.run();
  assert(harness.loop.load().preemptions > 0);
  assert.deepEqual(
    harness.streams.get(3)!.promptLogprobs.map((record) => record.topIds[0]),
    range(25).map((_, i) => FakeModel.continuation(range(i + 1), 1)[0]),
  );
});

test("engine loop: prompts that do not fit together run one after the other, without preemption", () => {
  const harness = new Harness({ totalBlocks: 12, contextLength: 48 });
  // The first computes a few tokens a step, so that its blocks are promised long before they are taken.
  harness.submit(0, aRequest(range(32), { maxTokens: 4, promptLogprobs: true }));
  for (let id = 1; id < 3; id++) harness.submit(id, aRequest(range(32, id * 11), { maxTokens: 4 }));
  harness.run();
  assert.equal(harness.loop.load().preemptions, 0);
  assert.deepEqual(harness.order, [0, 1, 2]);
  harness.checkIdle();
});

test("engine loop: a sequence leaves room for the next block of those that run", () => {
  const harness = new Harness({ totalBlocks: 12, contextLength: 48 });
  harness.submit(1, aRequest(range(2), { maxTokens: 12 }));
  harness.step();
  // Its 11 blocks and the one in use are all there are, but the first stream is about to need one more.
  harness.submit(2, aRequest(range(42, 5), { maxTokens: 2 }));
  harness.run();
  assert.equal(harness.loop.load().preemptions, 0);
  assert.deepEqual(harness.order, [1, 2]);
});

test("engine loop: exported blocks continue in another engine as if computed there", () => {
  const source = new Harness();
  source.submit(1, aRequest(range(23)));
  source.run();
  const { sequenceHashes } = hashBlocks(Uint32Array.from(range(23)), BLOCK, blockHashSeed());
  const exported = source.loop.exportBlocks(sequenceHashes);
  assert.deepEqual(exported.sequenceHashes, sequenceHashes);
  const target = new Harness();
  const blocks = { ...exported, tokenIds: Uint32Array.from(range(20)) };
  assert.equal(target.loop.importBlocks(blocks), 5);
  assert.equal(target.loop.importBlocks(blocks), 0);
  target.collect();
  target.checkIdle();
  target.submit(1, aRequest(range(23)));
  target.run();
  assert.equal(target.streams.get(1)!.cachedTokens, 20);
  assert.deepEqual(target.streams.get(1)!.tokens, source.streams.get(1)!.tokens);
});

test("engine loop: blocks that do not fit their hash, size or place are refused and leave nothing", () => {
  const source = new Harness();
  source.submit(1, aRequest(range(9)));
  source.run();
  const tokenIds = Uint32Array.from(range(8));
  const { sequenceHashes } = hashBlocks(tokenIds, BLOCK, blockHashSeed());
  const exported = source.loop.exportBlocks(sequenceHashes);
  const target = new Harness();
  const refused = (blocks: object): void => {
    assert.throws(() => target.loop.importBlocks({ ...exported, tokenIds, ...blocks }), { reason: "invalid-field" });
  };
  refused({ tokenIds: Uint32Array.from(range(8, 2)) });
  refused({ tokenIds: Uint32Array.from(range(9)) });
  refused({ data: exported.data.subarray(1) });
  refused({ blockBytes: 5 });
  refused({ cacheNamespace: "tenant" });
  // The right hash with the bytes of the other block: the position gives it away.
  const swapped = new Uint8Array(exported.data.length);
  swapped.set(exported.data.subarray(exported.blockBytes), 0);
  swapped.set(exported.data.subarray(0, exported.blockBytes), exported.blockBytes);
  assert.equal(target.loop.importBlocks({ ...exported, tokenIds, data: swapped }), 0);
  target.collect();
  target.checkIdle();
  assert.equal(target.model.usedCells, 0);
});

test("engine loop: clearing drops what no stream uses and says so", () => {
  const harness = new Harness();
  harness.submit(1, aRequest(range(12), { maxTokens: 1 }));
  harness.run();
  harness.submit(2, aRequest(range(8), { maxTokens: 9 }));
  harness.step();
  // The first stream's third block; the second stream holds the other two.
  assert.equal(harness.loop.clearBlocks(), 1);
  harness.run();
  assert.deepEqual(harness.streams.get(2)!.tokens, FakeModel.continuation(range(8), 9));
  harness.checkIdle();
  assert.equal(harness.loop.clearBlocks(), 4);
  harness.collect();
  assert.equal(harness.announced.size, 0);
  harness.checkIdle();
});

test("engine loop: any mix of requests, aborts and cache sizes gives every stream its text and loses no block", () => {
  const aPrompt = fc.record({
    // Few distinct parts, so that prefixes are shared, forked and evicted.
    parts: fc.array(fc.constantFrom(0, 1, 2), { minLength: 0, maxLength: 5 }),
    tail: fc.integer({ min: 1, max: 6 }),
    tailFirst: fc.integer({ min: 0, max: 3 }),
    maxTokens: fc.integer({ min: 1, max: 25 }),
    priority: fc.constantFrom(0, 0, 0, 1),
    promptLogprobs: fc.constantFrom(false, false, false, true),
    afterSteps: fc.integer({ min: 0, max: 4 }),
    abortAfter: fc.option(fc.integer({ min: 0, max: 10 }), { nil: undefined, freq: 4 }),
  });
  const scenario = fc.record({
    requests: fc.array(aPrompt, { minLength: 1, maxLength: 14 }),
    totalBlocks: fc.integer({ min: 12, max: 40 }),
    maxSequences: fc.integer({ min: 1, max: 6 }),
    maxBatchedTokens: fc.integer({ min: 6, max: 40 }),
    spareHolders: fc.integer({ min: 0, max: 3 }),
  });
  fc.assert(
    fc.property(scenario, ({ requests, totalBlocks, maxSequences, maxBatchedTokens, spareHolders }) => {
      const sequenceIds = 2 * (maxSequences + 1) + spareHolders;
      const harness = new Harness({ contextLength: 48, totalBlocks, maxSequences, maxBatchedTokens, sequenceIds });
      const aborts = new Map<number, number>();
      const prompts: number[][] = [];
      let step = 0;
      const stepOnce = (): void => {
        for (const [id, at] of aborts) if (at === step) harness.loop.abort(id);
        harness.step();
        step++;
        const { activeBlocks, cachedBlocks } = harness.loop.load();
        assert(activeBlocks + cachedBlocks <= totalBlocks);
        assert(harness.model.usedCells <= (activeBlocks + cachedBlocks) * BLOCK);
      };
      requests.forEach((request, id) => {
        const prompt = request.parts
          .flatMap((part) => range(BLOCK, part * 8))
          .concat(range(request.tail, request.tailFirst));
        prompts.push(prompt);
        harness.submit(id, aRequest(prompt, request));
        if (request.abortAfter !== undefined) aborts.set(id, step + request.abortAfter);
        for (let i = 0; i < request.afterSteps; i++) stepOnce();
      });
      for (let guard = 0; harness.loop.hasWork; guard++) {
        assert(guard < 5000, "the engine comes to an end");
        stepOnce();
      }
      harness.collect();
      for (const [id, stream] of harness.streams) {
        const prompt = prompts[id]!;
        const limit = Math.min(requests[id]!.maxTokens, 48 - prompt.length);
        const expected = FakeModel.continuation(prompt, limit);
        if (stream.finish === "cancelled") {
          assert.deepEqual(stream.tokens, expected.slice(0, stream.tokens.length));
        } else {
          assert.equal(stream.finish, "length");
          assert.deepEqual(stream.tokens, expected);
          if (requests[id]!.promptLogprobs) assert.equal(stream.promptLogprobs.length, prompt.length - 1);
        }
      }
      harness.checkIdle();
    }),
    { numRuns: 300 },
  );
});
