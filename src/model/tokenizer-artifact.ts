import { DynamoError } from "../errors/index.ts";
import type { HfTokenizerJson } from "./hf-tokenizer.ts";
import { checkTokenizerJson } from "./check-tokenizer.ts";

/**
 * Everything a frontend needs to turn text into tokens and back for one model, in one value that travels from a worker to
 * its frontends as bytes (their SHA-256 stands in the model card, so the same model file must always give the same bytes).
 */
export interface TokenizerArtifact {
  readonly version: 1;
  readonly tokenizerJson: HfTokenizerJson;
  /** Jinja source; absent for models without a chat format. */
  readonly chatTemplate?: string;
  readonly bosToken?: string;
  readonly eosToken?: string;
  readonly bosTokenId?: number;
  /** Tokens that end an answer; may be empty. */
  readonly eosTokenIds: readonly number[];
  /**
   * Whether encoding a prompt puts `bosTokenId` in front or the first of `eosTokenIds` behind. This is all of what
   * post-processing does: `tokenizerJson.post_processor` is not consulted.
   */
  readonly addBosToken: boolean;
  readonly addEosToken: boolean;
  readonly source: "gguf" | "tokenizer.json" | "bytes";
}

/** Bounds on an artifact that comes from another process or from a file. */
export const ARTIFACT_LIMITS = {
  /** The largest vocabularies in use (256k tokens, 500k merges) take about 35 MB as JSON. */
  bytes: 96 * 1024 * 1024,
  /** Real templates end near 20 kB. */
  chatTemplateChars: 512 * 1024,
  tokenTextChars: 1_024,
  eosTokenIds: 64,
} as const;

/** The artifact as bytes: JSON with a fixed order of fields. */
export function encodeArtifact(artifact: TokenizerArtifact): Buffer {
  return Buffer.from(JSON.stringify(artifact), "utf8");
}

/** Reads and checks what `encodeArtifact` wrote. Throws `model-file-invalid`. About 25 ms for 49k tokens. */
export function decodeArtifact(bytes: Uint8Array): TokenizerArtifact {
  if (bytes.length > ARTIFACT_LIMITS.bytes) {
    throw invalid(`is ${bytes.length} bytes, over the limit of ${ARTIFACT_LIMITS.bytes}`);
  }
  let value: unknown;
  try {
    value = JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8"));
  } catch (cause) {
    throw new DynamoError("model-file-invalid", "tokenizer artifact: not JSON", { cause });
  }
  return checkArtifact(value);
}

/** Checks a whole artifact and gives it back with its type. Throws `model-file-invalid`. */
export function checkArtifact(value: unknown): TokenizerArtifact {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw invalid("expected an object");
  const artifact = value as Record<string, unknown>;
  const { version } = artifact;
  if (version !== 1)
    throw invalid(`version: expected 1, got ${typeof version === "number" ? version : typeof version}`);
  if (artifact.source !== "gguf" && artifact.source !== "tokenizer.json" && artifact.source !== "bytes") {
    throw invalid("source: expected gguf, tokenizer.json or bytes");
  }
  optionalText(artifact, "chatTemplate", ARTIFACT_LIMITS.chatTemplateChars);
  optionalText(artifact, "bosToken", ARTIFACT_LIMITS.tokenTextChars);
  optionalText(artifact, "eosToken", ARTIFACT_LIMITS.tokenTextChars);
  for (const name of ["addBosToken", "addEosToken"]) {
    if (typeof artifact[name] !== "boolean") throw invalid(`${name}: expected true or false`);
  }
  const { bosTokenId, eosTokenIds } = artifact;
  if (bosTokenId !== undefined && !isTokenId(bosTokenId)) throw invalid("bosTokenId: expected a token id");
  if (
    !Array.isArray(eosTokenIds) ||
    eosTokenIds.length > ARTIFACT_LIMITS.eosTokenIds ||
    !eosTokenIds.every(isTokenId)
  ) {
    throw invalid(`eosTokenIds: expected at most ${ARTIFACT_LIMITS.eosTokenIds} token ids`);
  }
  if (artifact.addBosToken === true && bosTokenId === undefined) throw invalid("addBosToken without bosTokenId");
  if (artifact.addEosToken === true && eosTokenIds.length === 0) throw invalid("addEosToken without eosTokenIds");
  checkTokenizerJson(artifact.tokenizerJson, "tokenizer artifact: tokenizerJson");
  return value as TokenizerArtifact;
}

function optionalText(record: Record<string, unknown>, name: string, maxChars: number): void {
  const value = record[name];
  if (value === undefined) return;
  if (typeof value !== "string" || value.length > maxChars) {
    throw invalid(`${name}: expected a text of at most ${maxChars} characters`);
  }
}

function isTokenId(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < 2 ** 31;
}

function invalid(detail: string): DynamoError {
  return new DynamoError("model-file-invalid", `tokenizer artifact: ${detail}`);
}

/** Highest token id of the artifact plus one. */
export function vocabularySizeOf({ tokenizerJson }: TokenizerArtifact): number {
  const { model, added_tokens: added } = tokenizerJson;
  let size = 0;
  if (model.type === "Unigram") size = model.vocab.length;
  else for (const token in model.vocab) size = Math.max(size, model.vocab[token]! + 1);
  for (const { id } of added) size = Math.max(size, id + 1);
  return size;
}
