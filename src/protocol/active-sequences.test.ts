import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import {
  ACTIVE_SEQUENCES_MAX_EVENTS,
  activeSequenceBytes,
  decodeActiveSequences,
  encodeActiveSequences,
  type ActiveSequenceMessage,
} from "./active-sequences.ts";

const PLAIN = { noNullPrototype: true } as const;
const isMalformed = (error: unknown): boolean => error instanceof DynamoError && error.reason === "malformed-frame";
const u32 = fc.integer({ min: 0, max: 0xffff_ffff });
const requestId = fc.string({ maxLength: 40, unit: "grapheme" });
const add = fc.nat(3).chain((blockCount) =>
  fc.record(
    {
      type: fc.constant("add" as const),
      requestId,
      instanceId: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map((id) => id.toString(16).padStart(16, "0")),
      dpRank: u32,
      sequenceHashes: fc.option(
        fc
          .array(u32, { minLength: 2 * blockCount, maxLength: 2 * blockCount })
          .map((values) => Uint32Array.from(values)),
        { nil: undefined },
      ),
      blockCount: fc.constant(blockCount),
      prefillTokens: u32,
      expectedOutputTokens: u32,
    },
    PLAIN,
  ),
);
const session = fc.string({ minLength: 1, maxLength: 40, unit: "grapheme" });
const event = fc.oneof(
  add,
  fc.tuple(add, session).map(([plain, sessionId]) => ({ ...plain, sessionId })),
  fc.record({ type: fc.constantFrom("prefill-completed" as const, "free" as const), requestId }, PLAIN),
);
const message: fc.Arbitrary<ActiveSequenceMessage> = fc.oneof(
  fc.record(
    {
      type: fc.constantFrom("events" as const, "snapshot" as const),
      model: fc.string({ maxLength: 20 }),
      events: fc.array(event, { maxLength: 5 }),
    },
    PLAIN,
  ),
  fc.record({ type: fc.constant("please" as const), routerId: fc.constantFrom("", "00c0ffee00c0ffee") }, PLAIN),
);

describe("active sequence messages", () => {
  it("come back as they were; truncated and prolonged ones are refused; sizes are not underestimated", () => {
    fc.assert(
      fc.property(message, (sent) => {
        const bytes = Buffer.from(encodeActiveSequences(sent));
        assert.deepEqual(decodeActiveSequences(bytes), sent);
        for (let length = 0; length < bytes.length; length++) {
          assert.throws(() => decodeActiveSequences(bytes.subarray(0, length)), isMalformed);
        }
        assert.throws(() => decodeActiveSequences(Buffer.concat([bytes, Buffer.of(0)])), isMalformed);
        if (sent.type === "please") return;
        for (const one of sent.events) {
          const alone = encodeActiveSequences({ type: "events", model: "", events: [one] }).length;
          assert.ok(activeSequenceBytes(one) >= alone - 10);
        }
      }),
      { numRuns: 100 },
    );
  });

  it("any bytes are decoded or refused, never anything else", () => {
    const nearly = fc.tuple(message, fc.nat(300), fc.nat(255)).map(([sent, at, value]) => {
      const bytes = Buffer.from(encodeActiveSequences(sent));
      bytes[at % bytes.length] = value;
      return new Uint8Array(bytes);
    });
    fc.assert(
      fc.property(fc.oneof(fc.uint8Array({ maxLength: 100 }), nearly), (bytes) => {
        try {
          decodeActiveSequences(bytes);
        } catch (error) {
          assert.ok(isMalformed(error));
        }
      }),
      { numRuns: 1_000 },
    );
  });

  it("too many events, fewer hashes than blocks, and ids that are none are refused", () => {
    const one = { type: "free", requestId: "r" } as const;
    const many = Array.from({ length: ACTIVE_SEQUENCES_MAX_EVENTS + 1 }, () => one);
    const booked = {
      type: "add",
      requestId: "r",
      instanceId: "00c0ffee00c0ffee",
      dpRank: 0,
      sequenceHashes: new Uint32Array(2),
      blockCount: 1,
      prefillTokens: 0,
      expectedOutputTokens: 0,
    } as const;
    const wrong: ActiveSequenceMessage[] = [
      { type: "events", model: "m", events: many },
      { type: "events", model: "m", events: [{ ...booked, blockCount: 2 }] },
      { type: "events", model: "m", events: [{ ...booked, instanceId: "not hex digits!!" }] },
      { type: "please", routerId: "x" },
    ];
    for (const sent of wrong) assert.throws(() => decodeActiveSequences(encodeActiveSequences(sent)), isMalformed);
  });
});
