import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { SAMPLES, stitchedTexts } from "../../../test/fixtures/corpus/mixed-corpus.ts";
import type { HfStep } from "../../model/index.ts";
import { createPreTokenizer, pieceLengths, scanDigitSegment, type PreTokenizer } from "./pre-tokenizer.ts";

const BYTES_ONLY: HfStep = { type: "ByteLevel", add_prefix_space: false, use_regex: false };
const GPT2 = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;
const QWEN2 = String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`;
const LLAMA3 = QWEN2.replace(String.raw`|\p{N}|`, String.raw`|\p{N}{1,3}|`);

function split(pattern: string): HfStep {
  return { type: "Split", pattern: { Regex: pattern }, behavior: "Isolated", invert: false };
}

function sequence(...pretokenizers: HfStep[]): HfStep {
  return { type: "Sequence", pretokenizers };
}

function scanned(preTokenizer: PreTokenizer, text: string): string[] {
  const all = Uint16Array.from({ length: text.length }, (_, index) => text.charCodeAt(index));
  const pieces: string[] = [];
  for (let start = 0; start < all.length;) {
    const end = preTokenizer.digitsApart ? scanDigitSegment(all, start, all.length) : all.length;
    while (start < end) {
      const pieceEnd = preTokenizer.scan!(all, start, end);
      assert.ok(pieceEnd > start && pieceEnd <= end, `a piece of ${start} to ${pieceEnd} within ${end}`);
      pieces.push(text.slice(start, pieceEnd));
      start = pieceEnd;
    }
  }
  return pieces;
}

/** The pattern itself, with the ASCII case folding that the reference library gives the contractions. */
function matched(patterns: readonly string[], text: string): string[] {
  const compiled = patterns.map((pattern) => {
    const ascii = pattern.replace(
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
      "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL]{2}|'[dD])",
    );
    const source = ascii.replaceAll(String.raw`\s`, String.raw`\p{White_Space}`);
    return new RegExp(source.replaceAll(String.raw`\S`, String.raw`\P{White_Space}`), "gu");
  });
  const pieces: string[] = [];
  for (const length of pieceLengths(text, compiled)) {
    const done = pieces.reduce((sum, piece) => sum + piece.length, 0);
    pieces.push(text.slice(done, done + length));
  }
  return pieces;
}

const KNOWN: readonly [string, HfStep, readonly string[]][] = [
  ["GPT-2", { type: "ByteLevel", add_prefix_space: false, use_regex: true }, [GPT2]],
  ["Qwen 2", sequence(split(QWEN2), BYTES_ONLY), [QWEN2]],
  ["Llama 3", sequence(split(LLAMA3), BYTES_ONLY), [LLAMA3]],
  [
    "SmolLM",
    sequence(
      { type: "Digits", individual_digits: true },
      { type: "ByteLevel", add_prefix_space: false, use_regex: true },
    ),
    [String.raw`\p{N}`, GPT2],
  ],
];

/** Characters at which the alternatives of the patterns part. */
const tricky = fc.constantFrom(
  ...Array.from(" \t\n\r'sStTrRvVeElLmMdDaZ09.!-_<|>\u00a0\u0085\ufeff\u2028\u3000éſ中½²٣\u0301\u200d😀𝐇𝟙𠀀"),
);

for (const [name, step, patterns] of KNOWN) {
  test(`the ${name} scanner cuts as the pattern does, for any mix of the characters that matter`, () => {
    const preTokenizer = createPreTokenizer(step);
    assert.ok(preTokenizer?.scan !== undefined);
    fc.assert(
      fc.property(
        fc.array(fc.oneof({ weight: 9, arbitrary: tricky }, fc.string({ unit: "binary", maxLength: 2 })), {
          maxLength: 40,
        }),
        (parts) => {
          const text = parts.join("").toWellFormed();
          assert.deepEqual(scanned(preTokenizer, text), matched(patterns, text));
        },
      ),
      { numRuns: 1_500 },
    );
  });

  test(`the ${name} scanner cuts the corpus as the pattern does`, () => {
    const preTokenizer = createPreTokenizer(step)!;
    for (const text of [...Object.values(SAMPLES).flat(), ...stitchedTexts(3, 40, 400)]) {
      assert.deepEqual(scanned(preTokenizer, text.toWellFormed()), matched(patterns, text.toWellFormed()));
    }
  });
}

test("the scanners class every assigned and unassigned character as the pattern does", () => {
  const preTokenizer = createPreTokenizer(sequence(split(QWEN2), BYTES_ONLY))!;
  for (let from = 0; from < 0x110000; from += 0x1000) {
    let text = "";
    for (let codePoint = from; codePoint < from + 0x1000; codePoint++) text += String.fromCodePoint(codePoint);
    text = text.toWellFormed();
    const pieces = scanned(preTokenizer, text);
    const pattern = new RegExp(matchedSource(), "gu");
    assert.deepEqual(pieces, text.match(pattern), `from U+${from.toString(16)}`);
  }
});

function matchedSource(): string {
  return QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sStTmMdD])")
    .replaceAll(String.raw`\s`, String.raw`\p{White_Space}`)
    .replaceAll(String.raw`\S`, String.raw`\P{White_Space}`);
}

test("an unknown pattern runs as a regular expression, in the order of the steps", () => {
  const preTokenizer = createPreTokenizer(
    sequence(split(String.raw`\p{N}{1,3}`), split("[一-龥]+"), split(String.raw`\s+|\S+`), BYTES_ONLY),
  )!;
  assert.equal(preTokenizer.scan, undefined);
  const text = "a1234 中文b\u0085c";
  const pieces: string[] = [];
  let done = 0;
  for (const length of pieceLengths(text, preTokenizer.patterns)) pieces.push(text.slice(done, (done += length)));
  assert.deepEqual(pieces, ["a", "123", "4", " ", "中文", "b", "\u0085", "c"]);
});

test("steps and patterns that JavaScript would read differently are left to the library", () => {
  for (const pattern of [String.raw`\w+`, "a.b", "^a", "a$", "[a&&b]", "a++", "(?>a)", String.raw`\h`, "[[:alpha:]]"]) {
    assert.equal(createPreTokenizer(sequence(split(pattern), BYTES_ONLY)), undefined, pattern);
  }
  assert.equal(createPreTokenizer(null), undefined);
  assert.equal(createPreTokenizer({ type: "Metaspace" }), undefined);
  assert.equal(createPreTokenizer({ type: "ByteLevel", add_prefix_space: true }), undefined);
  assert.equal(createPreTokenizer(sequence({ ...split("a"), behavior: "Removed" }, BYTES_ONLY)), undefined);
  assert.equal(createPreTokenizer(sequence({ ...split("a"), invert: true }, BYTES_ONLY)), undefined);
});
