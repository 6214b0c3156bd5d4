import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { CACHED_UNITS_MAX, PieceCache } from "./piece-cache.ts";

function unitsOf(text: string): Uint16Array {
  const buffer = Buffer.from(text, "utf16le");
  return new Uint16Array(buffer.buffer, buffer.byteOffset, text.length);
}

function find(
  cache: PieceCache,
  text: string,
  hash = PieceCache.hash(unitsOf(text), 0, text.length),
): number[] | undefined {
  const units = unitsOf(text);
  return cache.find(units, 0, units.length, hash) ? [...cache.ids.subarray(cache.idStart, cache.idEnd)] : undefined;
}

function add(
  cache: PieceCache,
  text: string,
  ids: readonly number[],
  hash = PieceCache.hash(unitsOf(text), 0, text.length),
): void {
  cache.add(unitsOf(text), 0, text.length, hash, Uint32Array.from(ids), 0, ids.length);
}

test("what is found is what was kept for exactly that piece", () => {
  fc.assert(
    fc.property(fc.uniqueArray(fc.string({ unit: "binary", maxLength: 8 }), { maxLength: 60 }), (pieces) => {
      const cache = new PieceCache();
      pieces.forEach((piece, index) => {
        assert.equal(find(cache, piece), undefined);
        add(cache, piece, [index, piece.length]);
      });
      pieces.forEach((piece, index) => assert.deepEqual(find(cache, piece), [index, piece.length]));
    }),
    { numRuns: 60 },
  );
});

test("pieces with one hash do not get each other's tokens, and crafted collisions only miss", () => {
  const cache = new PieceCache();
  for (let index = 0; index < 1_000; index++) add(cache, `p${index}`, [index], 7);
  let kept = 0;
  for (let index = 0; index < 1_000; index++) {
    const found = find(cache, `p${index}`, 7);
    if (found === undefined) continue;
    kept++;
    assert.deepEqual(found, [index]);
  }
  assert.equal(kept, 16);
  assert.equal(find(cache, "other", 7), undefined);
});

test("a full cache forgets and goes on, whether entries, keys or tokens filled it", () => {
  for (const [name, text, ids] of [
    ["entries", (index: number) => `w${index}`, [1]],
    ["keys", (index: number) => String(index).padStart(CACHED_UNITS_MAX, "x"), [1]],
    ["tokens", (index: number) => `w${index}`, Array.from({ length: 100 }, (_, at) => at)],
  ] as const) {
    const cache = new PieceCache();
    let forgotten = false;
    for (let index = 0; index < 40_000; index++) {
      add(cache, text(index), ids);
      if (index % 1_000 === 0) assert.deepEqual(find(cache, text(index)), [...ids], name);
      if (index === 39_999) forgotten = find(cache, text(0)) === undefined;
    }
    assert.ok(forgotten, name);
  }
});
