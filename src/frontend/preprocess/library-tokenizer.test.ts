import assert from "node:assert/strict";
import { test } from "node:test";
import type { HfTokenizerJson, TokenizerArtifact } from "../../model/index.ts";
import { Detokenizer } from "../postprocess/index.ts";
import { loadTokenizer } from "./tokenizer.ts";

/** A SentencePiece-like BPE with byte fallback in the way that Llama 2's is written down. */
function sentencePieceArtifact(): TokenizerArtifact {
  const vocab: Record<string, number> = { "<unk>": 0, "<s>": 1, "</s>": 2 };
  for (let byte = 0; byte < 256; byte++) vocab[`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`] = 3 + byte;
  for (const token of ["▁", "h", "i", "▁h", "hi", "▁hi"]) vocab[token] = Object.keys(vocab).length;
  const added = (id: number, content: string): object => ({
    id,
    content,
    special: true,
    normalized: false,
    single_word: false,
    lstrip: false,
    rstrip: false,
  });
  const json = {
    version: "1.0",
    added_tokens: [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
    normalizer: {
      type: "Sequence",
      normalizers: [
        { type: "Prepend", prepend: "▁" },
        { type: "Replace", pattern: { String: " " }, content: "▁" },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: "▁" }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    },
    model: {
      type: "BPE",
      vocab,
      merges: ["▁ h", "h i", "▁h i"],
      byte_fallback: true,
      unk_token: "<unk>",
      fuse_unk: true,
    },
  };
  return {
    version: 1,
    tokenizerJson: json as unknown as HfTokenizerJson,
    bosToken: "<s>",
    bosTokenId: 1,
    eosTokenIds: [2],
    addBosToken: true,
    addEosToken: false,
    source: "gguf",
  };
}

test("a tokenizer that is not byte-level goes through the library, with the same begin token rule", async () => {
  const tokenizer = await loadTokenizer(sentencePieceArtifact());
  const vocab = sentencePieceArtifact().tokenizerJson.model as unknown as { vocab: Record<string, number> };
  const hi = vocab.vocab["▁hi"] as number;
  const blank = vocab.vocab["▁"] as number;
  assert.deepEqual([...tokenizer.encode("hi hi", { addSpecialTokens: true })], [1, hi, hi]);
  assert.deepEqual([...tokenizer.encode("é", { addSpecialTokens: false })], [blank, 3 + 0xc3, 3 + 0xa9]);
  assert.deepEqual(await tokenizer.encodeSliced("hi", { addSpecialTokens: false }), Uint32Array.of(hi));
  assert.equal(tokenizer.vocabularySize, Object.keys(vocab.vocab).length);
  assert.equal(tokenizer.isSpecial(1), true);
  assert.equal(tokenizer.isSpecial(hi), false);
  assert.deepEqual([...tokenizer.tokenBytes(3 + 0xe2)], [0xe2]);
  assert.equal(Buffer.from(tokenizer.tokenBytes(1)).toString(), "<s>");
  assert.equal(tokenizer.tokenBytes(99_999).length, 0);
});

test("text of such a model loses its one leading space and keeps bytes together", async () => {
  const tokenizer = await loadTokenizer(sentencePieceArtifact());
  const ids = tokenizer.encode("hi é hi", { addSpecialTokens: true });
  const detokenizer = new Detokenizer(tokenizer, { skipSpecialTokens: true });
  let text = "";
  for (const id of ids) text += detokenizer.push(Uint32Array.of(id), 1);
  assert.equal(text + detokenizer.flush(), "hi é hi");
});

test("a tokenizer that the library refuses is a damaged model file", async () => {
  const artifact = sentencePieceArtifact();
  const broken = { ...artifact.tokenizerJson, normalizer: { type: "NoSuchThing" } };
  await assert.rejects(loadTokenizer({ ...artifact, tokenizerJson: broken }), { reason: "model-file-invalid" });
});

test("a step that the library trips over only at work is a damaged model file too, not a failure of ours", async () => {
  const artifact = sentencePieceArtifact();
  const split = { type: "Split", pattern: { Regex: "\\s+" }, behavior: 1 };
  const broken = { ...artifact.tokenizerJson, pre_tokenizer: split };
  const tokenizer = await loadTokenizer({ ...artifact, tokenizerJson: broken } as unknown as TokenizerArtifact);
  assert.throws(() => tokenizer.encode("a b", { addSpecialTokens: false }), { reason: "model-file-invalid" });
});
