import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { TextCache } from "./text-cache.ts";

function idsOf(text: string): Uint32Array {
  return Uint32Array.from({ length: Math.ceil(text.length / 4) }, (_, index) => text.charCodeAt(index * 4));
}

/** As it comes with traffic: looked up, computed when missing, offered. True when it was there. */
function pass(cache: TextCache, text: string): boolean {
  const found = cache.find(text);
  if (found === undefined) cache.offer(text, idsOf(text));
  else assert.deepEqual(found, idsOf(text));
  return found !== undefined;
}

test("text cache: a text is kept when it comes the second time", () => {
  const cache = new TextCache(1e6);
  assert.deepEqual(
    [1, 2, 3, 4].map(() => pass(cache, "some text")),
    [false, false, true, true],
  );
  assert.equal(pass(cache, "some texts"), false);
});

test("text cache: what is found is what was kept for exactly that text, and never more than the budget is held", () => {
  const text = fc.oneof(
    fc.string({ unit: "binary", maxLength: 400 }),
    // Alike in length and in all but one unit.
    fc
      .tuple(fc.nat(299), fc.constantFrom("a", "é", "中"))
      .map(([at, unit]) => "x".repeat(at) + unit + "x".repeat(299 - at)),
  );
  fc.assert(
    fc.property(fc.array(text, { maxLength: 60 }), fc.integer({ min: 0, max: 20_000 }), (texts, bytesMax) => {
      const cache = new TextCache(bytesMax);
      for (const [index] of texts.entries()) {
        for (const earlier of texts.slice(Math.max(0, index - 3), index + 1)) pass(cache, earlier);
        assert.ok(cache.use.bytes <= bytesMax, `${cache.use.bytes} of ${bytesMax}`);
      }
    }),
    { numRuns: 100 },
  );
});

test("text cache: what is used stays while others come and go", () => {
  const cache = new TextCache(100_000);
  const shared = "shared ".repeat(100);
  pass(cache, shared);
  pass(cache, shared);
  for (let round = 0; round < 2_000; round++) {
    const own = `${round} `.repeat(100);
    pass(cache, own);
    pass(cache, own);
    assert.ok(pass(cache, shared), `round ${round}`);
  }
  assert.equal(pass(cache, "0 ".repeat(100)), false);
  assert.ok(cache.use.bytes > 40_000);
});

test("text cache: texts that come once leave it as it is", () => {
  const cache = new TextCache(100_000);
  for (let round = 0; round < 500; round++) pass(cache, `${round} `.repeat(50));
  assert.equal(cache.use.bytes, 0);
});

test("text cache: tokens that the caller writes over afterwards stay as they were", () => {
  const cache = new TextCache(100_000);
  const ids = Uint32Array.of(1, 2, 3);
  for (let time = 0; time < 2; time++) cache.offer("abc", ids);
  ids.fill(9);
  assert.deepEqual(cache.find("abc"), Uint32Array.of(1, 2, 3));
});
