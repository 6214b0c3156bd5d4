import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { SAMPLES } from "../../../test/fixtures/corpus/mixed-corpus.ts";
import { packageArtifact } from "../../../test/fixtures/corpus/tokenizer-artifacts.ts";
import { BYTE_TOKENS, byteArtifact } from "../../model/index.ts";
import { loadTokenizer, type Tokenizer } from "../preprocess/index.ts";
import { Detokenizer } from "./detokenizer.ts";

const bytesTokenizer = await loadTokenizer(byteArtifact());

function detokenize(tokenizer: Tokenizer, chunks: readonly (readonly number[])[]): string[] {
  const detokenizer = new Detokenizer(tokenizer, { skipSpecialTokens: true });
  return [...chunks.map((chunk) => detokenizer.push(Uint32Array.from(chunk), chunk.length)), detokenizer.flush()];
}

/** All bytes decoded at once, special tokens left out. */
function whole(tokenizer: Tokenizer, ids: readonly number[]): string {
  const bytes = ids.filter((id) => !tokenizer.isSpecial(id)).map((id) => tokenizer.tokenBytes(id));
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Buffer.concat(bytes));
}

test("a text comes back from its tokens, whole and split at every place", async () => {
  const tokenizer = await loadTokenizer(packageArtifact("llama3"));
  for (const sample of Object.values(SAMPLES).flat()) {
    if (sample.includes("<|")) continue; // Special tokens give no text.
    const ids = [...tokenizer.encode(sample, { addSpecialTokens: false })];
    const expected = sample.toWellFormed();
    assert.equal(detokenize(tokenizer, [ids]).join(""), expected);
    assert.equal(
      detokenize(
        tokenizer,
        ids.map((id) => [id]),
      ).join(""),
      expected,
    );
    for (let at = 1; at < ids.length; at++) {
      assert.equal(detokenize(tokenizer, [ids.slice(0, at), ids.slice(at)]).join(""), expected);
    }
  }
});

test("no push ends in half a character", () => {
  fc.assert(
    // The mark of what cannot be read is a character that may stand in a text, too.
    fc.property(
      fc.string({ unit: "grapheme", maxLength: 20 }).filter((text) => !text.includes("\uFFFD")),
      (text) => {
        const ids = [...Buffer.from(text)];
        const pushes = detokenize(
          bytesTokenizer,
          ids.map((id) => [id]),
        );
        assert.equal(pushes.join(""), text);
        for (const push of pushes) assert.ok(push.isWellFormed() && !push.includes("\uFFFD"), JSON.stringify(push));
      },
    ),
    { numRuns: 300 },
  );
});

test("any bytes, cut anywhere, with special tokens between, give what decoding them at once gives", () => {
  const interesting = fc.constantFrom(
    0x00,
    0x41,
    0x7f,
    0x80,
    0x8f,
    0x90,
    0x9f,
    0xa0,
    0xbb,
    0xbf,
    0xc0,
    0xc1,
    0xc2,
    0xdf,
    0xe0,
    0xe2,
    0xed,
    0xef,
    0xf0,
    0xf1,
    0xf3,
    0xf4,
    0xf5,
    0xff,
    BYTE_TOKENS.imEnd,
  );
  const token = fc.oneof({ weight: 5, arbitrary: interesting }, fc.integer({ min: 0, max: 258 }));
  fc.assert(
    fc.property(fc.array(fc.array(token, { maxLength: 5 }), { maxLength: 12 }), (chunks) => {
      assert.equal(detokenize(bytesTokenizer, chunks).join(""), whole(bytesTokenizer, chunks.flat()));
    }),
    { numRuns: 3_000 },
  );
});

test("random tokens of a real vocabulary give what decoding their bytes at once gives", async () => {
  const tokenizer = await loadTokenizer(packageArtifact("qwen3"));
  const partial: number[] = [];
  for (let id = 0; id < tokenizer.vocabularySize && partial.length < 400; id++) {
    if (Buffer.from(tokenizer.tokenBytes(id)).toString().includes("\uFFFD")) partial.push(id);
  }
  assert.equal(partial.length, 400);
  const token = fc.oneof(fc.constantFrom(...partial), fc.integer({ min: 0, max: tokenizer.vocabularySize + 10 }));
  fc.assert(
    fc.property(fc.array(token, { maxLength: 30 }), (ids) => {
      assert.equal(
        detokenize(
          tokenizer,
          ids.map((id) => [id]),
        ).join(""),
        whole(tokenizer, ids),
      );
    }),
    { numRuns: 1_000 },
  );
});

test("a byte order mark is text like any other", () => {
  assert.equal(detokenize(bytesTokenizer, [[0xef], [0xbb, 0xbf, 0x61]]).join(""), "\uFEFFa");
});

test("an unfinished character becomes one U+FFFD at the end, and the end can come twice", () => {
  const detokenizer = new Detokenizer(bytesTokenizer, { skipSpecialTokens: true });
  assert.equal(detokenizer.push(Uint32Array.of(0x61, 0xf0, 0x9f, 0x98), 4), "a");
  assert.equal(detokenizer.flush(), "\uFFFD");
  assert.equal(detokenizer.flush(), "");
});

test("only the first `count` ids are read", () => {
  const detokenizer = new Detokenizer(bytesTokenizer, { skipSpecialTokens: true });
  assert.equal(detokenizer.push(Uint32Array.of(0x61, 0x62, 0x63), 2), "ab");
});

test("ids outside the vocabulary give no text", () => {
  assert.equal(detokenize(bytesTokenizer, [[0x61, 5_000, 4_294_967_295, 0x62]]).join(""), "ab");
});
