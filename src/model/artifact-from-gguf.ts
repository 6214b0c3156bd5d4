import { DynamoError } from "../errors/index.ts";
import { preTokenizerOf } from "./gguf-pre-tokenizers.ts";
import { ggufBoolean, ggufNumber, ggufNumbers, ggufText, ggufTexts, readGguf, type Gguf } from "./gguf.ts";
import type { HfAddedToken, HfModel, HfTokenizerJson } from "./hf-tokenizer.ts";
import { checkArtifact, type TokenizerArtifact } from "./tokenizer-artifact.ts";

/**
 * The tokenizer inside a GGUF file, as the `tokenizer.json` it was made from. Two kinds are known: `gpt2` (byte-level BPE;
 * how text is split first is named by `tokenizer.ggml.pre`) and `llama` (SentencePiece BPE: pieces with scores; Hugging
 * Face turns it into BPE with byte fallback, and so do we). Anything else is `model-file-invalid` and named.
 */
export function artifactFromGguf(path: string): TokenizerArtifact {
  return artifactOf(readGguf(path), path);
}

/** The same from a head that was read already. */
export function artifactOf(gguf: Gguf, path: string): TokenizerArtifact {
  const tokens = ggufTexts(gguf, "tokenizer.ggml.tokens");
  const kind = ggufText(gguf, "tokenizer.ggml.model");
  if (tokens === undefined || kind === undefined) {
    throw new DynamoError("model-file-invalid", `${path}: the file holds no tokenizer`);
  }
  const types = ggufNumbers(gguf, "tokenizer.ggml.token_type");
  if (types !== undefined && types.length !== tokens.length) {
    throw new DynamoError("model-file-invalid", `${path}: ${types.length} token types for ${tokens.length} tokens`);
  }
  if (kind !== "gpt2" && kind !== "llama") {
    throw new DynamoError(
      "model-file-invalid",
      `${path}: tokenizer.ggml.model: expected gpt2 or llama, got ${JSON.stringify(kind)}`,
    );
  }
  const added = addedTokens(tokens, types);
  const converted =
    kind === "gpt2" ? byteLevelBpe(gguf, tokens, added, path) : sentencePieceBpe(gguf, tokens, types, added, path);
  const tokenAt = (id: number | undefined): string | undefined => (id === undefined ? undefined : tokens[id]);
  const bosTokenId = knownId(ggufNumber(gguf, "tokenizer.ggml.bos_token_id"), tokens);
  const eosTokenId = knownId(ggufNumber(gguf, "tokenizer.ggml.eos_token_id"), tokens);
  const eosTokenIds = endIds(gguf, tokens, added, eosTokenId);
  const bosToken = tokenAt(bosTokenId);
  const eosToken = tokenAt(eosTokenId);
  const chatTemplate = ggufText(gguf, "tokenizer.chat_template");
  const addBos = ggufBoolean(gguf, "tokenizer.ggml.add_bos_token") ?? converted.addBosByDefault;
  const addEos = ggufBoolean(gguf, "tokenizer.ggml.add_eos_token") ?? false;
  return checkArtifact({
    version: 1,
    tokenizerJson: converted.json,
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
    ...(bosToken === undefined ? {} : { bosToken }),
    ...(eosToken === undefined ? {} : { eosToken }),
    ...(bosTokenId === undefined ? {} : { bosTokenId }),
    eosTokenIds,
    addBosToken: addBos && bosTokenId !== undefined,
    addEosToken: addEos && eosTokenId !== undefined,
    source: "gguf",
  } satisfies TokenizerArtifact);
}

interface Converted {
  readonly json: HfTokenizerJson;
  readonly addBosByDefault: boolean;
}

const TOKEN_CONTROL = 3;
const TOKEN_USER_DEFINED = 4;
const TOKEN_UNKNOWN = 2;
const TOKEN_UNUSED = 5;

function addedTokens(tokens: readonly string[], types: ArrayLike<number> | undefined): HfAddedToken[] {
  const added: HfAddedToken[] = [];
  if (types === undefined) return added;
  for (let id = 0; id < tokens.length; id++) {
    const type = types[id];
    if (type !== TOKEN_CONTROL && type !== TOKEN_USER_DEFINED && type !== TOKEN_UNKNOWN) continue;
    const content = tokens[id]!;
    if (content === "") continue;
    const special = type !== TOKEN_USER_DEFINED;
    added.push({ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special });
  }
  return added;
}

function byteLevelBpe(gguf: Gguf, tokens: readonly string[], added: HfAddedToken[], path: string): Converted {
  const merges = ggufTexts(gguf, "tokenizer.ggml.merges");
  if (merges === undefined) throw new DynamoError("model-file-invalid", `${path}: tokenizer.ggml.merges is missing`);
  const name = ggufText(gguf, "tokenizer.ggml.pre") ?? "default";
  const split = preTokenizerOf(name);
  if (split === undefined) {
    throw new DynamoError(
      "model-file-invalid",
      `${path}: tokenizer.ggml.pre: how ${JSON.stringify(name)} splits text is not known; put the model's tokenizer.json beside the file`,
    );
  }
  const model: HfModel = {
    type: "BPE",
    dropout: null,
    unk_token: null,
    fuse_unk: false,
    byte_fallback: false,
    ignore_merges: split.ignoreMerges,
    vocab: vocabularyOf(tokens),
    merges,
  };
  return {
    json: {
      version: "1.0",
      added_tokens: added,
      normalizer: split.normalizer,
      pre_tokenizer: split.preTokenizer,
      post_processor: null,
      decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
      model,
    },
    addBosByDefault: split.addBosByDefault,
  };
}

/** U+2581, SentencePiece's visible space. */
const SPACE = "\u2581";

function sentencePieceBpe(
  gguf: Gguf,
  tokens: readonly string[],
  types: ArrayLike<number> | undefined,
  added: HfAddedToken[],
  path: string,
): Converted {
  const scores = ggufNumbers(gguf, "tokenizer.ggml.scores");
  if (scores === undefined || scores.length !== tokens.length) {
    throw new DynamoError("model-file-invalid", `${path}: tokenizer.ggml.scores: expected one score per token`);
  }
  const vocab = vocabularyOf(tokens);
  const unknownId = knownId(ggufNumber(gguf, "tokenizer.ggml.unknown_token_id"), tokens);
  const prefixed = ggufBoolean(gguf, "tokenizer.ggml.add_space_prefix") ?? true;
  const visibleSpace = { type: "Replace", pattern: { String: " " }, content: SPACE };
  const decoders = [
    { type: "Replace", pattern: { String: SPACE }, content: " " },
    { type: "ByteFallback" },
    { type: "Fuse" },
    ...(prefixed ? [{ type: "Strip", content: " ", start: 1, stop: 0 }] : []),
  ];
  return {
    json: {
      version: "1.0",
      added_tokens: added,
      normalizer: {
        type: "Sequence",
        normalizers: prefixed ? [{ type: "Prepend", prepend: SPACE }, visibleSpace] : [visibleSpace],
      },
      pre_tokenizer: null,
      post_processor: null,
      decoder: { type: "Sequence", decoders },
      model: {
        type: "BPE",
        dropout: null,
        unk_token: unknownId === undefined ? null : tokens[unknownId]!,
        fuse_unk: true,
        byte_fallback: true,
        ignore_merges: false,
        vocab,
        merges: mergesFromScores(tokens, types, scores, vocab),
      },
    },
    addBosByDefault: true,
  };
}

/**
 * SentencePiece always joins the neighbours whose union has the highest score. As ranked merges: every way to split a
 * piece into two pieces, ordered by the piece's score; ties by the lengths, then the ids of the parts, as Hugging Face's
 * converter orders them.
 */
function mergesFromScores(
  tokens: readonly string[],
  types: ArrayLike<number> | undefined,
  scores: ArrayLike<number>,
  vocab: Readonly<Record<string, number>>,
): [string, string][] {
  const found: { left: string; right: string; score: number }[] = [];
  for (let id = 0; id < tokens.length; id++) {
    const type = types?.[id] ?? 1;
    if (type !== 1 && type !== TOKEN_UNUSED) continue;
    const piece = tokens[id]!;
    const splits: { left: string; right: string; score: number }[] = [];
    for (let at = 1; at < piece.length; at++) {
      // Not between the halves of a surrogate pair.
      const unit = piece.charCodeAt(at);
      if (unit >= 0xdc00 && unit <= 0xdfff) continue;
      const left = piece.slice(0, at);
      const right = piece.slice(at);
      if (vocab[left] !== undefined && vocab[right] !== undefined) splits.push({ left, right, score: scores[id]! });
    }
    splits.sort((a, b) => vocab[a.left]! - vocab[b.left]! || vocab[a.right]! - vocab[b.right]!);
    found.push(...splits);
  }
  found.sort((a, b) => b.score - a.score || b.left.length - a.left.length || b.right.length - a.right.length);
  return found.map(({ left, right }) => [left, right]);
}

/** Text to id; of equal texts the first keeps the text. Without a prototype, so that `__proto__` is a token like others. */
function vocabularyOf(tokens: readonly string[]): Record<string, number> {
  const vocab = Object.create(null) as Record<string, number>;
  for (let id = 0; id < tokens.length; id++) {
    const token = tokens[id]!;
    if (vocab[token] === undefined) vocab[token] = id;
  }
  return vocab;
}

/**
 * Tokens that end an answer: the file's own, and control tokens whose text is known to mean it, because many files name
 * only one of two (the list after llama.cpp's).
 */
const END_TEXTS = new Set([
  "<|im_end|>",
  "<|endoftext|>",
  "<|end_of_text|>",
  "<|eot_id|>",
  "<|eom_id|>",
  "<|end|>",
  "<|return|>",
  "<|call|>",
  "<end_of_turn>",
  "<|end_of_turn|>",
  "<|endofturn|>",
  "<EOT>",
  "</s>",
]);

function endIds(
  gguf: Gguf,
  tokens: readonly string[],
  added: HfAddedToken[],
  eosTokenId: number | undefined,
): number[] {
  const ids = new Set<number>();
  if (eosTokenId !== undefined) ids.add(eosTokenId);
  for (const key of ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]) {
    const id = knownId(ggufNumber(gguf, key), tokens);
    if (id !== undefined) ids.add(id);
  }
  for (const { id, content } of added) if (END_TEXTS.has(content)) ids.add(id);
  return [...ids];
}

function knownId(id: number | undefined, tokens: readonly string[]): number | undefined {
  return id !== undefined && Number.isInteger(id) && id >= 0 && id < tokens.length ? id : undefined;
}
