import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import { decodeBookingUpdate, decodeOutlooks, decodeRequestId, decodeRouteAnswer, encodeJson } from "./messages.ts";
import { decodeRouteQuery, encodeRouteQuery, type RouteQuery } from "./route-query.ts";

function isMalformed(error: unknown): boolean {
  return error instanceof DynamoError && error.reason === "malformed-frame";
}

const text = fc.string({ maxLength: 40 });
const tokens = fc.uint32Array({ minLength: 1, maxLength: 200 });
const options = fc.record(
  {
    requestId: text,
    cacheNamespace: text,
    excluded: fc.uniqueArray(text, { minLength: 1, maxLength: 5 }).map((ids) => new Set(ids)),
    allowed: fc.uniqueArray(text, { maxLength: 5 }).map((ids) => new Set(ids)),
    pinned: fc.record({ instanceId: text, dpRank: fc.nat(8) }, { requiredKeys: ["instanceId"], noNullPrototype: true }),
    requiredTaints: fc.array(text, { maxLength: 3 }),
    preferredTaints: fc.array(fc.record({ taint: text, weight: fc.integer() }, { noNullPrototype: true }), {
      maxLength: 3,
    }),
    sessionId: text,
    strictPriority: fc.nat(),
    priorityJump: fc.integer(),
    expectedOutputTokens: fc.nat(),
    overrides: fc.record(
      { temperature: fc.nat(3), assumeKvReuse: fc.boolean() },
      { requiredKeys: [], noNullPrototype: true },
    ),
    explain: fc.boolean(),
    needsRoom: fc.boolean(),
    stage: fc.constantFrom("aggregated" as const, "prefill" as const, "decode" as const),
    pool: fc.constant("prefill" as const),
  },
  { requiredKeys: [], noNullPrototype: true },
);

test("route query: what is asked with token ids arrives as it was", () => {
  fc.assert(
    fc.property(tokens, options, (tokenIds, given) => {
      const query: RouteQuery = { model: "m", prompt: "tokens", blockSizeTokens: 16, request: { ...given, tokenIds } };
      const decoded = decodeRouteQuery(encodeRouteQuery(query));
      assert.deepEqual(decoded, { ...query, request: { ...given, tokenIds, promptTokenCount: tokenIds.length } });
    }),
  );
});

test("route query: outlooks arrive as they were, and what is none is malformed", () => {
  const decode = { cachedTokens: 32, queuedTokens: 1_000, activeRequests: 3, rankCount: 2, hasRoom: false };
  const both = { decode, prefill: null };
  assert.deepEqual(decodeOutlooks(encodeJson(both)), both);
  const without = { decode: null, prefill: { ...decode, hasRoom: undefined } };
  assert.equal(decodeOutlooks(encodeJson(without)).prefill!.hasRoom, true);
  for (const wrong of [
    {},
    { decode },
    { decode, prefill: 3 },
    { decode: { ...decode, rankCount: 0 }, prefill: null },
  ]) {
    assert.throws(() => decodeOutlooks(encodeJson(wrong)), isMalformed, JSON.stringify(wrong));
  }
});

test("route query: hashes arrive with the prompt's length and without its tokens", () => {
  fc.assert(
    fc.property(tokens, fc.integer({ min: 1, max: 32 }), (tokenIds, blockSizeTokens) => {
      const hashes = hashBlocks(tokenIds, blockSizeTokens, blockHashSeed());
      const query: RouteQuery = { model: "m", prompt: "hashes", blockSizeTokens, request: { tokenIds, hashes } };
      const { request } = decodeRouteQuery(encodeRouteQuery(query));
      assert.equal(request.tokenIds.length, 0);
      assert.equal(request.promptTokenCount, tokenIds.length);
      assert.equal(request.hashes!.blockCount, hashes.blockCount);
      assert.deepEqual(request.hashes!.sequenceHashes, hashes.sequenceHashes.slice(0, 2 * hashes.blockCount));
    }),
  );
});

test("route query: every cut of it, and any bytes at all, are refused and nothing else", () => {
  const request = { tokenIds: Uint32Array.of(1, 2, 3, 4), requestId: "r", pinned: { instanceId: "a" } };
  const whole = Buffer.from(encodeRouteQuery({ model: "m", prompt: "tokens", blockSizeTokens: 2, request }));
  for (let end = 0; end < whole.length; end++)
    assert.throws(() => decodeRouteQuery(whole.subarray(0, end)), isMalformed);
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
      assert.throws(() => decodeRouteQuery(bytes), isMalformed);
    }),
  );
});

test("route query: one changed byte gives another valid question or a refusal, never another error", () => {
  const request = { tokenIds: Uint32Array.of(1, 2, 3, 4), excluded: new Set(["b"]), overrides: { temperature: 1 } };
  const whole = Buffer.from(encodeRouteQuery({ model: "m", prompt: "tokens", blockSizeTokens: 2, request }));
  fc.assert(
    fc.property(fc.nat(whole.length - 1), fc.integer({ min: 0, max: 255 }), (at, value) => {
      const bytes = Buffer.from(whole);
      bytes[at] = value;
      try {
        decodeRouteQuery(bytes);
      } catch (error) {
        assert.ok(isMalformed(error), String(error));
      }
    }),
    { numRuns: 500 },
  );
});

function framed(meta: unknown, numbers: number): Buffer {
  const json = Buffer.from(JSON.stringify(meta));
  const head = Buffer.alloc(4);
  head.writeUInt32LE(json.length);
  return Buffer.concat([head, json, Buffer.alloc(4 * numbers)]);
}

test("route query: wrong types, counts that do not fit and lists over the limit are refused", () => {
  const good = { model: "m", prompt: "tokens", blockSizeTokens: 16, promptTokenCount: 2 };
  assert.equal(decodeRouteQuery(framed(good, 2)).model, "m");
  const bad: [object, number][] = [
    [good, 3],
    [{ ...good, model: 1 }, 2],
    [{ ...good, model: "x".repeat(2_000) }, 2],
    [{ ...good, prompt: "text" }, 2],
    [{ ...good, blockSizeTokens: 0 }, 2],
    [{ ...good, promptTokenCount: 2 ** 25 }, 2],
    [{ ...good, prompt: "hashes" }, 2],
    [{ ...good, prompt: "hashes", promptTokenCount: 64 }, 3],
    [{ ...good, excluded: "a" }, 2],
    [{ ...good, excluded: Array.from({ length: 5_000 }, String) }, 2],
    [{ ...good, pinned: {} }, 2],
    [{ ...good, pinned: [] }, 2],
    [{ ...good, explain: "yes" }, 2],
    [{ ...good, overrides: { temperature: -1 } }, 2],
    [{ ...good, overrides: { trackPrefillTokens: 1 } }, 2],
    [{ ...good, preferredTaints: [{ taint: "a" }] }, 2],
  ];
  for (const [meta, numbers] of bad) {
    assert.throws(() => decodeRouteQuery(framed(meta, numbers)), isMalformed, JSON.stringify(meta).slice(0, 200));
  }
  const huge = framed(good, 2);
  huge.writeUInt32LE(0xffff_ffff);
  assert.throws(() => decodeRouteQuery(huge), isMalformed);
});

test("messages: a decision is refused when its worker's id or address is none, or it is too long", () => {
  const good = { type: "decision", booking: "b", instanceId: "0123456789abcdef", address: "tcp://127.0.0.1:1", dpRank: 0, policy: "kv", reason: "r", candidateCount: 1, overlapBlocks: 0, queuedMs: 0, outputStepTokens: 0 }; // prettier-ignore
  assert.deepEqual(decodeRouteAnswer(encodeJson(good)), good);
  assert.deepEqual(decodeRouteAnswer(encodeJson({ type: "queued" })), { type: "queued" });
  const changes = [{ type: "x" }, { instanceId: "a" }, { address: "nowhere" }, { dpRank: -1 }, { queuedMs: "1" }, { explanation: 3 }, { policy: "x".repeat(600_000) }]; // prettier-ignore
  for (const change of changes) {
    assert.throws(() => decodeRouteAnswer(encodeJson({ ...good, ...change })), isMalformed, JSON.stringify(change).slice(0, 99)); // prettier-ignore
  }
  for (const decode of [decodeRouteAnswer, decodeBookingUpdate, decodeRequestId]) {
    assert.throws(() => decode(Buffer.from("[1]")), isMalformed);
    assert.throws(() => decode(Buffer.from("{")), isMalformed);
  }
  assert.throws(() => decodeBookingUpdate(encodeJson({ booking: "b", tokens: -1 })), isMalformed);
});
