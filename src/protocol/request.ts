import { DynamoError } from "../errors/index.ts";
import { ByteReader, ByteWriter } from "../std/index.ts";

/**
 * The request as a worker gets it: tokens, not text. Everything that needs characters (stop strings, templates,
 * detokenizing) stays in the frontend. Wire form: u32 length of the JSON part, JSON (all but the tokens), then the
 * tokens as u32 little-endian.
 */
export interface SamplingOptions {
  /** 0 = greedy. Range 0 to 2. */
  readonly temperature: number;
  /** (0, 1]; 1 = off. */
  readonly topP: number;
  /** 0 = off. */
  readonly topK: number;
  /** [0, 1]; 0 = off. */
  readonly minP: number;
  /** [-2, 2]; over generated tokens, as OpenAI defines it. */
  readonly presencePenalty: number;
  readonly frequencyPenalty: number;
  /** (0, 2]; 1 = off; over prompt and generated tokens, as in Keskar et al. 2019 (CTRL). */
  readonly repetitionPenalty: number;
  /** u32; undefined = drawn by the engine. */
  readonly seed?: number;
  /** [token id, bias -100 to 100] pairs. */
  readonly logitBias?: readonly (readonly [number, number])[];
}

export interface StopOptions {
  /** At least 1; the frontend always sets it (context length when the client gave none). */
  readonly maxTokens: number;
  /** Before that many tokens no stop token may be sampled. */
  readonly minTokens: number;
  /** End-of-sequence ids and the client's own; the matching token is not part of the output. */
  readonly stopTokenIds: readonly number[];
  /** Generate past `stopTokenIds` of the model; the client's own still stop (already merged by the frontend). */
  readonly ignoreEos: boolean;
}

export interface OutputOptions {
  /** Alternatives per generated token: -1 = no logprobs, 0 = only the sampled token's, up to 20. */
  readonly topLogprobs: number;
  /** Logprobs of the prompt's tokens too (same count of alternatives); such a request does not use the prefix cache. */
  readonly promptLogprobs: boolean;
}

export interface PreprocessedRequest {
  readonly requestId: string;
  readonly model: string;
  /** length = prompt tokens, at least 1. */
  readonly tokenIds: Uint32Array;
  readonly sampling: SamplingOptions;
  readonly stop: StopOptions;
  readonly output: OutputOptions;
  /** Higher is sooner; 0 = normal. */
  readonly priority: number;
  /** The data-parallel rank to run on, chosen by a router that knows the ranks' caches; undefined = the engine's choice. */
  readonly dpRank?: number;
  /** Isolates KV reuse: enters the hash seed. Empty = shared. */
  readonly cacheNamespace: string;
}

export const GREEDY: SamplingOptions = Object.freeze({
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
});

/** Largest JSON part: bias lists of 1,024 entries and 64 stop ids fit 30 times over. */
const META_MAX_BYTES = 1 << 20;
const writer = new ByteWriter(16 * 1024);

/** Encodes into a shared slab: the result is valid until the next call. */
export function encodeRequest(request: PreprocessedRequest): Buffer {
  const { tokenIds, ...meta } = request;
  writer.reset();
  writer.text(JSON.stringify(meta));
  writer.u32s(tokenIds);
  return writer.view();
}

/** Decodes a copy. Throws `malformed-frame`. The sender validated the content; only the shape is checked here. */
export function decodeRequest(bytes: Uint8Array): PreprocessedRequest {
  try {
    const reader = new ByteReader(bytes);
    const meta = JSON.parse(reader.text(META_MAX_BYTES)) as Omit<PreprocessedRequest, "tokenIds">;
    if (![meta, meta?.sampling, meta?.stop, meta?.output].every((part) => typeof part === "object" && part !== null)) {
      throw new Error("the JSON part is not a request");
    }
    if (reader.remaining % 4 !== 0) throw new Error("the token part is not a multiple of 4 bytes");
    return { ...meta, tokenIds: reader.u32s(reader.remaining / 4) };
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the request could not be decoded", { diagnostic: String(cause), cause });
  }
}
