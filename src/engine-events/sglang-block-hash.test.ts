import assert from "node:assert/strict";
import { test } from "node:test";
import { sglangBlockDigest, sglangEventHash } from "./sglang-block-hash.ts";

test("SGLang's hash of a page is the one it publishes", () => {
  // From its own tests: page size 4, tokens 1 to 4.
  const first = sglangBlockDigest(undefined, [1, 2, 3, 4]);
  assert.equal(sglangEventHash(first), -3_488_128_144_981_237_669n);
  const second = sglangBlockDigest(first, [1, 2, 3, 4]);
  assert.notEqual(sglangEventHash(second), sglangEventHash(first), "the same tokens elsewhere are another page");
  assert.notDeepEqual(sglangBlockDigest(undefined, [1, 2, 3, 4], "a"), sglangBlockDigest(undefined, [1, 2, 3, 4], "b"));
});
