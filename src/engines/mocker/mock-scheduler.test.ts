import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { polynomialDecodeMs, polynomialPrefillMs, polynomialTiming } from "../../perf-model/index.ts";
import type { KvEvent } from "../../protocol/index.ts";
import { blockHashSeed } from "../../tokens/index.ts";
import { replayKvEvents } from "../engine.recorder.ts";
import {
  DEFAULT_SGLANG,
  DEFAULT_TRANSFER,
  MockScheduler,
  Sequence,
  TokenSource,
  type SchedulerConfig,
} from "./index.ts";
import type { SequenceEnd } from "./sequence.ts";

interface Overrides extends Partial<Omit<SchedulerConfig, "sglang" | "transfer">> {
  readonly sglang?: Partial<SchedulerConfig["sglang"]>;
  readonly transfer?: Partial<SchedulerConfig["transfer"]>;
}

function aConfig(overrides: Overrides = {}): SchedulerConfig {
  return {
    engineType: "vllm",
    dpRank: 0,
    role: "agg",
    contextLength: 8_192,
    blockSizeTokens: 4,
    totalBlocks: 4_096,
    maxSequences: 16,
    maxBatchedTokens: 8_192,
    prefixCaching: true,
    chunkedPrefill: true,
    preemptionMode: "lifo",
    watermark: 0,
    timing: polynomialTiming,
    ...overrides,
    transfer: { ...DEFAULT_TRANSFER, ...overrides.transfer },
    sglang: { ...DEFAULT_SGLANG, ...overrides.sglang },
  };
}

interface Outcome {
  readonly tokens: number[];
  readonly tokenMs: number[];
  end: SequenceEnd | undefined;
}

/** Drives a scheduler on virtual time and checks on the way what always holds. */
class Simulation {
  readonly scheduler: MockScheduler;
  readonly config: SchedulerConfig;
  readonly outcomes = new Map<number, Outcome>();
  readonly events: KvEvent[] = [];
  readonly passMs: number[] = [];
  nowMs = 0;

  constructor(overrides: Overrides = {}) {
    this.config = aConfig(overrides);
    this.scheduler = new MockScheduler(this.config);
  }

  submit(id: number, prompt: readonly number[], maxTokens: number, priority = 0): Sequence {
    const sequence = new Sequence({
      id,
      tokenIds: Uint32Array.from(prompt),
      maxTokens,
      priority,
      hashSeed: blockHashSeed(),
      blockSizeTokens: this.config.blockSizeTokens,
      vocabularySize: 256,
      arrivedMs: this.nowMs,
    });
    this.outcomes.set(id, { tokens: [], tokenMs: [], end: undefined });
    this.scheduler.submit(sequence);
    return sequence;
  }

  of(id: number): Outcome {
    return this.outcomes.get(id)!;
  }

  /** One pass, or the wait for a transfer; false when there is nothing to do. */
  step(): boolean {
    const durationMs = this.scheduler.beginPass(this.nowMs, this);
    this.#check();
    if (durationMs === undefined) {
      const wakeMs = this.scheduler.nextWakeMs();
      if (wakeMs === Infinity) return false;
      assert.ok(wakeMs >= this.nowMs);
      this.nowMs = wakeMs;
      return true;
    }
    assert.ok(durationMs >= 0);
    this.passMs.push(durationMs);
    this.nowMs += durationMs;
    this.scheduler.endPass(this.nowMs, this);
    this.#check();
    return true;
  }

  run(): void {
    for (let steps = 0; this.step(); steps++) assert.ok(steps < 100_000, "it comes to an end");
    assert.equal(this.scheduler.liveCount, 0, "nothing is stuck");
  }

  onOutput(sequence: Sequence, tokenId: number, end: SequenceEnd | undefined): void {
    const outcome = this.of(sequence.id);
    assert.equal(outcome.end, undefined, "nothing comes after the end");
    if (tokenId >= 0) {
      outcome.tokens.push(tokenId);
      outcome.tokenMs.push(this.nowMs);
    }
    outcome.end = end;
  }

  #check(): void {
    this.scheduler.check();
    this.events.push(...this.scheduler.takeKvEvents());
    const load = this.scheduler.load();
    assert.ok(load.activeBlocks + load.cachedBlocks <= load.totalBlocks);
    if (load.runningRequests > 0) return;
    assert.equal(load.activeBlocks, 0, "blocks are in use only while something runs");
    if (this.config.prefixCaching) assert.equal(replayKvEvents(this.events).size, load.cachedBlocks);
  }
}

const counting = (length: number, from = 0): number[] => Array.from({ length }, (_, i) => from + i);

function expectedAnswer(prompt: readonly number[], count: number): number[] {
  const source = new TokenSource(Uint32Array.from(prompt), { vocabularySize: 256, maxTokens: count });
  return counting(count).map(() => {
    const token = source.peek();
    source.absorb(token);
    return token;
  });
}

test("scheduler: one request takes the prefill of its prompt and then one decode step per token", () => {
  const simulation = new Simulation();
  simulation.submit(1, counting(1_000), 3);
  simulation.run();
  const usage = 251 / 4_096;
  // The block of the first generated token is the 251st.
  const expected = [polynomialPrefillMs(1_000), polynomialDecodeMs(usage), polynomialDecodeMs(usage)];
  assert.deepEqual(simulation.passMs, expected);
  assert.ok(Math.abs(simulation.passMs[0]! - 32.1) < 0.05);
  assert.deepEqual(simulation.of(1).tokens, expectedAnswer(counting(1_000), 3));
});

test("scheduler: a cached prefix is not computed again, all but the last token's block", () => {
  const simulation = new Simulation();
  simulation.submit(1, counting(1_000), 1);
  simulation.run();
  const again = simulation.submit(2, counting(1_000), 1);
  simulation.run();
  assert.equal(again.cachedTokens, 996);
  assert.equal(simulation.passMs[1], polynomialPrefillMs(4));
});

test("scheduler: a long prompt is computed in chunks of the budget while others go on decoding", () => {
  const simulation = new Simulation({ maxBatchedTokens: 100 });
  simulation.submit(1, counting(10), 50);
  simulation.step();
  simulation.submit(2, counting(300, 1_000), 1);
  for (let i = 0; i < 3; i++) simulation.step();
  assert.equal(simulation.of(2).tokens.length, 0);
  simulation.step();
  assert.equal(simulation.of(2).end, "length");
  assert.equal(simulation.of(1).tokens.length, 5, "one token in each pass");
});

test("scheduler: without chunking a prompt waits for a pass that takes it whole", () => {
  const simulation = new Simulation({ maxBatchedTokens: 100, chunkedPrefill: false });
  simulation.submit(1, counting(80), 2);
  simulation.submit(2, counting(60, 1_000), 1);
  simulation.submit(3, counting(200, 2_000), 1);
  simulation.step();
  assert.deepEqual([1, 2, 3].map((id) => simulation.of(id).tokens.length), [1, 0, 0]); // prettier-ignore
  simulation.run();
  // The third is larger than any budget and had a pass for itself.
  assert.deepEqual([1, 2, 3].map((id) => simulation.of(id).tokens.length), [2, 1, 1]); // prettier-ignore
});

test("scheduler: the newest gives way under LIFO, the oldest under FIFO, and both still get their answers", () => {
  for (const preemptionMode of ["lifo", "fifo"] as const) {
    const simulation = new Simulation({ totalBlocks: 10, contextLength: 40, preemptionMode });
    const sequences = [1, 2].map((id) => simulation.submit(id, counting(12, 100 * id), 20));
    simulation.run();
    const [first, second] = sequences.map(({ preemptions }) => preemptions) as [number, number];
    if (preemptionMode === "lifo") assert.deepEqual([first, second > 0], [0, true]);
    else assert.ok(first > 0);
    for (const id of [1, 2]) assert.deepEqual(simulation.of(id).tokens, expectedAnswer(counting(12, 100 * id), 20));
    assert.equal(simulation.scheduler.load().preemptions, first + second);
  }
});

test("scheduler: whoever makes another give way gets its token in the same pass", () => {
  const simulation = new Simulation({ totalBlocks: 10, contextLength: 40, preemptionMode: "fifo" });
  const older = simulation.submit(1, counting(12, 100), 20);
  // Ahead by three tokens, it is the first to need a block that is not there.
  const younger = simulation.submit(2, counting(15, 200), 20);
  while (older.preemptions === 0) {
    const before = younger.generatedTokens;
    simulation.step();
    assert.equal(younger.generatedTokens, before + 1);
  }
  assert.equal(younger.preemptions, 0);
});

test("scheduler: trtllm style never preempts, it admits what fits to its end", () => {
  const simulation = new Simulation({ totalBlocks: 10, contextLength: 40, engineType: "trtllm" });
  for (const id of [1, 2, 3]) simulation.submit(id, counting(12, 100 * id), 20);
  simulation.run();
  assert.equal(simulation.scheduler.load().preemptions, 0);
});

test("scheduler: the watermark keeps blocks for those that run, but never keeps out the only one", () => {
  const simulation = new Simulation({ totalBlocks: 10, contextLength: 40, watermark: 0.5 });
  simulation.submit(1, counting(32), 2);
  simulation.submit(2, counting(4, 500), 1);
  simulation.step();
  assert.deepEqual([simulation.of(1).tokens.length, simulation.of(2).tokens.length], [1, 0]);
  simulation.run();
  assert.equal(simulation.of(2).tokens.length, 1);
});

test("scheduler: a higher priority goes before those that wait", () => {
  const simulation = new Simulation({ maxSequences: 1 });
  for (const [id, priority] of [[1, 0], [2, 0], [3, 5]] as const) simulation.submit(id, counting(5, 10 * id), 1, priority); // prettier-ignore
  simulation.step();
  assert.equal(simulation.of(3).end, "length");
  simulation.step();
  assert.equal(simulation.of(1).end, "length");
});

test("scheduler: sglang style runs prompts alone, before anything decodes", () => {
  const simulation = new Simulation({ engineType: "sglang" });
  simulation.submit(1, counting(10), 5);
  simulation.step();
  simulation.submit(2, counting(1_000, 2_000), 5);
  simulation.step();
  assert.equal(simulation.passMs[1], polynomialPrefillMs(1_000));
  assert.deepEqual([1, 2].map((id) => simulation.of(id).tokens.length), [1, 1]); // prettier-ignore
  simulation.step();
  assert.deepEqual([1, 2].map((id) => simulation.of(id).tokens.length), [2, 2]); // prettier-ignore
});

test("scheduler: sglang style retracts the one with the fewest output tokens", () => {
  const sglang = { clipMaxNewTokens: 0 };
  const simulation = new Simulation({ engineType: "sglang", totalBlocks: 10, contextLength: 40, sglang });
  const older = simulation.submit(1, counting(12), 20);
  for (let i = 0; i < 3; i++) simulation.step();
  const younger = simulation.submit(2, counting(12, 200), 20);
  simulation.run();
  assert.deepEqual([older.preemptions, younger.preemptions > 0], [0, true]);
  assert.deepEqual(simulation.of(2).tokens, expectedAnswer(counting(12, 200), 20));
});

test("scheduler: sglang style with longest-prefix-match takes the best match first", () => {
  const simulation = new Simulation({ engineType: "sglang", maxSequences: 1, sglang: { schedulePolicy: "lpm" } });
  simulation.submit(1, counting(40), 1);
  simulation.run();
  simulation.submit(2, counting(40, 500), 1);
  simulation.submit(3, [...counting(36), 9, 9, 9], 1);
  simulation.step();
  assert.deepEqual([simulation.of(2).end, simulation.of(3).end], [undefined, "length"]);
});

test("scheduler: a prefill worker ends each request after its first token and charges no decode time", () => {
  const simulation = new Simulation({ role: "prefill" });
  simulation.submit(1, counting(100), 50);
  simulation.run();
  assert.deepEqual(simulation.of(1).tokens, expectedAnswer(counting(100), 1));
  assert.deepEqual([simulation.of(1).end, simulation.passMs], ["length", [polynomialPrefillMs(100)]]);
});

describe("scheduler: a decode worker", () => {
  // 1,000 bytes a token over a MB/s: a millisecond a token.
  const transfer = { kvBytesPerToken: 1_000, bandwidthBytesPerSecond: 1_000_000 };

  test("waits for the KV cache of a prompt and computes none of it", () => {
    const simulation = new Simulation({ role: "decode", transfer });
    simulation.submit(1, counting(100), 2);
    simulation.run();
    const decodeMs = polynomialDecodeMs(25 / 4_096);
    assert.deepEqual(simulation.passMs, [decodeMs, polynomialDecodeMs(26 / 4_096)]);
    assert.equal(simulation.of(1).tokenMs[0], 100 + decodeMs);
    assert.deepEqual(simulation.of(1).tokens, expectedAnswer(counting(100), 2));
  });

  test("gives two transfers at once half of the bandwidth each", () => {
    const simulation = new Simulation({ role: "decode", transfer });
    simulation.submit(1, counting(100), 1);
    simulation.submit(2, counting(100, 500), 1);
    simulation.run();
    assert.ok(simulation.of(1).tokenMs[0]! >= 200);
  });

  test("pays only for missing blocks when told so, and all of it otherwise", () => {
    for (const [timingMode, expectedMs] of [
      ["destination_missing", 4],
      ["full_prompt", 100],
    ] as const) {
      // prettier-ignore
      const simulation = new Simulation({ role: "decode", transfer: { ...transfer, timingMode } });
      simulation.submit(1, counting(100), 1);
      simulation.run();
      const startMs = simulation.nowMs;
      simulation.submit(2, counting(100), 1);
      simulation.run();
      assert.ok(Math.abs(simulation.of(2).tokenMs[0]! - startMs - polynomialDecodeMs(25 / 4_096) - expectedMs) < 1e-6);
    }
  });

  test("forgets the transfer of an aborted request", () => {
    const simulation = new Simulation({ role: "decode", transfer });
    simulation.submit(1, counting(100), 1);
    simulation.step();
    simulation.scheduler.abort(1);
    simulation.run();
    assert.equal(simulation.of(1).end, "cancelled");
    assert.equal(simulation.scheduler.nextWakeMs(), Infinity);
  });
});

test("scheduler: bounds that are not kept are named together", () => {
  const bad = aConfig({ totalBlocks: 0, blockSizeTokens: 1.5, watermark: 1, maxBatchedTokens: 2 });
  assert.throws(() => new MockScheduler(bad), /block size.*\nKV blocks.*\nbatched tokens.*\nwatermark/);
});

test("scheduler: whatever comes, no block is lost, everyone ends once with the right answer", () => {
  const request = fc.record({
    // Few distinct tokens, so that prefixes are shared.
    prompt: fc.array(fc.nat(1), { minLength: 1, maxLength: 20 }),
    maxTokens: fc.integer({ min: 1, max: 12 }),
    priority: fc.nat(1),
    stepsBefore: fc.nat(4),
    abortAfter: fc.option(fc.nat(6), { freq: 4 }),
  });
  const config = fc.record({
    engineType: fc.constantFrom("vllm" as const, "sglang" as const, "trtllm" as const),
    role: fc.constantFrom("agg" as const, "agg" as const, "prefill" as const, "decode" as const),
    preemptionMode: fc.constantFrom("lifo" as const, "fifo" as const),
    totalBlocks: fc.integer({ min: 16, max: 30 }),
    blockSizeTokens: fc.integer({ min: 2, max: 4 }),
    maxSequences: fc.integer({ min: 1, max: 6 }),
    maxBatchedTokens: fc.integer({ min: 6, max: 30 }),
    chunkedPrefill: fc.boolean(),
    prefixCaching: fc.constantFrom(true, true, false),
    watermark: fc.constantFrom(0, 0.1, 0.4),
    clipMaxNewTokens: fc.constantFrom(0, 4, 4_096),
    schedulePolicy: fc.constantFrom("fifo" as const, "lpm" as const),
    chunkedPrefillSize: fc.integer({ min: 3, max: 30 }),
  });
  fc.assert(
    fc.property(config, fc.array(request, { minLength: 1, maxLength: 14 }), (variant, requests) => {
      const { clipMaxNewTokens, schedulePolicy, chunkedPrefillSize, ...rest } = variant;
      const simulation = new Simulation({
        ...rest,
        contextLength: 32,
        transfer: { kvBytesPerToken: 1_000, bandwidthBytesPerSecond: 1_000_000 },
        sglang: { clipMaxNewTokens, schedulePolicy, chunkedPrefillSize },
      });
      const aborts: { id: number; afterSteps: number }[] = [];
      const step = (): void => {
        for (const abort of aborts) if (abort.afterSteps-- === 0) simulation.scheduler.abort(abort.id);
        simulation.step();
      };
      requests.forEach(({ prompt, maxTokens, priority, stepsBefore, abortAfter }, id) => {
        for (let i = 0; i < stepsBefore; i++) step();
        simulation.submit(id, prompt, maxTokens, priority);
        if (abortAfter !== null) aborts.push({ id, afterSteps: abortAfter });
      });
      for (let i = 0; i < 8; i++) step();
      simulation.run();
      const load = simulation.scheduler.load();
      assert.deepEqual([load.runningRequests, load.waitingRequests, load.activeBlocks, load.pendingPrefillTokens], [0, 0, 0, 0]); // prettier-ignore
      if (variant.engineType === "trtllm") assert.equal(load.preemptions, 0);
      requests.forEach(({ prompt, maxTokens }, id) => {
        const { tokens, end } = simulation.of(id);
        assert.notEqual(end, undefined);
        const count = end === "cancelled" ? tokens.length : variant.role === "prefill" ? 1 : maxTokens;
        assert.deepEqual(tokens, expectedAnswer(prompt, count));
      });
      assert.equal(simulation.scheduler.clearBlocks(), load.cachedBlocks);
      simulation.scheduler.check();
    }),
    { numRuns: 400 },
  );
});
