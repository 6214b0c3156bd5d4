import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import {
  MAX_HANDOFF_BYTES,
  decodeEngineClaim,
  decodeEngineHandoff,
  decodeHandoff,
  decodeHandoffAsk,
  decodeHandoffPart,
  encodeEngineClaim,
  encodeEngineHandoff,
  encodeHandoff,
  encodeHandoffPart,
  type Handoff,
} from "./handoff.ts";

const HANDOFF: Handoff = {
  id: "0123456789abcdef",
  draftId: "fedcba9876543210",
  address: "tcp://127.0.0.1:4000",
  endpoint: "dynamo.backend.handoff",
  fingerprint: "llama/1/feed/beef/16/360448",
  blockBytes: 360_448,
  blockSizeTokens: 16,
  regionId: 65_537,
  firstBlock: 32,
  runs: Uint32Array.of(0, 3, 7, 2),
  blockCount: 5,
  metadata: Uint8Array.of(1, 2, 3),
};

const isMalformed = (error: unknown): boolean => error instanceof DynamoError && error.reason === "malformed-frame";

test("handoff: what is encoded is decoded; nothing of it may be missing or too much", () => {
  const bytes = encodeHandoff(HANDOFF);
  assert.deepEqual(decodeHandoff(bytes), HANDOFF);
  for (let length = 0; length < bytes.length; length++) {
    assert.throws(() => decodeHandoff(bytes.subarray(0, length)), isMalformed, `cut at ${length}`);
  }
  assert.throws(() => decodeHandoff(Buffer.concat([bytes, Buffer.from([0])])), isMalformed);
  assert.throws(() => decodeHandoff(Buffer.alloc(MAX_HANDOFF_BYTES + 1)), isMalformed);
});

test("handoff: runs that do not add up to its blocks, and an id that is none, are refused", () => {
  assert.throws(() => decodeHandoff(encodeHandoff({ ...HANDOFF, blockCount: 6 })), isMalformed);
  assert.throws(() => decodeHandoff(encodeHandoff({ ...HANDOFF, id: "../../etc/passwd" })), isMalformed);
  assert.throws(() => decodeHandoff(encodeHandoff({ ...HANDOFF, draftId: "x" })), isMalformed);
  assert.equal(decodeHandoff(encodeHandoff({ ...HANDOFF, draftId: "" })).draftId, "");
  assert.throws(() => decodeHandoff(encodeHandoff({ ...HANDOFF, blockBytes: 0 })), isMalformed);
});

test("handoff: any bytes are decoded or refused as malformed", () => {
  const bytes = encodeHandoff(HANDOFF);
  fc.assert(
    fc.property(fc.nat(bytes.length - 1), fc.nat(255), (at, value) => {
      const damaged = Buffer.from(bytes);
      damaged[at] = value;
      try {
        const { runs, blockCount } = decodeHandoff(damaged);
        assert.equal(
          runs.reduce((sum, each, i) => sum + (i % 2) * each, 0),
          blockCount,
        );
      } catch (thrown) {
        assert.ok(isMalformed(thrown), String(thrown));
      }
    }),
  );
});

test("handoff: a part of a draft is what was encoded, or malformed", () => {
  const part = { id: "0123456789abcdef", firstBlock: 4, blockCount: 3, runs: Uint32Array.of(9, 2, 0, 1) };
  const bytes = encodeHandoffPart(part);
  assert.deepEqual(decodeHandoffPart(bytes), part);
  for (let length = 0; length < bytes.length; length++) {
    assert.throws(() => decodeHandoffPart(bytes.subarray(0, length)), isMalformed, `cut at ${length}`);
  }
  const wrong = [
    { id: "x" },
    { firstBlock: -1 },
    { blockCount: 4 },
    { runs: [9] },
    { runs: [9, "2", 0, 1] },
    { runs: 3 },
  ];
  for (const change of [...wrong, { runs: [2 ** 32, 3] }]) {
    const text = JSON.stringify({ ...part, runs: [...part.runs], ...change });
    assert.throws(() => decodeHandoffPart(Buffer.from(text)), isMalformed, text);
  }
});

test("handoff: a question is a claim, a release or a watch", () => {
  assert.deepEqual(decodeHandoffAsk(Buffer.from('{"claim":"a"}')), { claim: "a" });
  assert.deepEqual(decodeHandoffAsk(Buffer.from('{"release":"a"}')), { release: "a" });
  assert.deepEqual(decodeHandoffAsk(Buffer.from('{"watch":"a"}')), { watch: "a" });
  for (const text of ["", "null", "{}", '{"claim":1}', "[]"]) {
    assert.throws(() => decodeHandoffAsk(Buffer.from(text)), isMalformed, text);
  }
});

test("an engine's handoff: round trip, and nothing foreign is taken for one", () => {
  const handoff = {
    id: "0123456789abcdef",
    peer: "dynamo.backend.1",
    address: "tcp://10.0.0.1:7",
    endpoint: "dynamo.backend.handoff",
    fingerprint: "vllm/0.29.0//aa/16/nixl-pull",
    connector: "nixl-pull",
    blockCount: 7,
    blockBytes: 0,
    leaseMs: 28_000,
  };
  const bytes = encodeEngineHandoff(handoff);
  assert.deepEqual(decodeEngineHandoff(bytes), handoff);
  for (let end = 0; end < bytes.length; end++) {
    assert.throws(() => decodeEngineHandoff(bytes.subarray(0, end)), { reason: "malformed-frame" });
  }
  assert.throws(() => decodeEngineHandoff(Buffer.concat([bytes, Buffer.of(0)])), { reason: "malformed-frame" });
  assert.throws(() => decodeHandoff(bytes), { reason: "malformed-frame" });
  const claim = { requestId: "r.1", parameters: { remote_block_ids: [[1, 2]], do_remote_prefill: true } };
  assert.deepEqual(decodeEngineClaim(encodeEngineClaim(claim)), claim);
  for (const text of ["", "[]", "null", '{"requestId":1,"parameters":{}}', '{"requestId":"r","parameters":null}']) {
    assert.throws(() => decodeEngineClaim(Buffer.from(text)), { reason: "malformed-frame" });
  }
});
