import assert from "node:assert/strict";
import { test } from "node:test";
import { hashFromBigInt, hashToHex } from "./hash-pair.ts";
import { xxh3_64, xxh3_64OfPairInto } from "./xxh3.ts";

/** The input of xxHash's own sanity test. */
function sanityBytes(length: number): Uint8Array {
  let state = 2654435761n;
  return Uint8Array.from({ length }, () => {
    const byte = Number(state >> 56n);
    state = BigInt.asUintN(64, state * 11400714785074694797n);
    return byte;
  });
}

const BYTES = sanityBytes(2400);
const SANITY_SEED = hashFromBigInt(0x9e3779b185ebca8dn);

/** [length, without seed, with the sanity seed], from xxHash 0.8's reference implementation. */
const VECTORS: readonly (readonly [number, string, string])[] = [
  [0, "2d06800538d394c2", "a8a6b918b2f0364a"],
  [1, "c44bdff4074eecdb", "032be332dd766ef8"],
  [6, "27b56a84cd2d7325", "84589c116ab59ab9"],
  [12, "a713daf0dfbb77e7", "e7303e1b2336de0e"],
  [24, "a3fe70bf9d3510eb", "850e80fc35bdd690"],
  [48, "397da259ecba1f11", "adc2cbaa44acc616"],
  [80, "bcdefbbb2c47c90a", "c6dd0cb699532e73"],
  [195, "cd94217ee362ec3a", "ba68003d370cb3d9"],
  [403, "cdeb804d65c6dea4", "6259f6ecfd6443fd"],
  [512, "617e49599013cb6b", "3ce457de14c27708"],
  [2048, "dd59e2c3a5f038e0", "66f81670669ababc"],
  [2240, "6e73a90539cf2948", "757ba8487d1b5247"],
  [2367, "cb37aeb9e5d361ed", "d2db3415b942b42a"],
];

void test("xxh3: the reference implementation's vectors", () => {
  for (const [length, plain, seeded] of VECTORS) {
    const bytes = BYTES.subarray(0, length);
    assert.equal(hashToHex(...xxh3_64(bytes, [0, 0])), plain, `${length} bytes`);
    assert.equal(hashToHex(...xxh3_64(bytes, SANITY_SEED)), seeded, `${length} bytes, seeded`);
  }
});

void test("xxh3: every length from 0 to 2,400, seeded and not, chained into one golden value", () => {
  const chain = new Uint32Array(2);
  for (let length = 0; length <= 2400; length++) {
    const seed = length % 3 === 0 ? 0n : BigInt(length) * 0x9e3779b185ebca87n;
    const [lo, hi] = xxh3_64(BYTES.subarray(0, length), hashFromBigInt(seed));
    xxh3_64OfPairInto(chain[0]!, chain[1]!, lo, hi, 0, 0, chain, 0);
  }
  // The same loop over the reference implementation.
  assert.equal(hashToHex(chain[0]!, chain[1]!), "d73e5f01f26eae58");
});

void test("xxh3: a view into a larger buffer hashes as its own bytes do", () => {
  const view = BYTES.subarray(7, 7 + 300);
  assert.deepEqual(xxh3_64(view, [5, 9]), xxh3_64(view.slice(), [5, 9]));
});
