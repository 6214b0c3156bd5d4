import assert from "node:assert/strict";
import { test } from "node:test";
import { vllmBlockDigest, vllmEventHash, vllmEventHashes, vllmNoneHash } from "./vllm-block-hash.ts";

/** Values seen on live servers (0.29.0, PYTHONHASHSEED=0) or computed with CPython's pickle and canonical CBOR. */
test("vLLM block hashes: the digest in front of the first block, by seed and algorithm", () => {
  const cases = [
    ["sha256_cbor", "0", "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e"],
    ["sha256", "0", "1973e23848344dc43a988a9b478663803cfffe1243480253f9a3cf004b14aa7c"],
    ["sha256_cbor", "vllm-none-hash", "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"],
    ["sha256", "vllm-none-hash", "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198"],
  ] as const;
  for (const [algorithm, seed, wanted] of cases) assert.equal(vllmNoneHash(algorithm, seed).toString("hex"), wanted);
});

test("vLLM block hashes: as a live server told them", () => {
  const tokenIds = Uint32Array.from({ length: 64 }, (_, i) => 500 + i);
  assert.deepEqual(vllmEventHashes(tokenIds, 32, { algorithm: "sha256", seed: "0" }), [
    10_940_333_362_545_548_071n,
    6_082_417_646_245_256_544n,
  ]);
  const prompt = Uint32Array.from({ length: 70 }, (_, i) => 300 + i);
  assert.deepEqual(vllmEventHashes(prompt, 32, { algorithm: "sha256_cbor", seed: "0" }), [0x4654182a61f130b3n, 0xf0299813ab315e5bn]); // prettier-ignore
  const salted = vllmEventHashes(prompt, 32, { algorithm: "sha256_cbor", seed: "0", salt: "dynamo-cache-salt:tenant" });
  assert.deepEqual(salted, [0x59d849fe367a0512n, 0xf83437e1f3b0d33an]);
});

test("vLLM block hashes: a signed value of another implementation is the same one", () => {
  const digest = vllmBlockDigest("sha256_cbor", vllmNoneHash("sha256_cbor", "vllm-none-hash"), [1, 2, 3, 4]);
  assert.equal(BigInt.asIntN(64, vllmEventHash(digest)), -8_885_242_862_429_187_823n);
});
