import type { DynamoError } from "../errors/index.ts";
import type { KvEvent, LoadSnapshot, ModelCard, PreprocessedRequest } from "../protocol/index.ts";

/**
 * The engine contract: what a worker hosts. The embedded llama engine, the echo engine and every later engine pass
 * `engine.battery.ts`. An engine runs many streams at once and reports what one step did for all of them in one batch:
 * no promise, timer or object per token leaves it.
 *
 * Threading: all methods are called from the worker's event loop; sink calls come on that loop too, never inside a
 * method call, never after `stop` resolved. Every accepted stream gets exactly one final entry.
 */
export interface EngineInfo {
  /** `llama`, `echo`, ... */
  readonly engine: string;
  /** Library or server version, for `dynamo status`. */
  readonly engineVersion: string;
  readonly contextLength: number;
  readonly blockSizeTokens: number;
  /** KV blocks of the device cache; this and the next two are of one data-parallel rank. */
  readonly totalBlocks: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly dataParallelSize: number;
  readonly vocabularySize: number;
  /** Bytes of one exported block, 0 when the engine cannot export. */
  readonly blockBytes: number;
  /** It can hold an answer to `answerForm`. @default false */
  readonly answerForms?: boolean;
  /**
   * Where its KV events come from: the engine itself, or a guess of the worker's from the requests that went there.
   * @default "exact"
   */
  readonly kvEvents?: "exact" | "estimated";
  /** What it cannot do of requests. @default nothing */
  readonly lacks?: ModelCard["lacks"];
  /** It answers in text, which its worker puts into tokens: the text is exact, the tokens are a guess. @default "exact" */
  readonly tokens?: "exact" | "estimated";
  /** It moves blocks to another engine by itself (`Engine.transfer`): by which connector. @default it does not */
  readonly kvConnector?: string;
}

export interface EngineSink {
  /** One engine step: packed entries, written with `StepWriter` (protocol/engine-output.ts). Valid during the call only. */
  onStep(step: Uint8Array): void;
  /** Blocks that came into or left the engine's cache, in order. Called before the `onStep` that used them is possible. */
  onKvEvents(events: readonly KvEvent[]): void;
  /** The engine is dead: every running stream was ended with `engine-stopped` before this call. */
  onFatal(error: DynamoError): void;
  /**
   * Of engines that are processes of their own: it is gone and comes back by itself. Its streams were ended before. Until
   * `onAvailable`, submissions end with `engine-stopped`: the worker is to leave discovery meanwhile.
   */
  onUnavailable?(error: DynamoError): void;
  /** It is back, with an empty cache; the sizes may be others than before. */
  onAvailable?(info: EngineInfo): void;
}

/** KV blocks outside the engine: `data` holds `sequenceHashes.length / 2` blocks of `blockBytes` each, in order. */
export interface ExportedBlocks {
  /** (lo, hi) pairs, the leading blocks that were present; may be fewer than asked for. */
  readonly sequenceHashes: Uint32Array;
  readonly blockBytes: number;
  readonly data: Uint8Array;
}

/** What a block holds, for import: the tokens are needed so that the engine can register it under its hash. */
export interface ImportedBlocks {
  /** (lo, hi) pairs of all blocks from the start of the sequence on. */
  readonly sequenceHashes: Uint32Array;
  /** Tokens of all blocks from the start of the sequence on; length = blocks x block size. */
  readonly tokenIds: Uint32Array;
  readonly blockBytes: number;
  /** `data` begins with this block: those before it are in the cache. Nothing is taken if they are not. @default 0 */
  readonly startBlock?: number;
  readonly data: Uint8Array;
  /** That of the requests the blocks were computed for. @default shared by all */
  readonly cacheNamespace?: string;
}

/** Blocks to take over from shared memory: those of `tokenIds`, from index `firstBlock` on. */
export interface SharedBlocks {
  /** From the start of the sequence to the end of the last block: the engine derives the hashes from them. */
  readonly tokenIds: Uint32Array;
  readonly cacheNamespace: string;
  readonly firstBlock: number;
  /** Where block `firstBlock + i` is; -1 = it is expected in the engine's cache. */
  readonly slots: Int32Array;
}

/**
 * The way for blocks between the engine's cache and a memory that both sides map, without a copy on the way: slot `i` is
 * the bytes `[i * blockBytes, (i + 1) * blockBytes)`. For the tiers below the cache, which move single blocks of many
 * sequences. The caller keeps a slot for the call until it has settled. Calls run between two steps, in order with
 * `submit`: a request that is submitted after `copyIn` was called finds the blocks.
 */
export interface BlockPort {
  /** Once, before the other calls. */
  attach(memory: SharedArrayBuffer): void;
  /** Copies whichever of these blocks are in the cache, in any order; returns 1 per block that was, else 0. */
  copyOut(sequenceHashes: Uint32Array, slots: Int32Array): Promise<Uint8Array>;
  /** Takes leading blocks until one is missing or the cache has no room; returns how many were new. */
  copyIn(blocks: SharedBlocks): Promise<number>;
}

/**
 * What a prefill engine said of the prompt it computed, for the decode engine alone: whoever has it reads blocks of the
 * first. Good once, and only within the engine's lease, neither of which engines check.
 */
export interface TransferTicket {
  readonly parameters: Readonly<Record<string, unknown>>;
  /** The id that the request had at the prefill engine; connectors that push pair the two requests by it. */
  readonly requestId: string;
  /** Of the prompt's KV memory, as the engine counts it. */
  readonly blockCount: number;
}

/**
 * Disaggregated serving by engines that move the blocks themselves: the worker only carries the ticket. A stream of either
 * leg is one like any other (`abort`, entries, one final entry).
 */
export interface EngineTransfer {
  /** `nixl-pull`, `nixl-push`, `example`: as cards, metrics and explanations name it. */
  readonly connector: string;
  /** The roles that the server was started for. */
  readonly roles: readonly ("prefill" | "decode")[];
  /** For how long the engine keeps a prompt's blocks. Infinity = until it is restarted. */
  readonly leaseMs: number;
  /** Bytes of a block as far as was seen; 0 = not known yet. */
  readonly blockBytes: number;
  /**
   * Whether the decode engine can go on behind a first token of the prefill engine, and give what it would have given had it
   * computed both; else it computes the first token itself, and that of the prefill engine must not go out.
   */
  takesFirstToken(request: PreprocessedRequest): boolean;
  /** The connector cannot move this prompt: it is computed where it is decoded. Undefined = it can. */
  refusal?(request: PreprocessedRequest): string | undefined;
  /**
   * Computes the prompt and one token, as `submit`; the blocks are kept if it ends with `length`. Returns the ticket where the
   * decode engine has to come for the blocks while the prompt is being computed; its first token is not used then.
   */
  submitPrefill(streamId: number, request: PreprocessedRequest): TransferTicket | undefined;
  /** Within the `onStep` that has the final entry of a prefill leg, once; undefined = nothing was kept. */
  takeTicket(streamId: number): TransferTicket | undefined;
  /** Goes on from another engine's blocks. `request` holds the first token, or not, as `takesFirstToken` said. */
  submitDecode(streamId: number, request: PreprocessedRequest, ticket: TransferTicket): void;
}

/** How an engine's server is; for metrics. */
export interface EngineProcessState {
  readonly isUp: boolean;
  readonly restarts: number;
  readonly metricsAgeSeconds: number;
  readonly mispredictedRequests: number;
  /** Blocks looked at whose hash, as the engine tells it, is another than the one computed from their tokens. */
  readonly hashMismatches: number;
  /** Its KV events are its own, and none is missing. */
  readonly isKvWhole: boolean;
}

export interface Engine {
  /** Loads the model. Throws `model-file-invalid`, `library-unavailable`; after a failure `stop` must still be called. */
  start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo>;
  /**
   * Queues a request under a caller-chosen id (unique among live streams, under 2^32). Takes ownership of the request.
   * Never throws for capacity or content: such a stream ends with an error entry (`worker-full`, `context-length`, ...).
   */
  submit(streamId: number, request: PreprocessedRequest): void;
  /** Stops work on a stream within one step. Its final entry has finish `cancelled`. Unknown ids are ignored. */
  abort(streamId: number): void;
  /** The newest known load; cheap. */
  load(): LoadSnapshot;
  /** How many leading blocks of the chain are in the cache now. Throws `unsupported-operation`. */
  countBlocks(sequenceHashes: Uint32Array): Promise<number>;
  /**
   * The blocks of a chain as they come into the cache, copied out, in order from the first on: `onBlocks` gets a run of them
   * when some are there, and at the end of each step that completed more, before the sink hears of that step. The function
   * it returns ends it, and must be called. Undefined when the engine does not tell: then they are exported when all are there.
   */
  readonly followBlocks?:
    ((sequenceHashes: Uint32Array, onBlocks: (data: Uint8Array) => void) => () => void) | undefined;
  /** The leading blocks of the chain that are in the cache, copied out; it may begin anywhere. Throws `unsupported-operation`. */
  exportBlocks(sequenceHashes: Uint32Array): Promise<ExportedBlocks>;
  /** Puts blocks into the cache as if computed here; returns how many were taken. Throws `unsupported-operation`. */
  importBlocks(blocks: ImportedBlocks): Promise<number>;
  /** Undefined when the engine cannot export blocks. */
  readonly blockPort?: BlockPort | undefined;
  /** Of an engine that moves KV blocks to another one by itself. Known once it has started. */
  readonly transfer?: EngineTransfer | undefined;
  /** Of an engine that is a process of its own. */
  processState?(): EngineProcessState;
  /** Of an engine that is a process of its own: what an operator wants to know, for `/health` of the worker. */
  describe?(): Readonly<Record<string, unknown>>;
  /** Its own metrics, Prometheus text, for `/metrics` of the worker. */
  ownMetrics?(): string;
  /** The newest lines of its log that hold the text, all of them for an empty one. */
  searchLog?(text: string, limit: number): readonly string[];
  /** Drops every cached block that no running stream uses; returns how many. */
  clearBlocks(): Promise<number>;
  /** Resolves when no stream is running or waiting. New submissions are refused with `draining`. */
  drain(): Promise<void>;
  /** Ends everything with `engine-stopped` and frees all memory and threads. Idempotent. */
  stop(): Promise<void>;
}
