import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { pino } from "pino";
import { vllmEventHashes, vllmNoneHash } from "./vllm-block-hash.ts";
import { VllmHashCheck } from "./vllm-hash-check.ts";
import type { VllmStored } from "./vllm-events.ts";

const BLOCK = 4;

/** A sequence's first event, of an engine with that recipe. */
function stored(
  { algorithm = "sha256", seed = "0", salt }: { algorithm?: "sha256" | "sha256_cbor"; seed?: string; salt?: string } = {},
  changes: Partial<VllmStored> = {},
): VllmStored {
  const tokenIds = Uint32Array.from({ length: 3 * BLOCK }, (_, i) => 300 + i * i);
  const recipe = { algorithm, seed, ...(salt === undefined ? {} : { salt }) };
  return {
    type: "stored",
    hashes: vllmEventHashes(tokenIds, BLOCK, recipe).flatMap((hash) => [Number(hash & 0xffff_ffffn), Number(hash >> 32n)]),
    parent: undefined,
    tokenIds,
    isPaired: false,
    blockSize: BLOCK,
    loraName: undefined,
    cacheSalt: undefined,
    extraKeys: salt === undefined ? [] : [[{ text: salt, isTuple: false }], undefined, undefined],
    medium: "GPU",
    group: { index: 0, kind: "full_attention", locality: undefined },
    ...changes,
  };
} // prettier-ignore

function checkWith(options: { algorithm?: string; seed?: string } = {}) {
  const lines: string[] = [];
  const logger = pino({ level: "warn" }, { write: (line: string) => void lines.push(line) });
  return { check: new VllmHashCheck({ logger, ...options }), lines };
}

describe("vLLM hash check", () => {
  test("the digest of a process without a seed is that of vLLM's own word", () => {
    assert.equal(
      vllmNoneHash("sha256_cbor", "vllm-none-hash").toString("hex"),
      "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0",
    );
    assert.equal(
      vllmNoneHash("sha256", "vllm-none-hash").toString("hex"),
      "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198",
    );
  });

  test("finds out which recipe the engine has: algorithm and seed", () => {
    for (const recipe of [{}, { algorithm: "sha256_cbor" as const }, { seed: "vllm-none-hash" }, { seed: "1234" }]) {
      const { check, lines } = checkWith({ seed: "1234" });
      assert.equal(check.state, "unchecked");
      check.observe([stored(recipe)]);
      const seed = recipe.seed === "vllm-none-hash" ? null : (recipe.seed ?? "0");
      assert.deepEqual(check.describe(), { state: "match", algorithm: recipe.algorithm ?? "sha256", seed, checked: 1, mismatches: 0 }); // prettier-ignore
      assert.deepEqual(lines, []);
    }
  });

  test("another seed is told once, with the way out, and counted", () => {
    const { check, lines } = checkWith({ algorithm: "sha256" });
    check.observe([stored({ seed: "random" })]);
    for (let i = 0; i < 1_000; i++) check.observe([stored({ seed: "random" })]);
    assert.equal(check.state, "mismatch");
    assert.equal(check.cause, "seed");
    assert.equal(lines.length, 1);
    assert.match(lines[0]!, /set PYTHONHASHSEED=0 for every server/);
    assert.ok(check.mismatches > 1 && check.mismatches < 10, `${check.mismatches}: sampled`);
  });

  test("an unknown recipe is the algorithm or the seed; one that cannot be computed here is not looked at", () => {
    const unknown = checkWith();
    unknown.check.observe([stored({}, { hashes: [1, 2, 3, 4, 5, 6] })]);
    assert.equal(unknown.check.cause, "algorithm");
    const { check, lines } = checkWith({ algorithm: "xxhash" });
    check.observe([stored()]);
    assert.deepEqual([check.state, check.checked, lines.length], ["not-reproducible", 0, 0]);
  });

  test("salts enter as they are told; where another form of them was hashed, that is the cause", () => {
    const { check, lines } = checkWith();
    check.observe([stored({ salt: "dynamo-cache-salt:t" })]);
    assert.equal(check.state, "match");
    const tagged = checkWith();
    tagged.check.observe([stored({}, { extraKeys: [[{ text: "t", isTuple: false }]] })]);
    assert.equal(tagged.check.cause, "extra-keys");
    assert.equal(lines.length, 0);
  });

  test("an engine that comes back with another seed is noticed, and then known by it", () => {
    const { check, lines } = checkWith();
    check.observe([stored()]);
    const other = stored({ seed: "vllm-none-hash" });
    for (let i = 0; i < 10; i++) check.observe([other]);
    assert.equal(check.cause, "changed");
    for (let i = 0; i < 300; i++) check.observe([other]);
    assert.equal(check.state, "match");
    assert.equal(lines.length, 1);
  });

  test("later blocks, pairs and other groups' tokens are left alone", () => {
    const { check } = checkWith();
    check.observe([
      stored({}, { parent: [1, 2] }),
      stored({}, { isPaired: true }),
      stored({}, { blockSize: 2 }),
      stored({}, { tokenIds: new Uint32Array(0) }),
      { type: "cleared" },
    ]);
    assert.equal(check.checked, 0);
  });
});
