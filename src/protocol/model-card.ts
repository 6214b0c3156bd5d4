import type { PreprocessedRequest } from "./request.ts";

/**
 * What a worker tells about the model it serves, put into discovery under `v1/mdc/...` beside its instance. The
 * tokenizer itself is not in the card: the card carries its checksum, and whoever needs it asks any instance for it
 * over the request plane (endpoint `tokenizer`), so that a frontend needs no access to the worker's files.
 */
/** What a worker does of a request: all of it, or one of the two parts. Only `agg` and `decode` workers answer clients. */
export const WORKER_ROLES = ["agg", "prefill", "decode"] as const;
export type WorkerRole = (typeof WORKER_ROLES)[number];

/** What some engines cannot do of a request: a worker without it is not asked when others have it. */
export const ENGINE_FEATURES = [
  "answer-forms",
  "logprobs",
  "prompt-logprobs",
  "cache-namespaces",
  "min-tokens",
] as const;
export type EngineFeature = (typeof ENGINE_FEATURES)[number];

export interface ModelCard {
  /** Schema version of this record. */
  readonly version: 1;
  /** The name clients use. */
  readonly name: string;
  readonly engine: string;
  readonly engineVersion: string;
  readonly contextLength: number;
  readonly blockSizeTokens: number;
  /** This and the next two are of one data-parallel rank. */
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
  readonly role: WorkerRole;
  /** Bytes of one KV block as it is handed over; 0 = the engine cannot export blocks. */
  readonly blockBytes: number;
  /** Of an engine that moves blocks to another engine by itself: by which connector (`nixl-pull`). @default none */
  readonly kvConnector?: string;
  /** It can hold an answer to a form (`response_format`). @default false */
  readonly answerForms?: boolean;
  /** Where its KV events come from: the engine, or a guess of its worker's. @default "exact" */
  readonly kvEvents?: "exact" | "estimated";
  /** What it cannot do; for `answer-forms` see `answerForms`. @default nothing */
  readonly lacks?: readonly Exclude<EngineFeature, "answer-forms">[];
  /** What its engine says in tokens: the engine's own, or made by its worker from text. @default "exact" */
  readonly tokens?: "exact" | "estimated";
  /** Of the weights; empty for engines without. Blocks of other weights are other blocks. */
  readonly modelFingerprint: string;
}

/** What a request needs that not every engine has. */
export function featuresOf(request: PreprocessedRequest): readonly EngineFeature[] {
  const { answerForm, output, cacheNamespace, stop } = request;
  const features: EngineFeature[] = [];
  if (answerForm !== undefined) features.push("answer-forms");
  if (output.topLogprobs >= 0) features.push("logprobs");
  if (output.promptLogprobs) features.push("prompt-logprobs");
  if (cacheNamespace !== "") features.push("cache-namespaces");
  if (stop.minTokens > 0 && stop.stopTokenIds.length > 0) features.push("min-tokens");
  return features;
}

/** The first of them that the worker lacks. */
export function lackOf(
  { answerForms, lacks = [] }: ModelCard,
  features: readonly EngineFeature[],
): EngineFeature | undefined {
  return features.find((one) => (one === "answer-forms" ? answerForms !== true : lacks.includes(one)));
}

/** What workers must agree on to use each other's KV blocks, as a text that is compared. */
export function kvFingerprint(card: ModelCard): string {
  const { engine, engineVersion, modelFingerprint, tokenizerSha256, blockSizeTokens, blockBytes, kvConnector } = card;
  const moved = kvConnector ?? blockBytes;
  return [engine, engineVersion, modelFingerprint, tokenizerSha256.slice(0, 16), blockSizeTokens, moved].join("/");
}

/**
 * Why two workers of one model cannot hand KV blocks to each other, in words an operator can act on; undefined when they can.
 * `known` is there already.
 */
export function handoffConflict(known: ModelCard, card: ModelCard): string | undefined {
  for (const each of [card, known]) {
    if (each.blockBytes === 0 && each.kvConnector === undefined) {
      return each === card || known.kvConnector === undefined
        ? `the ${each.engine} engine cannot export KV blocks`
        : `the model's ${each.role} worker has no connector for KV blocks`;
    }
  }
  const fields = [
    ["tokenizerSha256", "tokenizer (SHA-256)"],
    ["blockSizeTokens", "KV block size in tokens"],
    ["blockBytes", "KV block in bytes, which follows from data type and layout,"],
    ["engine", "engine"],
    ["engineVersion", "engine version"],
    ["kvConnector", "connector for KV blocks"],
    // Last: it also holds what stands above.
    ["modelFingerprint", "model file (fingerprint)"],
  ] as const satisfies readonly (readonly [keyof ModelCard, string])[];
  const differing = fields.find(([field]) => known[field] !== card[field]);
  if (differing === undefined) return undefined;
  const [field, text] = differing;
  return `its ${text} is ${card[field]}, that of the model's ${known.role} worker is ${known[field]}`;
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
  "blockBytes",
] as const satisfies readonly (keyof ModelCard)[];

/** Checks a card that came from discovery: every field there and of its type, numbers whole and not negative. */
export function isModelCard(value: unknown): value is ModelCard {
  if (typeof value !== "object" || value === null) return false;
  const card = value as Record<string, unknown>;
  return (
    card["version"] === 1 &&
    ["name", "engine", "engineVersion", "tokenizerSha256", "modelFingerprint"].every(
      (field) => typeof card[field] === "string",
    ) &&
    (WORKER_ROLES as readonly unknown[]).includes(card["role"]) &&
    card["name"] !== "" &&
    NUMBERS.every((field) => Number.isSafeInteger(card[field]) && (card[field] as number) >= 0) &&
    ["string", "undefined"].includes(typeof card["kvConnector"]) &&
    Array.isArray(card["types"]) &&
    (card["lacks"] === undefined || Array.isArray(card["lacks"]))
  );
}
