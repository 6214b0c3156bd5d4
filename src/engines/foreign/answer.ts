import type { DynamoError } from "../../errors/index.ts";
import type { KvEvent, ModelCard, PreprocessedRequest, TokenLogprob } from "../../protocol/index.ts";
import type { TransferTicket } from "../base.ts";
import type { AnswerHeaders, EngineHttp, HttpCall } from "./engine-http.ts";

/** What a foreign engine's server is, as far as a worker needs it; found out at each of its starts. */
export interface EngineFacts {
  readonly engineVersion: string;
  /** Its own name for the model, for requests to it. */
  readonly servedModel: string;
  readonly contextLength: number;
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly dataParallelSize: number;
  /** It says at the end of an answer how much of the prompt came from its cache. */
  readonly reportsCachedTokens: boolean;
  /** It can hold an answer to a form. */
  readonly answerForms: boolean;
  /** What it cannot do of requests; refused by `refusal`. @default nothing */
  readonly lacks?: NonNullable<ModelCard["lacks"]>;
  /** It answers in text, which is put into tokens here: the text is exact, the tokens are a guess. @default "exact" */
  readonly tokens?: "exact" | "estimated";
  /** By which it makes the block hashes of its KV events; undefined = it does not tell. */
  readonly blockHashAlgorithm?: string | undefined;
  /** As in `ScrapedLoad`. */
  readonly life: number | undefined;
  /** One line each, for the log: what it lacks and what that costs. */
  readonly notes: readonly string[];
}

/** What an engine's answer says, piece by piece; the engine's dialect calls these in any order, `finish` or `fail` last. */
export interface AnswerSink {
  /** Generated tokens, with as many logprobs when they were asked for. */
  tokens(tokenIds: readonly number[], logprobs?: readonly TokenLogprob[]): void;
  promptLogprobs(records: readonly TokenLogprob[]): void;
  /** Prompt tokens that came from the engine's cache. */
  cached(tokens: number): void;
  /** Of an engine with slots for sequences: which one holds this one from now on. */
  slot(id: number): void;
  /** What the decode engine is to be told, of a prefill leg; before `finish`. */
  transfer(parameters: Readonly<Record<string, unknown>>): void;
  finish(reason: "stop" | "length"): void;
  fail(error: DynamoError): void;
}

/** Reads the answer of one request. */
export interface AnswerReader {
  /** Data of one server-sent event, the end marker left out. */
  event(data: string): void;
  /** The whole body of an answer that is no stream. */
  whole(text: string): void;
  /** The end marker of a stream came. */
  done?(): void;
}

/** A scrape as far as routing needs it. Of all ranks together. */
export interface ScrapedLoad {
  readonly runningRequests: number;
  readonly waitingRequests: number;
  /** Part of the KV blocks in use, 0 to 1; undefined = not told. */
  readonly kvUsage: number | undefined;
  /** Engine steps so far; undefined = not told. */
  readonly steps: number | undefined;
  readonly preemptions: number;
  /** Another number for another life of the server; undefined = not told. */
  readonly life: number | undefined;
}

/** What an engine that tells no KV events may have in its cache: a guess, told as if the engine told it. */
export interface CacheEstimate {
  /** A sequence was computed: its whole blocks are there now. `slot` undefined = not known, or not yet. */
  computed(tokenIds: Uint32Array, cacheNamespace: string, slot?: number): KvEvent[];
  /** The engine's cache is empty. */
  clear(): void;
}

export type DialectCall = HttpCall & {
  readonly isStream: boolean;
  /** Said too when the request is aborted, where a closed connection alone works late. */
  readonly abortCall?: HttpCall;
};

/** How an engine hands KV blocks to another one by itself: see `EngineTransfer` for what stands here without words. */
export interface TransferDialect {
  readonly connector: string;
  readonly roles: readonly ("prefill" | "decode")[];
  readonly leaseMs: number;
  takesFirstToken(request: PreprocessedRequest, facts: EngineFacts): boolean;
  refusal?(request: PreprocessedRequest, facts: EngineFacts): string | undefined;
  /** Of a prompt. @default the blocks of its tokens */
  blockCount?(request: PreprocessedRequest, facts: EngineFacts): number;
  /** `requestId` is new for every leg: clients use theirs twice, and connectors pair requests by it. */
  prefillCall(request: PreprocessedRequest, facts: EngineFacts, requestId: string): DialectCall;
  /** Parameters that are known before the engine answers, see `submitPrefill`. @default they come with the answer */
  earlyParameters?(request: PreprocessedRequest, requestId: string): Readonly<Record<string, unknown>>;
  decodeCall(request: PreprocessedRequest, facts: EngineFacts, ticket: TransferTicket): DialectCall;
  /** What this engine has fetched since its start, by its own metrics; undefined = not told. */
  fetchedBytes?(metricsText: string): number | undefined;
}

/** What differs between engines; everything else is `ForeignEngine`. */
export interface EngineDialect {
  /** `vllm`: the engine's name in cards and messages. */
  readonly name: string;
  /** `vllm:`; its metrics are passed on, others of its process are not. */
  readonly metricsPrefix: string;
  readonly metricsPath: string;
  /** Its metrics may not tell that it was restarted: its events count for that too. @default false */
  readonly isLifeInEvents?: boolean;
  /** Asked with each scrape, where the metrics lag behind: `loadOf` gets its answer too. Known after the probe. @default none */
  readonly loadPath?: string | undefined;
  /** False while it starts; rejects when nobody answers. */
  isUp(http: EngineHttp, signal: AbortSignal): Promise<boolean>;
  /** Once it is up. Throws `invalid-config` with the fix for what cannot work. */
  probe(http: EngineHttp, signal: AbortSignal): Promise<EngineFacts>;
  /** `request` fits the engine: its length and its token ids were checked. */
  call(request: PreprocessedRequest, facts: EngineFacts): DialectCall;
  /** `isPrefill`: of a prefill leg, which says what the decode engine is to be told. */
  read(request: PreprocessedRequest, facts: EngineFacts, sink: AnswerSink, isPrefill: boolean): AnswerReader;
  /** Why this one cannot be served; asked before `call`. `isWhole`: no leg of a split one. @default nothing is refused */
  refusal?(request: PreprocessedRequest, facts: EngineFacts, isWhole: boolean): DynamoError | undefined;
  /** An answer with another status than 200. */
  errorOf(status: number, text: string, headers: AnswerHeaders): DynamoError;
  loadOf(metricsText: string, loadText?: string): ScrapedLoad;
  /** Of a rank, in place of KV events. @default whatever went there, least recently used out first */
  estimate?(facts: EngineFacts, dpRank: number): CacheEstimate;
  /** Undefined: the server was started for aggregated serving. */
  readonly transfer?: TransferDialect | undefined;
  /** Empties its cache; false when it could not, now. Throws `unsupported-operation`. */
  clearCache(http: EngineHttp): Promise<boolean>;
}
