import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { decodeKvEvents, encodeKvEvents, type KvEvent } from "./kv-event.ts";

/** Ordinary objects, as the decoder makes them. */
function aRecord<T>(model: { [K in keyof T]: fc.Arbitrary<T[K]> }): fc.Arbitrary<T> {
  return fc.record(model, { noNullPrototype: true }) as fc.Arbitrary<T>;
}

const aU32 = fc.nat(0xffffffff);
const aTier = fc.constantFrom("device", "host", "disk", "external");
const someHashes = (blocks: number): fc.Arbitrary<Uint32Array> =>
  fc.uint32Array({ minLength: 2 * blocks, maxLength: 2 * blocks }).map((hashes) => Uint32Array.from(hashes));
const aHashPair = fc.tuple(aU32, aU32);

const anEvent: fc.Arbitrary<KvEvent> = fc.nat(20).chain((blocks) =>
  fc.oneof(
    aRecord({
      type: fc.constant("stored" as const),
      dpRank: aU32,
      tier: aTier,
      parentHash: fc.option(aHashPair, { nil: undefined }),
      startBlock: aU32,
      sequenceHashes: someHashes(blocks),
      localHashes: someHashes(blocks),
    }),
    aRecord({
      type: fc.constant("removed" as const),
      dpRank: aU32,
      tier: aTier,
      sequenceHashes: someHashes(blocks),
    }),
    aRecord({ type: fc.constant("cleared" as const), dpRank: aU32 }),
  ),
) as fc.Arbitrary<KvEvent>;
const someEvents = fc.array(anEvent, { maxLength: 10 });

function assertRefused(bytes: Uint8Array, title: string): void {
  const isMalformed = (error: unknown): boolean => error instanceof DynamoError && error.reason === "malformed-frame";
  assert.throws(() => decodeKvEvents(bytes), isMalformed, title);
}

void test("KV events: batches come back as written, from any place in a buffer", () => {
  fc.assert(
    fc.property(someEvents, fc.nat(7), (events, shift) => {
      const encoded = encodeKvEvents(events);
      const shifted = Buffer.alloc(encoded.length + shift);
      shifted.set(encoded, shift);
      assert.deepEqual(decodeKvEvents(shifted.subarray(shift)), events);
    }),
  );
});

void test("KV events: what is decoded does not change when the encoder is used again", () => {
  const event: KvEvent = { type: "removed", dpRank: 0, tier: "device", sequenceHashes: Uint32Array.of(1, 2) };
  const decoded = decodeKvEvents(encodeKvEvents([event]));
  encodeKvEvents([{ ...event, sequenceHashes: Uint32Array.of(9, 9) }]);
  assert.deepEqual(decoded, [event]);
});

void test("KV events: a batch cut anywhere or with more behind it is refused", () => {
  fc.assert(
    fc.property(someEvents, (events) => {
      const bytes = Buffer.from(encodeKvEvents(events));
      for (let length = 0; length < bytes.length; length++) assertRefused(bytes.subarray(0, length), `${length} bytes`);
      assertRefused(Buffer.concat([bytes, Buffer.of(0)]), "one byte more");
    }),
    { numRuns: 40 },
  );
});

void test("KV events: changed and random bytes are decoded or refused, never more", () => {
  const decodeOrRefuse = (bytes: Uint8Array): void => {
    try {
      decodeKvEvents(bytes);
    } catch (error) {
      assert.ok(error instanceof DynamoError && error.reason === "malformed-frame", String(error));
    }
  };
  fc.assert(
    fc.property(someEvents, fc.nat(), fc.nat(255), (events, position, value) => {
      const bytes = Buffer.from(encodeKvEvents(events));
      bytes[position % bytes.length] = value;
      decodeOrRefuse(bytes);
    }),
  );
  fc.assert(fc.property(fc.uint8Array({ maxLength: 100 }), decodeOrRefuse));
});

void test("KV events: hostile counts are refused before memory is taken for them", () => {
  const u32 = (value: number): number[] => [...new Uint8Array(Uint32Array.of(value).buffer)];
  const removed = (blocks: number): number[] => [...u32(1), 2, ...u32(0), 0, ...u32(blocks)];
  const before = process.memoryUsage().arrayBuffers;
  for (let i = 0; i < 200; i++) {
    assertRefused(Uint8Array.from(u32(0xffffffff)), "4 billion events");
    assertRefused(Uint8Array.from(u32(4_096)), "4,096 events in no bytes");
    assertRefused(Uint8Array.from(removed(0xffffffff)), "4 billion blocks");
    assertRefused(Uint8Array.from(removed(65_536)), "65,536 blocks in no bytes");
  }
  // Arrays for 65,536 blocks would be 0.5 MB each.
  assert.ok(process.memoryUsage().arrayBuffers - before < 50e6);
  assertRefused(Uint8Array.from([...u32(1), 2, ...u32(0), 4, ...u32(0)]), "an unknown tier");
  assertRefused(Uint8Array.from([...u32(1), 4, ...u32(0)]), "an unknown type");
});
