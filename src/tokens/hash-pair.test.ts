import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import {
  addHashPairs,
  compareHashPairs,
  hashFromBigInt,
  hashToBigInt,
  hashToHex,
  tryHashFromHex,
} from "./hash-pair.ts";

const aHash = fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn });

void test("hash pair: hex and BigInt round trips keep all 64 bits", () => {
  fc.assert(
    fc.property(aHash, (value) => {
      const [lo, hi] = hashFromBigInt(value);
      assert.equal(hashToBigInt(lo, hi), value);
      assert.equal(hashToHex(lo, hi), value.toString(16).padStart(16, "0"));
      assert.deepEqual(tryHashFromHex(hashToHex(lo, hi)), [lo, hi]);
      assert.deepEqual(hashFromBigInt(BigInt.asIntN(64, value)), [lo, hi]);
      // Typed arrays of signed numbers give the same text.
      assert.equal(hashToHex(lo | 0, hi | 0), hashToHex(lo, hi));
    }),
  );
});

void test("hash pair: sums wrap and order is unsigned, as BigInt's", () => {
  fc.assert(
    fc.property(aHash, aHash, (a, b) => {
      const sum = addHashPairs(hashFromBigInt(a), hashFromBigInt(b));
      assert.equal(hashToBigInt(...sum), BigInt.asUintN(64, a + b));
      assert.equal(Math.sign(compareHashPairs(hashFromBigInt(a), hashFromBigInt(b))), a < b ? -1 : a > b ? 1 : 0);
    }),
  );
});

void test("hash pair: what is not 16 hex digits is no hash", () => {
  for (const text of ["", "1", "0x12345678901234", "123456789012345g", "12345678901234567", " 23456789012345 "]) {
    assert.equal(tryHashFromHex(text), undefined);
  }
});
