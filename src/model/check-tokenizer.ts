import { DynamoError } from "../errors/index.ts";
import type { HfTokenizerJson } from "./hf-tokenizer.ts";

/**
 * The edge for `tokenizer.json` data from files and from other processes: after it the shape can be relied on. Cost: one
 * pass over vocabulary and merges, about 5 ms for 49k tokens.
 */
export const TOKENIZER_LIMITS = {
  /** Four times the largest vocabulary in use (262k). */
  tokens: 1_048_576,
  /** Merges are below twice the vocabulary in every published model. */
  merges: 2_097_152,
  addedTokens: 131_072,
  /** Steps nest (Sequence in Sequence); real files have two levels. */
  stepDepth: 8,
  stepCount: 256,
} as const;

/** Throws `model-file-invalid` naming the first field at fault, what was expected and what came. */
export function checkTokenizerJson(value: unknown, where: string): asserts value is HfTokenizerJson {
  const json = record(value, where);
  const added = array(json.added_tokens, `${where}.added_tokens`, TOKENIZER_LIMITS.addedTokens);
  for (const [index, entry] of added.entries()) {
    const token = record(entry, `${where}.added_tokens[${index}]`);
    tokenId(token.id, `${where}.added_tokens[${index}].id`);
    text(token.content, `${where}.added_tokens[${index}].content`);
  }
  const budget = { left: TOKENIZER_LIMITS.stepCount };
  for (const name of ["normalizer", "pre_tokenizer", "post_processor", "decoder"]) {
    if (json[name] !== null) step(json[name], `${where}.${name}`, 0, budget);
  }
  model(record(json.model, `${where}.model`), `${where}.model`);
}

function model(value: Record<string, unknown>, where: string): void {
  switch (value.type) {
    case "BPE":
      vocabulary(value.vocab, `${where}.vocab`);
      merges(value.merges, `${where}.merges`);
      return;
    case "WordPiece":
    case "WordLevel":
      vocabulary(value.vocab, `${where}.vocab`);
      return;
    case "Unigram":
      for (const [index, entry] of array(value.vocab, `${where}.vocab`, TOKENIZER_LIMITS.tokens).entries()) {
        if (!Array.isArray(entry) || typeof entry[0] !== "string" || typeof entry[1] !== "number") {
          throw invalid(`${where}.vocab[${index}]`, "[text, score]", entry);
        }
      }
      return;
    default:
      throw invalid(`${where}.type`, "BPE, Unigram, WordPiece or WordLevel", value.type);
  }
}

function vocabulary(value: unknown, where: string): void {
  const vocab = record(value, where);
  const tokens = Object.keys(vocab);
  if (tokens.length > TOKENIZER_LIMITS.tokens) throw invalid(where, `at most ${TOKENIZER_LIMITS.tokens} tokens`, vocab);
  for (const token of tokens) {
    const id = vocab[token];
    if (typeof id !== "number" || !Number.isInteger(id) || id < 0 || id >= TOKENIZER_LIMITS.tokens * 2) {
      throw invalid(`${where}[${JSON.stringify(token)}]`, "a token id", id);
    }
  }
}

function merges(value: unknown, where: string): void {
  const list = array(value, where, TOKENIZER_LIMITS.merges);
  const pairs = Array.isArray(list[0]);
  for (let index = 0; index < list.length; index++) {
    const merge = list[index];
    if (pairs) {
      if (Array.isArray(merge) && merge.length === 2) {
        if (typeof merge[0] === "string" && typeof merge[1] === "string") continue;
      }
    } else if (typeof merge === "string" && merge.includes(" ")) continue;
    throw invalid(`${where}[${index}]`, pairs ? "[left, right]" : '"left right"', merge);
  }
}

function step(value: unknown, where: string, depth: number, budget: { left: number }): void {
  const settings = record(value, where);
  text(settings.type, `${where}.type`);
  if (depth > TOKENIZER_LIMITS.stepDepth || --budget.left < 0) throw invalid(where, "fewer nested steps", value);
  for (const list of ["normalizers", "pretokenizers", "processors", "decoders"]) {
    const inner = settings[list];
    if (inner === undefined) continue;
    for (const [index, entry] of array(inner, `${where}.${list}`, TOKENIZER_LIMITS.stepCount).entries()) {
      step(entry, `${where}.${list}[${index}]`, depth + 1, budget);
    }
  }
}

function record(value: unknown, where: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw invalid(where, "an object", value);
  return value as Record<string, unknown>;
}

function array(value: unknown, where: string, max: number): unknown[] {
  if (!Array.isArray(value)) throw invalid(where, "an array", value);
  if (value.length > max) throw invalid(where, `at most ${max} entries`, value);
  return value;
}

function text(value: unknown, where: string): void {
  if (typeof value !== "string") throw invalid(where, "a text", value);
}

function tokenId(value: unknown, where: string): void {
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value >= TOKENIZER_LIMITS.tokens * 2) {
    throw invalid(where, "a token id", value);
  }
}

function invalid(where: string, expected: string, got: unknown): DynamoError {
  const shown = Array.isArray(got)
    ? `an array of ${got.length}`
    : typeof got === "object" && got !== null
      ? `an object of ${Object.keys(got).length}`
      : (JSON.stringify(got)?.slice(0, 60) ?? "nothing");
  return new DynamoError("model-file-invalid", `${where}: expected ${expected}, got ${shown}`);
}
