import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test, type TestContext } from "node:test";
import { Tokenizer as Library } from "@huggingface/tokenizers";
import fc from "fast-check";
import { SAMPLES, prose, stitchedTexts } from "../../../test/fixtures/corpus/mixed-corpus.ts";
import {
  byteArtifact,
  type HfAddedToken,
  type HfBpeModel,
  type HfStep,
  type TokenizerArtifact,
} from "../../model/index.ts";
import { systemClock } from "../../std/index.ts";
import { BpeTokenizer } from "./bpe-tokenizer.ts";
import { ENCODE_LIMITS } from "./encode-limits.ts";
import { MODEL_SKIP, modelArtifact, packageArtifact } from "../../../test/fixtures/corpus/tokenizer-artifacts.ts";

const RAW = { addSpecialTokens: false } as const;
const GPT2 = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;

const SOURCES: readonly [keyof typeof GOLDEN, () => TokenizerArtifact | undefined][] = [
  ["qwen3", () => packageArtifact("qwen3")],
  ["llama3", () => packageArtifact("llama3")],
  ["smollm2", modelArtifact],
];

const GOLDEN = JSON.parse(
  readFileSync(new URL("../../../test/fixtures/corpus/golden-token-ids.json", import.meta.url), "utf8"),
) as Record<"qwen3" | "llama3" | "smollm2", { tokens: number; sha256: string }>;

interface Pair {
  readonly own: BpeTokenizer;
  readonly library: Library;
}

const pairs = new Map<string, Pair>();

/** Both encoders of one model, or a skipped test. */
function pairOf(t: TestContext, name: string, load: () => TokenizerArtifact | undefined): Pair | undefined {
  let pair = pairs.get(name);
  if (pair === undefined) {
    const artifact = load();
    if (artifact === undefined) {
      t.skip(MODEL_SKIP);
      return undefined;
    }
    const own = BpeTokenizer.tryCreate(artifact);
    assert.ok(own !== undefined, "our own encoder takes this model");
    const json = {
      ...artifact.tokenizerJson,
      post_processor: null,
      pre_tokenizer: asSplits(artifact.tokenizerJson.pre_tokenizer),
    };
    pair = { own, library: new Library(json, {}) };
    pairs.set(name, pair);
  }
  return pair;
}

/**
 * The JavaScript library uses JavaScript's \d and \s in `Digits` and in the regular expression of `ByteLevel`, but
 * translates those of a `Split` to what the native library means. So the oracle gets both as `Split`.
 */
function asSplits(step: HfStep | null): HfStep | null {
  if (step?.type === "Sequence") {
    const inner = (step.pretokenizers as HfStep[]).map(asSplits);
    return { type: "Sequence", pretokenizers: inner };
  }
  const split = (pattern: string): HfStep => ({
    type: "Split",
    pattern: { Regex: pattern },
    behavior: "Isolated",
    invert: false,
  });
  if (step?.type === "Digits") return split(String.raw`\p{N}`);
  if (step?.type !== "ByteLevel" || step.use_regex === false) return step;
  return { type: "Sequence", pretokenizers: [split(GPT2), { ...step, use_regex: false }] };
}

function assertSame(pair: Pair, text: string): void {
  const expected = pair.library.encode(text, { add_special_tokens: false }).ids;
  const actual = pair.own.encode(text, RAW);
  if (actual.length === expected.length && expected.every((id: number, index: number) => id === actual[index])) return;
  const at = expected.findIndex((id: number, index: number) => id !== actual[index]);
  const show = (ids: ArrayLike<number>): string =>
    JSON.stringify(
      Array.from(ids)
        .slice(Math.max(0, at - 1), at + 4)
        .map((id) => pair.library.id_to_token(id)),
    );
  assert.fail(`token ${at} of ${JSON.stringify(text)}: ${show(actual)} instead of ${show(expected)}`);
}

for (const [name, load] of SOURCES) {
  test(`${name}: every sample of the corpus encodes as the native library did`, (t) => {
    const pair = pairOf(t, name, load);
    if (pair === undefined) return;
    const hash = createHash("sha256");
    let tokens = 0;
    for (const text of Object.values(SAMPLES).flat()) {
      const ids = pair.own.encode(text, RAW);
      hash.update(new Uint8Array(ids.buffer, ids.byteOffset, ids.byteLength));
      tokens += ids.length;
    }
    assert.deepEqual({ tokens, sha256: hash.digest("hex") }, GOLDEN[name]);
  });

  test(`${name}: samples, stitched texts and their repetition from the cache encode as the library does`, (t) => {
    const pair = pairOf(t, name, load);
    if (pair === undefined) return;
    const texts = [...Object.values(SAMPLES).flat(), ...stitchedTexts(11, 60, 500)];
    for (const text of [...texts, ...texts.slice(0, 40)]) assertSame(pair, text);
  });

  test(`${name}: any text encodes as the library does, and decodes to itself`, (t) => {
    const pair = pairOf(t, name, load);
    if (pair === undefined) return;
    const part = fc.oneof(
      fc.string({ unit: "grapheme", maxLength: 12 }),
      fc.string({ unit: "binary-ascii", maxLength: 12 }),
      fc.constantFrom(
        ...Object.values(SAMPLES)
          .flat()
          .map((sample) => sample.slice(0, 24)),
      ),
      fc.constantFrom(
        "<|im_end|>",
        "<|eot_id|>",
        " ",
        "\n",
        "'s",
        "\ud800",
        "\udfff",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
      ),
    );
    fc.assert(
      fc.property(fc.array(part, { maxLength: 12 }), (parts) => {
        const text = name === "smollm2" ? parts.join("").replace(SMOLLM2_LACKS, "") : parts.join("");
        assertSame(pair, text);
        const bytes = Buffer.concat(Array.from(pair.own.encode(text, RAW), (id) => pair.own.tokenBytes(id)));
        const wellFormed = text.toWellFormed();
        assert.equal(bytes.toString("utf8"), name === "qwen3" ? composed(pair.own, wellFormed) : wellFormed);
      }),
      { numRuns: 120 },
    );
  });

  test(`${name}: long pieces, which use the heap, encode as the library does`, (t) => {
    const pair = pairOf(t, name, load);
    if (pair === undefined) return;
    for (const text of [
      "a".repeat(3_001),
      "ab".repeat(700) + "😀".repeat(300),
      "Donaudampfschifffahrtsgesellschaft".repeat(30),
      " ".repeat(2_000) + "x",
      "\n".repeat(1_500),
      "。、".repeat(400),
      "人工智能是计算机科学的一个分支".repeat(60),
      "=-".repeat(500),
      prose(1, 800).replace(/[^a-z]/g, ""),
    ]) {
      assertSame(pair, text);
    }
  });

  test(`${name}: encoding in slices gives the same tokens`, async (t) => {
    const pair = pairOf(t, name, load);
    if (pair === undefined) return;
    const text = stitchedTexts(5, 30, 4_000).join("") + "x".repeat(20_000) + prose(2, 50_000);
    assert.deepEqual(await pair.own.encodeSliced(text, RAW), pair.own.encode(text, RAW));
  });
}

/** A long text changed a little at random places, as prompts that share parts of it are. */
function edited(text: string, edits: readonly (readonly [number, number, string])[]): string {
  for (const [at, removed, inserted] of edits) {
    const index = Math.floor(at * text.length);
    text = text.slice(0, index) + inserted + text.slice(index + removed);
  }
  return text;
}

for (const [name, load] of SOURCES) {
  test(`${name}: with a text cache any sequence of prompts gets the tokens it gets without`, async (t) => {
    const own = pairOf(t, name, load)?.own;
    if (own === undefined) return;
    // Small enough that entries come and go.
    const cached = BpeTokenizer.tryCreate(load()!, systemClock, 100_000)!;
    const base = [
      prose(3, 12_000),
      stitchedTexts(23, 8, 3_000).join(""),
      "人工智能是计算机科学的一个分支，它企图了解智能的实质。".repeat(400),
      "q".repeat(20_000) + " " + prose(4, 9_000),
      `${prose(5, 4_090)}e\u0301 \u1100\u1161, x<|im_end|>\u0301 ${prose(6, 5_000)}`,
    ];
    const insertion = fc.constantFrom(
      ..."x| |, |.\n|\u0301|\u0338|\u11a8|<|im_end|>|<|eot_id|>|<|im_|\ud800|😀|中，|7|'s|\n\n |".split("|"),
      "<|im_start|>user\n",
      "   ",
    );
    const edit = fc.tuple(fc.double({ min: 0, max: 1, noNaN: true }), fc.nat(3), insertion);
    const prompt = fc.tuple(fc.constantFrom(...base), fc.constantFrom(...base), fc.array(edit, { maxLength: 4 }));
    await fc.assert(
      fc.asyncProperty(fc.array(prompt, { maxLength: 3 }), async (prompts) => {
        for (const [first, second, edits] of prompts) {
          const text = edited(first + second.slice(0, 5_000), edits);
          const expected = own.encode(text, RAW);
          // Computed, kept, and found.
          for (let time = 0; time < 3; time++) assert.deepEqual(cached.encode(text, RAW), expected);
          assert.deepEqual(await cached.encodeSliced(text, RAW), expected);
        }
      }),
      { numRuns: 25 },
    );
    const { cachedTokens, uncachedTokens, bytes } = cached.cacheUse!;
    assert.ok(cachedTokens > uncachedTokens / 20, `${cachedTokens} and ${uncachedTokens}`);
    assert.ok(bytes > 0 && bytes <= 100_000);
  });
}

test("prompts encoded in slices side by side do not mix through the cache", async () => {
  const cached = BpeTokenizer.tryCreate(packageArtifact("llama3"), systemClock, 1e6)!;
  const plain = someTokenizer();
  const shared = prose(7, 60_000);
  const texts = Array.from({ length: 12 }, (_, index) => `${shared} ${index} ${prose(index % 5, 30_000)}`);
  const all = await Promise.all([...texts, ...texts].map((text) => cached.encodeSliced(text, RAW)));
  [...texts, ...texts].forEach((text, index) => assert.deepEqual(all[index], plain.encode(text, RAW)));
  assert.equal(cached.cacheUse!.hits + cached.cacheUse!.misses, 24);
  const tokens = all.reduce((sum, ids) => sum + ids.length, 0);
  assert.equal(cached.cacheUse!.cachedTokens + cached.cacheUse!.uncachedTokens, tokens);
});

/**
 * Characters with bytes that SmolLM2's vocabulary lacks. The native library drops those bytes before merging and so do we;
 * the JavaScript one drops them afterwards.
 */
const SMOLLM2_LACKS = new RegExp(String.raw`[\x04\x06\x13\x14\x16\x1d\u{40000}-\u{bffff}]`, "gu");

/** What the text reads after NFC between added tokens: the parts are composed apart. */
function composed(own: BpeTokenizer, text: string): string {
  const markers = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];
  const pattern = new RegExp(markers.map((marker) => marker.replaceAll("|", String.raw`\|`)).join("|"), "g");
  assert.ok(own.isSpecial(own.encode("<|im_end|>", RAW)[0] as number));
  let result = "";
  let done = 0;
  for (const match of text.matchAll(pattern)) {
    result += text.slice(done, match.index).normalize("NFC") + match[0];
    done = match.index + match[0].length;
  }
  return result + text.slice(done).normalize("NFC");
}

/** A real one; what is tested with it does not depend on which. */
function someTokenizer(): BpeTokenizer {
  const pair = pairs.get("llama3");
  return pair?.own ?? (BpeTokenizer.tryCreate(packageArtifact("llama3")) as BpeTokenizer);
}

test("the event loop gets its turn while a long prompt is encoded in slices", async () => {
  const own = someTokenizer();
  let turns = 0;
  let running = true;
  const count = (): void => {
    turns++;
    if (running) setImmediate(count);
  };
  setImmediate(count);
  const ids = await own.encodeSliced("q".repeat(300_000) + prose(3, 300_000), RAW);
  running = false;
  assert.ok(ids.length > 60_000);
  assert.ok(turns > 10, `${turns} turns`);
});

test("encoding in slices ends when its signal aborts", async () => {
  const own = someTokenizer();
  const stop = new AbortController();
  const encoding = own.encodeSliced("q".repeat(500_000), RAW, stop.signal);
  stop.abort(new Error("gone"));
  await assert.rejects(encoding, /gone/);
});

test("begin and end tokens go around a text only when asked for", () => {
  const artifact = { ...packageArtifact("llama3"), addEosToken: true };
  const own = BpeTokenizer.tryCreate(artifact)!;
  const plain = own.encode("hello", RAW);
  const [eos] = artifact.eosTokenIds;
  assert.deepEqual([...own.encode("hello", { addSpecialTokens: true })], [artifact.bosTokenId, ...plain, eos]);
  assert.deepEqual([...own.encode("", { addSpecialTokens: true })], [artifact.bosTokenId, eos]);
  assert.deepEqual([...own.encode("", RAW)], []);
});

test("the byte tokenizer gives the UTF-8 bytes of any text, long ones too, and its special tokens", async () => {
  const own = BpeTokenizer.tryCreate(byteArtifact())!;
  assert.deepEqual([...own.encode("<|im_start|>é<|im_end|>", RAW)], [256, 0xc3, 0xa9, 257]);
  const text = "a😀".repeat(20_000) + "中".repeat(9_000);
  assert.deepEqual(Buffer.from(own.encode(text, RAW)), Buffer.from(text));
  assert.deepEqual(Buffer.from(await own.encodeSliced(text, RAW)), Buffer.from(text));
});

/** A tokenizer with few letters, to state one rule at a time. */
function aTokenizer(
  model: Partial<HfBpeModel>,
  addedTokens: readonly HfAddedToken[] = [],
  normalizer: HfStep | null = null,
): BpeTokenizer {
  const artifact = byteArtifact();
  const { vocab } = artifact.tokenizerJson.model as HfBpeModel;
  const json = {
    ...artifact.tokenizerJson,
    normalizer,
    added_tokens: addedTokens,
    model: { type: "BPE", vocab, merges: [], ...model } as HfBpeModel,
  };
  return BpeTokenizer.tryCreate({ ...artifact, tokenizerJson: json })!;
}

test("the lowest rank merges first, the leftmost of equals, and a merge needs both halves", () => {
  const own = aTokenizer({
    vocab: { a: 0, b: 1, ab: 2, aa: 3, aab: 4 },
    merges: ["a a", "a b", ["aa", "b"] as unknown as string],
  });
  const tokens = (text: string): string[] =>
    Array.from(own.encode(text, RAW), (id) => Buffer.from(own.tokenBytes(id)).toString());
  assert.deepEqual(tokens("aab"), ["aab"]);
  assert.deepEqual(tokens("aaab"), ["aa", "ab"]);
  assert.deepEqual(tokens("bab"), ["b", "ab"]);
});

test("bytes without a token become the unknown token, or nothing where there is none", () => {
  const vocab = { a: 0, b: 1, "?": 2 };
  assert.deepEqual([...aTokenizer({ vocab }).encode("axxb", RAW)], [0, 1]);
  // As the native library does: what was dropped does not keep its neighbours apart.
  const merging = aTokenizer({ vocab: { ...vocab, ab: 3 }, merges: ["a b"] });
  assert.deepEqual([...merging.encode("axb", RAW)], [3]);
  assert.deepEqual(
    [...merging.encode("ab".repeat(200) + "x", RAW)],
    Array.from({ length: 200 }, () => 3),
  );
  assert.deepEqual([...aTokenizer({ vocab, unk_token: "?" }).encode("axxb", RAW)], [0, 2, 2, 1]);
  assert.deepEqual([...aTokenizer({ vocab, unk_token: "?", fuse_unk: true }).encode("axxb", RAW)], [0, 2, 1]);
});

test("added tokens swallow white space as flagged, win by length, and respect word borders", () => {
  const token = (id: number, content: string, flags: Partial<HfAddedToken> = {}): HfAddedToken => ({
    id,
    content,
    special: true,
    ...flags,
  });
  const own = aTokenizer({}, [
    token(300, "<m>", { lstrip: true, rstrip: true }),
    token(301, "<a"),
    token(302, "<ab>"),
    token(303, "cat", { single_word: true }),
  ]);
  const ids = (text: string): number[] => [...own.encode(text, RAW)];
  assert.deepEqual(ids("x \n<m>\t y"), [0x78, 300, 0x79]);
  assert.deepEqual(ids(" <m> <m> "), [300, 300]);
  assert.deepEqual(ids("<ab><a<"), [302, 301, 0x3c]);
  assert.deepEqual(ids("cat.cats"), [303, 0x2e, 0x63, 0x61, 0x74, 0x73]);
});

test("a token marked as normalized is found in the normalised text, the others before it", () => {
  const own = aTokenizer(
    {},
    [
      { id: 300, content: "é", normalized: true },
      { id: 301, content: "e\u0301!", normalized: false },
    ],
    { type: "NFC" },
  );
  assert.deepEqual([...own.encode("e\u0301e\u0301!é", RAW)], [300, 301, 300]);
});

test("where added tokens could lie across a cut, or a run has no break, there is no text cache", () => {
  const artifact = byteArtifact();
  const { tokenizerJson: json } = artifact;
  const created = (changes: Partial<TokenizerArtifact["tokenizerJson"]>): BpeTokenizer =>
    BpeTokenizer.tryCreate({ ...artifact, tokenizerJson: { ...json, ...changes } }, systemClock, 1e6)!;
  const gpt2: HfStep = { type: "ByteLevel", add_prefix_space: false, use_regex: true };
  const token = { id: 300, content: "ab", normalized: true };
  const hasCache = (changes: Partial<TokenizerArtifact["tokenizerJson"]>): boolean =>
    created(changes).cacheUse !== undefined;
  assert.equal(hasCache({ pre_tokenizer: gpt2, added_tokens: [token] }), true);
  assert.equal(hasCache({ pre_tokenizer: gpt2, added_tokens: [{ ...token, content: " a" }] }), true);
  for (const unsafe of [
    { content: "a b" },
    { content: "a." },
    { lstrip: true },
    { rstrip: true },
    { single_word: true },
  ]) {
    assert.equal(hasCache({ pre_tokenizer: gpt2, added_tokens: [{ ...token, ...unsafe }] }), false);
  }
  // Bytes without a pattern: the whole text is one piece.
  assert.equal(hasCache({}), false);
  assert.equal(BpeTokenizer.tryCreate(artifact)!.cacheUse, undefined);
});

test("composing a long text in parts gives what composing it whole gives", () => {
  const own = aTokenizer({}, [], { type: "NFC" });
  const text =
    "e\u0301".repeat(32_767) + "a\u0300\u0301x" + "\u1100\u1161\u11a8 ".repeat(30_000) + "\u0301".repeat(70_000);
  assert.deepEqual(Buffer.from(own.encode(text, RAW)), Buffer.from(text.normalize("NFC")));
});

test("a text or a run over the limits is refused by name", () => {
  const own = someTokenizer();
  const refused = { name: "DynamoError", reason: "invalid-field", param: "prompt" };
  assert.throws(() => own.encode("a".repeat(ENCODE_LIMITS.pieceBytes + 1), RAW), refused);
  assert.throws(() => own.encode("a".repeat(ENCODE_LIMITS.textUnits + 1), RAW), refused);
});

test("a merge that names no token is a damaged model file", () => {
  assert.throws(() => aTokenizer({ vocab: { a: 0, b: 1 }, merges: ["a b"] }), { reason: "model-file-invalid" });
  assert.throws(() => aTokenizer({ vocab: { a: 0, aa: 1 }, merges: ["a x"] }), { reason: "model-file-invalid" });
});

test("settings that we do not have are left to the library", () => {
  const artifact = byteArtifact();
  const json = artifact.tokenizerJson;
  for (const other of [
    { ...json, model: { ...json.model, byte_fallback: true } },
    { ...json, model: { ...json.model, end_of_word_suffix: "</w>" } },
    { ...json, normalizer: { type: "Lowercase" } },
    { ...json, decoder: { type: "Metaspace" } },
    { ...json, pre_tokenizer: null },
  ]) {
    assert.equal(
      BpeTokenizer.tryCreate({ ...artifact, tokenizerJson: other as TokenizerArtifact["tokenizerJson"] }),
      undefined,
    );
  }
});
