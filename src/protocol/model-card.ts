/**
 * What a worker tells about the model it serves, put into discovery under `v1/mdc/...` beside its instance. The
 * tokenizer itself is not in the card: the card carries its checksum, and whoever needs it asks any instance for it
 * over the request plane (endpoint `tokenizer`), so that a frontend needs no access to the worker's files.
 */
export interface ModelCard {
  /** Schema version of this record. */
  readonly version: 1;
  /** The name clients use. */
  readonly name: string;
  readonly engine: string;
  readonly engineVersion: string;
  readonly contextLength: number;
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly dataParallelSize: number;
  readonly vocabularySize: number;
  /** SHA-256, hex, of the tokenizer artifact's bytes. */
  readonly tokenizerSha256: string;
  readonly tokenizerBytes: number;
  /** `chat` only when the artifact has a chat template. */
  readonly types: readonly ("chat" | "completions")[];
  /** Unix seconds, for `GET /v1/models`. */
  readonly created: number;
}

const NUMBERS = [
  "contextLength",
  "blockSizeTokens",
  "totalBlocks",
  "maxSequences",
  "maxBatchedTokens",
  "dataParallelSize",
  "vocabularySize",
  "tokenizerBytes",
  "created",
] as const satisfies readonly (keyof ModelCard)[];

/** Checks a card that came from discovery: every field there and of its type, numbers whole and not negative. */
export function isModelCard(value: unknown): value is ModelCard {
  if (typeof value !== "object" || value === null) return false;
  const card = value as Record<string, unknown>;
  return (
    card["version"] === 1 &&
    ["name", "engine", "engineVersion", "tokenizerSha256"].every((field) => typeof card[field] === "string") &&
    card["name"] !== "" &&
    NUMBERS.every((field) => Number.isSafeInteger(card[field]) && (card[field] as number) >= 0) &&
    Array.isArray(card["types"])
  );
}
