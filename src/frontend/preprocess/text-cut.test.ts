import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { SAMPLES, stitchedTexts } from "../../../test/fixtures/corpus/mixed-corpus.ts";
import { MODEL_SKIP, modelArtifact, packageArtifact } from "../../../test/fixtures/corpus/tokenizer-artifacts.ts";
import type { TokenizerArtifact } from "../../model/index.ts";
import { BpeTokenizer } from "./bpe-tokenizer.ts";
import { CUT_BEFORE, findCut } from "./text-cut.ts";

const RAW = { addSpecialTokens: false } as const;

const SOURCES: readonly [string, () => TokenizerArtifact | undefined][] = [
  ["qwen3", () => packageArtifact("qwen3")],
  ["llama3", () => packageArtifact("llama3")],
  ["smollm2", modelArtifact],
];

function cutsOf(text: string): number[] {
  const cuts: number[] = [];
  for (let cut = findCut(text, 1, text.length); cut >= 0; cut = findCut(text, cut + 1, text.length)) cuts.push(cut);
  return cuts;
}

test("a cut is between a letter that NFC leaves alone and a character that ends a run of letters", () => {
  assert.deepEqual(cutsOf("It's 12 o'clock, a. b\n\u00e9 \u0958 x"), [4, 15, 18, 21, 23]);
  assert.deepEqual(cutsOf("人工智能，是。 𠀀 1, ."), [4, 6]);
  assert.equal(findCut("word word", 5, 9), -1);
  assert.equal(findCut("word word", 1, 4), -1);
  assert.equal(findCut("word word", 1, 5), 4);
});

test("no character composes with one of those that a cut stands before, from either side", () => {
  for (const before of CUT_BEFORE) {
    for (let unit = 0; unit < 0x10000; unit++) {
      if (unit >= 0xd800 && unit < 0xe000) continue;
      const character = String.fromCharCode(unit);
      const composed = character.normalize("NFC");
      // A mark after it may be reordered or changed, but the character itself stays.
      assert.equal((before + character).normalize("NFC"), before + composed);
      assert.equal((character + before).normalize("NFC"), composed + before);
    }
  }
});

for (const [name, load] of SOURCES) {
  test(`${name}: the tokens of a text are those of its parts, whatever the cut`, (t) => {
    const artifact = load();
    if (artifact === undefined) return t.skip(MODEL_SKIP);
    const own = BpeTokenizer.tryCreate(artifact)!;
    let cutCount = 0;
    const check = (text: string): void => {
      const whole = [...own.encode(text, RAW)];
      for (const cut of cutsOf(text.toWellFormed())) {
        const parts = [...own.encode(text.slice(0, cut), RAW), ...own.encode(text.slice(cut), RAW)];
        assert.deepEqual(parts, whole, `${JSON.stringify(text)} at ${cut}`);
        cutCount++;
      }
    };
    for (const text of Object.values(SAMPLES).flat()) check(text);
    for (const text of stitchedTexts(17, 20, 200)) check(text);
    const around = fc.oneof(
      fc.constantFrom(...CUT_BEFORE, "  ", "\r\n", "'", "'s", "'l", "'S", "\u0301", "\u0338", "\u1161", "\u11a8"),
      fc.constantFrom(
        "e",
        "\u1100",
        "か\u3099",
        "\u0915\u093c",
        "<|im_end|>",
        "<|",
        "1",
        "12",
        "!",
        "\t",
        "\u00a0",
        "😀",
      ),
      fc.string({ unit: "grapheme", minLength: 1, maxLength: 3 }),
    );
    fc.assert(
      fc.property(
        fc.array(around, { maxLength: 8 }),
        fc.constantFrom("e", "Z", "\u00e9", "\u044f", "人", "\u0958", "\u0915\u093c", "\u1100\u1161", "\u1100", "か"),
        fc.constantFrom(...CUT_BEFORE),
        fc.array(around, { maxLength: 8 }),
        (before, letter, character, after) => check([...before, letter, character, ...after].join("")),
      ),
      { numRuns: 400 },
    );
    assert.ok(cutCount > 500, `${cutCount} cuts`);
  });
}
