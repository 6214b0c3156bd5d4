import type { FrontendLimits } from "../config.ts";
import type { GenerationOptions } from "../../protocol/openai/index.ts";
import { DynamoError } from "../../errors/index.ts";
import type { AnswerForm, SamplingOptions } from "../../protocol/index.ts";
import {
  MAX_INT,
  invalidField,
  isObject,
  readArray,
  readBoolean,
  readInteger,
  readNumber,
  readObject,
  readOneOf,
  readString,
  refuseUnknown,
  unknownFields,
  unsupportedField,
} from "./fields.ts";
import { readNvext, type Nvext } from "./nvext.ts";

/**
 * The fields that chat and text completions share: sampling, stopping, streaming, and what we accept and ignore. A
 * request is read in one pass over its own keys: each known name has one reader here, which checks the value and puts
 * it into a draft; `null` means the default wherever OpenAI's API description allows it. Checks between fields follow
 * when the pass is over. One lookup per field the client sent: 0.3 to 0.6 us for usual bodies beside 5 to 10 us of
 * `JSON.parse`.
 */
export class GenerationDraft {
  model: string | undefined = undefined;
  temperature = 1;
  topP = 1;
  topK = 0;
  minP = 0;
  presencePenalty = 0;
  frequencyPenalty = 0;
  repetitionPenalty = 1;
  seed: number | undefined = undefined;
  logitBias: (readonly [number, number])[] | undefined = undefined;
  maxTokens: number | undefined = undefined;
  minTokens = 0;
  stop: readonly string[] = NONE;
  stopTokenIds: readonly number[] = NONE;
  ignoreEos = false;
  n = 1;
  stream = false;
  hasStreamOptions = false;
  includeUsage = false;
  /** -1 none. */
  topLogprobs = -1;
  answerForm: AnswerForm | undefined = undefined;
  nvext: Nvext | undefined = undefined;
  readonly limits: FrontendLimits;

  constructor(limits: FrontendLimits) {
    this.limits = limits;
  }
}

export type FieldReader<Draft> = (draft: Draft, value: unknown, name: string) => void;

const NONE: readonly never[] = Object.freeze([]);
const MAX_MODEL_CHARS = 512;
const MAX_STOP_CHARS = 1_000;
/** What the request plane's frames are sized for. */
const MAX_STOP_TOKEN_IDS = 64;
const MAX_LOGIT_BIAS = 1_024;
/** Up to 9 digits: no vocabulary comes near. */
const TOKEN_ID_KEY = /^(0|[1-9][0-9]{0,8})$/;
/** OpenAI's own bound on metadata, and a generous one on the labels that we ignore. */
const MAX_METADATA = 16;
const MAX_LABEL_CHARS = 1_024;
const SERVICE_TIERS = ["auto", "default", "flex", "scale", "priority", "fast"];

/** Wraps a reader for a field that may be null. */
export function nullable<Draft>(read: FieldReader<Draft>): FieldReader<Draft> {
  return (draft, value, name) => {
    if (value !== null) read(draft, value, name);
  };
}

/** Checked, but without effect here. */
export function ignored(check: (value: unknown, name: string) => unknown): FieldReader<unknown> {
  return (_draft, value, name) => void check(value, name);
}

/** Known to OpenAI, not served here: only null (or an empty list) is accepted. */
export function refused(what: string): FieldReader<unknown> {
  return (_draft, value, name) => {
    if (value === null || (Array.isArray(value) && value.length === 0)) return;
    throw unsupportedField(name, what);
  };
}

const label = ignored((value, name) => readString(value, name, 0, MAX_LABEL_CHARS));

export const GENERATION_FIELDS: Readonly<Record<string, FieldReader<GenerationDraft>>> = {
  model: (draft, value, name) => (draft.model = readString(value, name, 1, MAX_MODEL_CHARS)),
  // Sampling.
  temperature: nullable((draft, value, name) => (draft.temperature = readNumber(value, name, 0, 2))),
  top_p: nullable((draft, value, name) => (draft.topP = readTopP(value, name))),
  top_k: nullable((draft, value, name) => (draft.topK = Math.max(0, readInteger(value, name, -1, MAX_INT)))),
  min_p: nullable((draft, value, name) => (draft.minP = readNumber(value, name, 0, 1))),
  presence_penalty: nullable((draft, value, name) => (draft.presencePenalty = readNumber(value, name, -2, 2))),
  frequency_penalty: nullable((draft, value, name) => (draft.frequencyPenalty = readNumber(value, name, -2, 2))),
  repetition_penalty: nullable((draft, value, name) => (draft.repetitionPenalty = readPenalty(value, name))),
  seed: nullable((draft, value, name) => (draft.seed = readSeed(value, name))),
  logit_bias: nullable((draft, value, name) => (draft.logitBias = readLogitBias(value, name))),
  n: nullable((draft, value, name) => (draft.n = readInteger(value, name, 1, draft.limits.n))),
  // Stopping.
  max_tokens: nullable((draft, value, name) => setMaxTokens(draft, readInteger(value, name, 1, MAX_INT), name)),
  min_tokens: nullable((draft, value, name) => (draft.minTokens = readInteger(value, name, 0, MAX_INT))),
  stop: nullable(readStop),
  stop_token_ids: nullable((draft, value, name) => addStopTokenIds(draft, readTokenIds(value, name), name)),
  ignore_eos: nullable((draft, value, name) => (draft.ignoreEos = readBoolean(value, name))),
  // The form of the answer.
  stream: nullable((draft, value, name) => (draft.stream = readBoolean(value, name))),
  stream_options: nullable(readStreamOptions),
  // Dynamo's extensions.
  nvext: nullable((draft, value, name) => (draft.nvext = readNvext(value, name))),
  // Accepted without effect.
  user: nullable(label),
  safety_identifier: nullable(label),
  prompt_cache_key: nullable(label),
  metadata: nullable(ignored(checkMetadata)),
  service_tier: nullable(ignored((value, name) => readOneOf(value, name, SERVICE_TIERS))),
  store: nullable((_draft, value, name) => {
    if (readBoolean(value, name)) throw unsupportedField(name, "answers are not stored here; only false is served");
  }),
};

/** One pass over the own keys of a body. Unknown fields are refused all together, and before anything else. */
export function readFields<Draft>(
  body: unknown,
  readers: ReadonlyMap<string, FieldReader<Draft>>,
  draft: Draft,
): Draft {
  if (!isObject(body)) throw invalidField("body", "a JSON object", body);
  try {
    for (const key in body) {
      const read = readers.get(key);
      if (read === undefined) throw unknownFields([key]);
      read(draft, body[key], key);
    }
  } catch (thrown) {
    const unknown = Object.keys(body).filter((key) => !readers.has(key));
    throw unknown.length > 0 ? unknownFields(unknown) : thrown;
  }
  return draft;
}

/** The checks between fields, and the options in their final form. */
export function finishOptions(draft: GenerationDraft, defaultMaxTokens: number | undefined): GenerationOptions {
  const maxTokens = draft.maxTokens ?? defaultMaxTokens;
  if (maxTokens !== undefined && draft.minTokens > maxTokens) {
    throw invalidField("min_tokens", `at most max_tokens (${maxTokens})`, draft.minTokens);
  }
  if (draft.hasStreamOptions && !draft.stream) {
    throw new DynamoError("invalid-field", "stream_options: expected only together with stream: true", {
      param: "stream_options",
    });
  }
  return {
    sampling: samplingOf(draft),
    maxTokens,
    minTokens: draft.minTokens,
    stop: draft.stop,
    stopTokenIds: draft.stopTokenIds,
    ignoreEos: draft.ignoreEos,
    n: draft.n,
    topLogprobs: draft.topLogprobs,
    ...(draft.answerForm === undefined ? {} : { answerForm: draft.answerForm }),
    stream: draft.stream,
    includeUsage: draft.includeUsage,
  };
}

function samplingOf(draft: GenerationDraft): SamplingOptions {
  const { seed, logitBias } = draft;
  const sampling = {
    temperature: draft.temperature,
    topP: draft.topP,
    topK: draft.topK,
    minP: draft.minP,
    presencePenalty: draft.presencePenalty,
    frequencyPenalty: draft.frequencyPenalty,
    repetitionPenalty: draft.repetitionPenalty,
  };
  if (seed === undefined && logitBias === undefined) return sampling;
  return { ...sampling, ...(seed !== undefined && { seed }), ...(logitBias !== undefined && { logitBias }) };
}

export function requireModel(draft: GenerationDraft): string {
  if (draft.model === undefined) throw invalidField("model", "the name of a model", undefined);
  return draft.model;
}

/** `max_tokens` and `max_completion_tokens` are one thing under two names. */
export function setMaxTokens(draft: GenerationDraft, value: number, name: string): void {
  if (draft.maxTokens !== undefined && draft.maxTokens !== value) {
    throw invalidField(name, `the same value as its other name (${draft.maxTokens})`, value);
  }
  draft.maxTokens = value;
}

/** OpenAI allows 0, which keeps nothing; we keep the most probable token, as every engine does. */
function readTopP(value: unknown, name: string): number {
  return Math.max(1e-6, readNumber(value, name, 0, 1));
}

function readPenalty(value: unknown, name: string): number {
  if (typeof value !== "number" || !(value > 0 && value <= 2)) {
    throw invalidField(name, "a number above 0 and at most 2", value);
  }
  return value;
}

/** Any integer of 64 bits; engines take the low 32. */
function readSeed(value: unknown, name: string): number {
  if (typeof value !== "number" || !Number.isInteger(value) || Math.abs(value) > 2 ** 63) {
    throw invalidField(name, "an integer of 64 bits", value);
  }
  return Number.isSafeInteger(value) && value >= 0 && value <= 0xffff_ffff
    ? value
    : Number(BigInt.asUintN(32, BigInt(value)));
}

function readLogitBias(value: unknown, name: string): (readonly [number, number])[] {
  const pairs: (readonly [number, number])[] = [];
  const object = readObject(value, name);
  for (const key in object) {
    if (pairs.length === MAX_LOGIT_BIAS) {
      throw new DynamoError("invalid-field", `${name}: expected at most ${MAX_LOGIT_BIAS} entries, got more`, {
        param: name,
      });
    }
    if (!TOKEN_ID_KEY.test(key)) throw invalidField(name, "token ids as keys", key);
    pairs.push([Number(key), readNumber(object[key], `${name}.${key}`, -100, 100)]);
  }
  return pairs;
}

function readTokenIds(value: unknown, name: string): readonly number[] {
  const ids = readArray(value, name, MAX_STOP_TOKEN_IDS);
  return ids.map((id, index) => readInteger(id, `${name}[${index}]`, 0, MAX_INT));
}

function addStopTokenIds(draft: GenerationDraft, ids: readonly number[], name: string): void {
  if (ids.length === 0) return;
  draft.stopTokenIds = draft.stopTokenIds.length === 0 ? ids : [...draft.stopTokenIds, ...ids];
  if (draft.stopTokenIds.length > MAX_STOP_TOKEN_IDS) {
    throw invalidField(name, `at most ${MAX_STOP_TOKEN_IDS} stop token ids in all`, draft.stopTokenIds.length);
  }
}

/** A string or an array; integers in the array are stop token ids, as Dynamo takes them. */
function readStop(draft: GenerationDraft, value: unknown, name: string): void {
  if (typeof value === "string") {
    draft.stop = [readString(value, name, 1, MAX_STOP_CHARS)];
    return;
  }
  const { stopStrings } = draft.limits;
  if (!Array.isArray(value) || value.length > stopStrings) {
    throw invalidField(name, `a string or an array of at most ${stopStrings}`, value);
  }
  const strings: string[] = [];
  const ids: number[] = [];
  (value as unknown[]).forEach((item, index) => {
    const itemName = `${name}[${index}]`;
    if (typeof item === "number") ids.push(readInteger(item, itemName, 0, MAX_INT));
    else if (typeof item === "string") strings.push(readString(item, itemName, 1, MAX_STOP_CHARS));
    else throw invalidField(itemName, "a string or a token id", item);
  });
  draft.stop = strings;
  addStopTokenIds(draft, ids, name);
}

const STREAM_OPTIONS = new Set(["include_usage", "include_obfuscation"]);

/** Obfuscation (padding against traffic analysis) is a hint; we do not pad. */
function readStreamOptions(draft: GenerationDraft, value: unknown, name: string): void {
  const options = readObject(value, name);
  refuseUnknown(options, STREAM_OPTIONS, `${name}.`);
  const { include_usage: includeUsage, include_obfuscation: obfuscation } = options;
  draft.hasStreamOptions = true;
  if (includeUsage !== undefined && includeUsage !== null) {
    draft.includeUsage = readBoolean(includeUsage, `${name}.include_usage`);
  }
  if (obfuscation !== undefined && obfuscation !== null) readBoolean(obfuscation, `${name}.include_obfuscation`);
}

function checkMetadata(value: unknown, name: string): void {
  const metadata = readObject(value, name);
  const keys = Object.keys(metadata);
  if (keys.length > MAX_METADATA) throw invalidField(name, `at most ${MAX_METADATA} entries`, keys.length);
  for (const key of keys) readString(metadata[key], `${name}.${key.slice(0, 64)}`, 0, MAX_LABEL_CHARS);
}
