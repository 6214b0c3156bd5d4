import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import type { Engine } from "../engines/index.ts";
import { decodeHandoffPart, type HandoffPart } from "../protocol/index.ts";
import type { ServerStream } from "../runtime/request-plane/index.ts";
import { ManualClock, SeededRandom } from "../std/index.ts";
import { HandoffDraft } from "./handoff-draft.ts";
import { HandoffStore } from "./handoff-store.ts";

const BLOCK = 4;
const never = new AbortController().signal;

/** An engine that computes the blocks of one prompt when told; block i is four times the byte i + 1. */
class FakeEngine {
  computed = 0;
  exported = 0;
  onBlocks: ((data: Uint8Array) => void) | undefined = undefined;
  readonly #follows: boolean;

  constructor(follows: boolean) {
    this.#follows = follows;
  }

  static blocks(from: number, to: number): Uint8Array {
    return Uint8Array.from({ length: (to - from) * BLOCK }, (_, i) => from + Math.floor(i / BLOCK) + 1);
  }

  compute(count: number): void {
    if (count === 0) return;
    const from = this.computed;
    this.computed += count;
    this.onBlocks?.(FakeEngine.blocks(from, this.computed));
  }

  get engine(): Engine {
    const followBlocks = (_hashes: Uint32Array, onBlocks: (data: Uint8Array) => void): (() => void) => {
      this.onBlocks = onBlocks;
      return () => (this.onBlocks = undefined);
    };
    return {
      ...(this.#follows ? { followBlocks } : {}),
      exportBlocks: (hashes: Uint32Array) => {
        const from = hashes[0]!;
        const to = Math.min(this.computed, from + hashes.length / 2);
        this.exported += to - from;
        return Promise.resolve({ sequenceHashes: hashes, blockBytes: BLOCK, data: FakeEngine.blocks(from, to) });
      },
    } as unknown as Engine;
  }
}

class FakeStream {
  readonly parts: HandoffPart[] = [];
  ended = false;
  write(bytes: Uint8Array): void {
    assert.equal(this.ended, false);
    this.parts.push(decodeHandoffPart(bytes));
  }
  end(): void {
    this.ended = true;
  }
}

interface Rig {
  readonly store: HandoffStore;
  readonly fake: FakeEngine;
  readonly draft: HandoffDraft;
  readonly bytes: Uint8Array;
  begun: number;
  readonly watch: () => FakeStream;
  /** What a reader finds in the slots of a part. */
  readonly read: (part: Pick<HandoffPart, "runs">) => Uint8Array;
}

function aDraft(blockCount: number, { slots = 64, follows = true } = {}): Rig {
  const bytes = new Uint8Array(slots * BLOCK);
  const clock = new ManualClock();
  const random = new SeededRandom(1);
  const store = new HandoffStore({ bytes, blockBytes: BLOCK, clock, random, leaseMs: 100, claimMs: 50 });
  const fake = new FakeEngine(follows);
  // Low halves tell the block, for the fake.
  const sequenceHashes = Uint32Array.from({ length: 2 * blockCount }, (_, i) => i >> 1);
  const rig: Rig = {
    store,
    fake,
    bytes,
    begun: 0,
    draft: new HandoffDraft({
      id: "0123456789abcdef",
      engine: fake.engine,
      store,
      sequenceHashes,
      onBegun: () => rig.begun++,
    }),
    watch() {
      const stream = new FakeStream();
      rig.draft.watch(stream as unknown as ServerStream);
      return stream;
    },
    read({ runs }) {
      const found: number[] = [];
      for (let i = 0; i < runs.length; i += 2) {
        found.push(...bytes.subarray(runs[i]! * BLOCK, (runs[i]! + runs[i + 1]!) * BLOCK));
      }
      return Uint8Array.from(found);
    },
  };
  return rig;
}

test("handoff draft: parts are told as they come, what was fetched is not handed over again, the watcher's stream ends", async () => {
  const { store, fake, draft, watch, read, ...rig } = aDraft(10);
  fake.compute(3);
  const watcher = watch();
  fake.compute(4);
  assert.deepEqual(
    watcher.parts.map(({ firstBlock, blockCount }) => [firstBlock, blockCount]),
    [
      [0, 3],
      [3, 4],
    ],
  );
  store.claim(watcher.parts[0]!.id);
  assert.deepEqual(read(watcher.parts[0]!), FakeEngine.blocks(0, 3));
  store.release(watcher.parts[0]!.id);
  fake.compute(3);
  let freed = 0;
  const handoff = await draft.finish(never, () => freed++);
  assert.deepEqual([handoff.firstBlock, handoff.blockCount, watcher.ended, fake.exported], [3, 7, true, 0]);
  assert.deepEqual(read(handoff), FakeEngine.blocks(3, 10));
  store.claim(handoff.id);
  store.release(handoff.id);
  assert.deepEqual([freed, store.heldBlocks, rig.begun], [1, 0, 0]);
});

test("handoff draft: it says once that there is something to fetch, and not of a prompt that is complete at once", () => {
  const whole = aDraft(3);
  whole.fake.compute(3);
  assert.equal(whole.begun, 0);
  const long = aDraft(3);
  long.fake.compute(1);
  long.fake.compute(1);
  long.fake.compute(1);
  assert.equal(long.begun, 1);
  long.draft.abandon();
  assert.equal(long.store.heldBlocks, 0);
});

test("handoff draft: everything fetched leaves a handoff without blocks; nothing followed, one with all of them", async () => {
  const { store, fake, draft, watch } = aDraft(4);
  const watcher = watch();
  fake.compute(4);
  store.claim(watcher.parts[0]!.id);
  const empty = await draft.finish(never, () => assert.fail("is not kept"));
  assert.deepEqual([empty.firstBlock, empty.blockCount], [4, 0]);
  store.release(watcher.parts[0]!.id);
  assert.equal(store.heldBlocks, 0);
  const plain = aDraft(4, { follows: false });
  plain.fake.compute(4);
  const all = await plain.draft.finish(never, () => undefined);
  assert.deepEqual([all.firstBlock, all.blockCount, plain.fake.exported], [0, 4, 4]);
});

test("handoff draft: parts flow through memory that is smaller than the prompt; with nobody to fetch them it is cut", async () => {
  const small = aDraft(12, { slots: 4 });
  const watcher = small.watch();
  for (let i = 0; i < 6; i++) {
    small.fake.compute(2);
    const part = watcher.parts.at(-1)!;
    small.store.claim(part.id);
    small.store.release(part.id);
  }
  const rest = await small.draft.finish(never, () => undefined);
  assert.deepEqual([rest.firstBlock, rest.blockCount], [12, 0]);
  const cut = aDraft(12, { slots: 4 });
  for (let i = 0; i < 6; i++) cut.fake.compute(2);
  const first = await cut.draft.finish(never, () => undefined);
  assert.deepEqual([first.firstBlock, first.blockCount], [0, 4]);
  assert.deepEqual(cut.read(first), FakeEngine.blocks(0, 4));
});

test("handoff draft: a part whose transfer failed is exported anew, with all behind it", async () => {
  const { store, fake, draft, watch, read } = aDraft(8);
  const watcher = watch();
  for (let i = 0; i < 3; i++) fake.compute(2);
  store.claim(watcher.parts[0]!.id);
  store.release(watcher.parts[0]!.id);
  store.claim(watcher.parts[1]!.id);
  store.giveUp(watcher.parts[1]!.id);
  fake.compute(2);
  const handoff = await draft.finish(never, () => undefined);
  assert.deepEqual([handoff.firstBlock, handoff.blockCount], [2, 6]);
  assert.deepEqual(read(handoff), FakeEngine.blocks(2, 8));
});

test("handoff draft: who asks too late, or cancels, gets nothing and leaves nothing", async () => {
  const { store, fake, draft, watch } = aDraft(4);
  fake.compute(2);
  const watcher = watch();
  assert.throws(watch, /watched already/);
  draft.unwatch();
  watch();
  const abort = new AbortController();
  const finished = draft.finish(abort.signal, () => undefined);
  abort.abort();
  await assert.rejects(finished, /cancelled/);
  assert.equal(store.heldBlocks, 0);
  assert.throws(() => store.claim(watcher.parts[0]!.id), /not kept any more/);
});

test("handoff draft: whatever a reader does, the handoff goes on behind what it has, its bytes are right, no slot is lost", async () => {
  const anAct = fc.record({
    compute: fc.integer({ min: 0, max: 3 }),
    reader: fc.constantFrom("reads", "fails", "sleeps", "skips"),
  });
  await fc.assert(
    fc.asyncProperty(
      fc.array(anAct, { maxLength: 12 }),
      fc.integer({ min: 1, max: 20 }),
      fc.boolean(),
      async (acts, slots, isWatched) => {
        const total = 14;
        const { store, fake, draft, watch, read } = aDraft(total, { slots });
        const watcher = isWatched ? watch() : undefined;
        let has = 0;
        let next = 0;
        for (const { compute, reader } of acts) {
          fake.compute(Math.min(compute, total - fake.computed));
          const part = watcher?.parts[next];
          if (part === undefined || reader === "sleeps" || part.firstBlock !== has) continue;
          next++;
          if (reader === "skips") continue;
          store.claim(part.id);
          assert.deepEqual(read(part), FakeEngine.blocks(part.firstBlock, part.firstBlock + part.blockCount));
          if (reader === "reads") {
            store.release(part.id);
            has += part.blockCount;
          } else store.giveUp(part.id);
        }
        fake.compute(total - fake.computed);
        const handoff = await draft.finish(never, () => undefined);
        assert.equal(handoff.firstBlock, has);
        assert.deepEqual(read(handoff), FakeEngine.blocks(has, has + handoff.blockCount));
        assert.ok(handoff.blockCount + has === total || store.freeBlocks === 0 || handoff.blockCount > 0);
        if (handoff.blockCount > 0) store.giveUp(handoff.id);
        assert.equal(store.heldBlocks, 0);
      },
    ),
    { numRuns: 300 },
  );
});
