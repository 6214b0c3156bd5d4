import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { GREEDY, decodeRequest, encodeRequest, type PreprocessedRequest } from "./request.ts";

/** Ordinary objects, as the decoder makes them. */
function aRecord<T>(model: { [K in keyof T]: fc.Arbitrary<T[K]> }): fc.Arbitrary<T> {
  return fc.record(model, { noNullPrototype: true }) as fc.Arbitrary<T>;
}

const aNumber = fc.double({ noNaN: true, noDefaultInfinity: true }).map((value) => (Object.is(value, -0) ? 0 : value));
const aU32 = fc.nat(0xffffffff);

const someSampling = fc.record(
  {
    temperature: aNumber,
    topP: aNumber,
    topK: fc.nat(),
    minP: aNumber,
    presencePenalty: aNumber,
    frequencyPenalty: aNumber,
    repetitionPenalty: aNumber,
    seed: aU32,
    logitBias: fc.array(fc.tuple(aU32, aNumber), { maxLength: 5 }),
  },
  {
    noNullPrototype: true,
    requiredKeys: ["temperature", "topP", "topK", "minP", "presencePenalty", "frequencyPenalty", "repetitionPenalty"],
  },
);

const aRequest: fc.Arbitrary<PreprocessedRequest> = aRecord({
  requestId: fc.string({ unit: "binary" }),
  model: fc.string({ unit: "grapheme" }),
  tokenIds: fc.uint32Array({ minLength: 1, maxLength: 300 }).map((tokens) => Uint32Array.from(tokens)),
  sampling: someSampling,
  stop: aRecord({
    maxTokens: aU32,
    minTokens: aU32,
    stopTokenIds: fc.array(aU32, { maxLength: 8 }),
    ignoreEos: fc.boolean(),
  }),
  output: aRecord({ topLogprobs: fc.integer({ min: -1, max: 20 }), promptLogprobs: fc.boolean() }),
  priority: fc.integer({ min: -100, max: 100 }),
  cacheNamespace: fc.string(),
});

function isMalformedFrame(error: unknown): boolean {
  return error instanceof DynamoError && error.reason === "malformed-frame";
}

void test("request: a field of a wrong type is refused at the door, not by the engine behind it", () => {
  const good = {
    requestId: "r",
    model: "m",
    sampling: GREEDY,
    stop: { maxTokens: 1, minTokens: 0, stopTokenIds: [2], ignoreEos: false },
    output: { topLogprobs: -1, promptLogprobs: false },
    priority: 0,
    cacheNamespace: "",
  };
  const decode = (meta: object, tokens = 1): PreprocessedRequest =>
    decodeRequest(encodeRequest({ ...(meta as PreprocessedRequest), tokenIds: new Uint32Array(tokens) }));
  assert.equal(decode(good).model, "m");
  assert.throws(() => decode(good, 0), isMalformedFrame);
  const bad: object[] = [
    { ...good, stop: { ...good.stop, stopTokenIds: undefined } },
    { ...good, stop: { ...good.stop, stopTokenIds: [1.5] } },
    { ...good, stop: { ...good.stop, maxTokens: "5" } },
    { ...good, stop: { ...good.stop, maxTokens: -1 } },
    { ...good, sampling: { ...GREEDY, logitBias: { 5: 1 } } },
    { ...good, sampling: { ...GREEDY, logitBias: [[5]] } },
    { ...good, sampling: { ...GREEDY, temperature: null } },
    { ...good, sampling: { ...GREEDY, seed: 2 ** 32 } },
    { ...good, output: { topLogprobs: 1e9, promptLogprobs: false } },
    { ...good, dpRank: -1 },
    { ...good, requestId: 5 },
    { ...good, cacheNamespace: ["odd"] },
  ];
  for (const meta of bad) assert.throws(() => decode(meta), isMalformedFrame, JSON.stringify(meta));
});

void test("request: comes back as it was sent", () => {
  fc.assert(
    fc.property(aRequest, (request) => {
      assert.deepEqual(decodeRequest(encodeRequest(request)), { ...request });
    }),
  );
});

void test("request: what is decoded does not change when the encoder is used again", () => {
  const request: PreprocessedRequest = {
    requestId: "r",
    model: "m",
    tokenIds: Uint32Array.of(1, 2, 3),
    sampling: GREEDY,
    stop: { maxTokens: 1, minTokens: 0, stopTokenIds: [2], ignoreEos: false },
    output: { topLogprobs: -1, promptLogprobs: false },
    priority: 0,
    cacheNamespace: "",
  };
  const decoded = decodeRequest(encodeRequest(request));
  encodeRequest({ ...request, tokenIds: Uint32Array.of(7, 7, 7) });
  assert.deepEqual(decoded, request);
});

void test("request: cut anywhere it is refused, or has fewer tokens (frames carry the whole length)", () => {
  fc.assert(
    fc.property(aRequest, (request) => {
      const bytes = Buffer.from(encodeRequest(request));
      const tokensStart = bytes.length - 4 * request.tokenIds.length;
      for (let length = 0; length < bytes.length; length++) {
        const cut = bytes.subarray(0, length);
        if (length > tokensStart && (length - tokensStart) % 4 === 0) {
          const expected = request.tokenIds.subarray(0, (length - tokensStart) / 4);
          assert.deepEqual(decodeRequest(cut).tokenIds, expected);
        } else {
          assert.throws(() => decodeRequest(cut), isMalformedFrame, `${length} bytes`);
        }
      }
    }),
    { numRuns: 15 },
  );
});

void test("request: changed and random bytes are decoded or refused, never more", () => {
  const decodeOrRefuse = (bytes: Uint8Array): void => {
    try {
      decodeRequest(bytes);
    } catch (error) {
      assert.ok(isMalformedFrame(error), String(error));
    }
  };
  fc.assert(
    fc.property(aRequest, fc.nat(), fc.nat(255), (request, position, value) => {
      const bytes = Buffer.from(encodeRequest(request));
      bytes[position % bytes.length] = value;
      decodeOrRefuse(bytes);
    }),
  );
  fc.assert(fc.property(fc.uint8Array({ maxLength: 100 }), decodeOrRefuse));
});

void test("request: hostile lengths and foreign JSON are refused", () => {
  const withJson = (json: string): Buffer => {
    const text = Buffer.from(json);
    const bytes = Buffer.alloc(4 + text.length);
    bytes.writeUInt32LE(text.length);
    bytes.set(text, 4);
    return bytes;
  };
  assert.throws(() => decodeRequest(Buffer.of(0xff, 0xff, 0xff, 0xff, 0x7b)), isMalformedFrame);
  for (const json of [
    "",
    "null",
    "1",
    '"text"',
    "[]",
    "{}",
    "{",
    '{"sampling":1,"stop":{}}',
    '{"sampling":{}}',
    '{"sampling":null,"stop":{},"output":{}}',
  ]) {
    assert.throws(() => decodeRequest(withJson(json)), isMalformedFrame, json);
  }
  const { tokenIds: _, ...meta } = decodeRequest(encodeRequest(fc.sample(aRequest, 1)[0]!));
  for (const resumedTokens of [1, 2, -1, 0.5, 1e9, "1", null, {}]) {
    const bytes = Buffer.concat([withJson(JSON.stringify({ ...meta, resumedTokens })), Buffer.alloc(4)]);
    assert.throws(
      () => decodeRequest(bytes),
      isMalformedFrame,
      `${JSON.stringify(resumedTokens)} resumed of one token`,
    );
  }
  const polluted = withJson(`${JSON.stringify(meta).slice(0, -1)},"__proto__":{"polluted":1}}`);
  decodeRequest(Buffer.concat([polluted, Buffer.alloc(4)]));
  assert.equal(({} as { polluted?: number }).polluted, undefined);
});
