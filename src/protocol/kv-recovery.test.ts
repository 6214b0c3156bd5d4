import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import type { KvEvent } from "./kv-event.ts";
import {
  KV_DUMP_MAX_PAGES,
  decodeKvAnswer,
  decodeKvEventBatch,
  decodeKvQuery,
  encodeKvAnswer,
  encodeKvEventBatch,
  encodeKvQuery,
  type KvAnswer,
} from "./kv-recovery.ts";

const RANK = 3;
const isMalformed = (error: unknown): boolean => error instanceof DynamoError && error.reason === "malformed-frame";

const PLAIN = { noNullPrototype: true } as const;
const u32 = fc.integer({ min: 0, max: 0xffff_ffff });
const number = fc.integer({ min: 1, max: Number.MAX_SAFE_INTEGER });
const tier = fc.constantFrom("device" as const, "host" as const, "disk" as const, "external" as const);
const stored = fc.nat(4).chain((blocks) => {
  const hashes = fc
    .array(u32, { minLength: 2 * blocks, maxLength: 2 * blocks })
    .map((values) => Uint32Array.from(values));
  return fc.record(
    {
      type: fc.constant("stored" as const),
      dpRank: fc.constant(RANK),
      tier,
      parentHash: fc.option(fc.tuple(u32, u32), { nil: undefined }),
      startBlock: u32,
      sequenceHashes: hashes,
      localHashes: hashes,
    },
    PLAIN,
  );
});
const removed = fc.record(
  {
    type: fc.constant("removed" as const),
    dpRank: fc.constant(RANK),
    tier,
    sequenceHashes: fc
      .nat(4)
      .chain((blocks) =>
        fc.array(u32, { minLength: 2 * blocks, maxLength: 2 * blocks }).map((values) => Uint32Array.from(values)),
      ),
  },
  PLAIN,
);
const cleared = fc.record({ type: fc.constant("cleared" as const), dpRank: fc.constant(RANK) }, PLAIN);
const events: fc.Arbitrary<KvEvent[]> = fc.array(fc.oneof(stored, removed, cleared), { maxLength: 5 });
const head = { epoch: number, lastEventId: fc.nat() };
const answers: fc.Arbitrary<KvAnswer> = fc.oneof(
  fc.record({ type: fc.constant("events" as const), ...head, firstEventId: number, events }, PLAIN),
  fc.record(
    {
      type: fc.constant("tree-dump" as const),
      ...head,
      dumpId: number,
      atEventId: fc.nat(),
      page: fc.nat(5),
      pageCount: fc.integer({ min: 6, max: KV_DUMP_MAX_PAGES }),
      events: fc.array(fc.oneof(stored, removed), { maxLength: 3 }),
    },
    PLAIN,
  ),
  fc.record(
    { type: fc.constantFrom("too-new" as const, "invalid-range" as const, "dump-gone" as const), ...head },
    PLAIN,
  ),
);

describe("KV recovery messages", () => {
  it("a batch comes back as it was, and a truncated or prolonged one is refused", () => {
    fc.assert(
      fc.property(number, number, events, (epoch, firstEventId, list) => {
        const batch = { dpRank: RANK, epoch, firstEventId, events: list };
        const bytes = Buffer.from(encodeKvEventBatch(batch));
        assert.deepEqual(decodeKvEventBatch(bytes), batch);
        for (let length = 0; length < bytes.length; length++) {
          assert.throws(() => decodeKvEventBatch(bytes.subarray(0, length)), isMalformed);
        }
        assert.throws(() => decodeKvEventBatch(Buffer.concat([bytes, Buffer.of(0)])), isMalformed);
        assert.throws(() => decodeKvEventBatch(Buffer.concat([bytes, bytes])), isMalformed);
      }),
      { numRuns: 50 },
    );
  });

  it("queries come back as they were, absent ends and the invalid 0 included", () => {
    const end = fc.option(fc.nat(), { nil: undefined });
    fc.assert(
      fc.property(end, end, (start, stop) => {
        const query = { type: "range", start, end: stop } as const;
        assert.deepEqual(decodeKvQuery(encodeKvQuery(query)), query);
      }),
    );
    const page = { type: "page", dumpId: 2 ** 40, page: 17 } as const;
    assert.deepEqual(decodeKvQuery(encodeKvQuery(page)), page);
  });

  it("answers come back as they were, and truncated ones are refused", () => {
    fc.assert(
      fc.property(answers, (answer) => {
        const bytes = Buffer.from(encodeKvAnswer(answer));
        assert.deepEqual(decodeKvAnswer(bytes, RANK), answer);
        for (let length = 0; length < bytes.length; length++) {
          assert.throws(() => decodeKvAnswer(bytes.subarray(0, length), RANK), isMalformed);
        }
      }),
      { numRuns: 100 },
    );
  });

  it("any bytes are decoded or refused, never anything else", () => {
    const decoders = [decodeKvEventBatch, decodeKvQuery, (bytes: Uint8Array) => decodeKvAnswer(bytes, RANK)];
    const anything = fc.uint8Array({ maxLength: 120 });
    const nearly = fc.tuple(answers, fc.nat(200), fc.nat(255)).map(([answer, at, value]) => {
      const bytes = Buffer.from(encodeKvAnswer(answer));
      bytes[at % bytes.length] = value;
      return new Uint8Array(bytes);
    });
    fc.assert(
      fc.property(fc.oneof(anything, nearly), (bytes) => {
        for (const decode of decoders) {
          try {
            decode(bytes);
          } catch (error) {
            assert.ok(isMalformed(error));
          }
        }
      }),
      { numRuns: 1_000 },
    );
  });

  it("a hostile block count is refused before memory is taken for it", () => {
    const bytes = Buffer.from(
      encodeKvEventBatch({
        dpRank: RANK,
        epoch: 1,
        firstEventId: 1,
        events: [{ type: "removed", dpRank: RANK, tier: "device", sequenceHashes: new Uint32Array(2) }],
      }),
    );
    bytes.writeUInt32LE(0xffff_ffff, bytes.length - 12);
    assert.throws(() => decodeKvEventBatch(bytes), isMalformed);
    bytes.writeUInt32LE(60_000, bytes.length - 12);
    assert.throws(() => decodeKvEventBatch(bytes), isMalformed);
  });

  it("events of another rank, epoch 0, event 0, a wrong version and a page beyond the last are refused", () => {
    const event: KvEvent = { type: "cleared", dpRank: RANK };
    const batch = { dpRank: RANK, epoch: 1, firstEventId: 1, events: [event] };
    for (const wrong of [
      { ...batch, dpRank: 4 },
      { ...batch, epoch: 0 },
      { ...batch, firstEventId: 0 },
    ]) {
      assert.throws(() => decodeKvEventBatch(encodeKvEventBatch(wrong)), isMalformed);
    }
    const version = Buffer.from(encodeKvEventBatch(batch));
    version[0] = 2;
    assert.throws(() => decodeKvEventBatch(version), isMalformed);
    const answer = { type: "events", epoch: 1, lastEventId: 1, firstEventId: 1, events: [event] } as const;
    assert.throws(() => decodeKvAnswer(encodeKvAnswer(answer), RANK + 1), isMalformed);
    const page = {
      type: "tree-dump",
      epoch: 1,
      lastEventId: 1,
      dumpId: 1,
      atEventId: 1,
      page: 2,
      pageCount: 2,
      events: [],
    } as const;
    assert.throws(() => decodeKvAnswer(encodeKvAnswer(page), RANK), isMalformed);
    const clearing = { ...page, page: 0, events: [event] } as const;
    assert.throws(() => decodeKvAnswer(encodeKvAnswer(clearing), RANK), isMalformed);
  });
});
