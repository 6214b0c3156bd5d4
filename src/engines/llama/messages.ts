import type { DynamoErrorOptions, Reason } from "../../errors/index.ts";
import type { KvEvent, LoadSnapshot, PreprocessedRequest } from "../../protocol/index.ts";
import type { EngineInfo, ExportedBlocks, ImportedBlocks, LlamaEngineConfig, SharedBlocks } from "../index.ts";
import type { LibraryLine } from "./libllama.ts";

/**
 * What crosses between the engine's main side and its thread. Commands travel as one array per turn of the main loop;
 * results as one message per engine step. Requests and blocks are copied, packed steps and exported blocks are moved,
 * blocks of the tiers stay in memory that both sides map (`attach`).
 */
export interface ThreadData {
  readonly config: LlamaEngineConfig;
  readonly maxWaitingRequests: number;
  /** One i32, added to after each batch of commands: what the idle thread sleeps on. */
  readonly wake: SharedArrayBuffer;
  /** See `LoadBoard`. */
  readonly load: SharedArrayBuffer;
}

export type Command =
  | { readonly type: "submit"; readonly streamId: number; readonly request: PreprocessedRequest }
  | { readonly type: "abort"; readonly streamId: number }
  | { readonly type: "count"; readonly callId: number; readonly sequenceHashes: Uint32Array }
  | { readonly type: "export"; readonly callId: number; readonly sequenceHashes: Uint32Array }
  | { readonly type: "follow"; readonly callId: number; readonly sequenceHashes: Uint32Array }
  | { readonly type: "unfollow"; readonly callId: number }
  | { readonly type: "import"; readonly callId: number; readonly blocks: ImportedBlocks }
  | { readonly type: "attach"; readonly memory: SharedArrayBuffer }
  | {
      readonly type: "copy-out";
      readonly callId: number;
      readonly sequenceHashes: Uint32Array;
      readonly slots: Int32Array;
    }
  | { readonly type: "copy-in"; readonly callId: number; readonly blocks: SharedBlocks }
  | { readonly type: "clear"; readonly callId: number }
  | { readonly type: "stop" };

export type Reply = number | ExportedBlocks | Uint8Array;

/** A `DynamoError` in a form that survives structured cloning. */
export interface PlainError {
  readonly reason: Reason;
  readonly publicMessage: string;
  readonly options: Pick<DynamoErrorOptions, "diagnostic">;
}

export type Report =
  | { readonly type: "started"; readonly info: EngineInfo; readonly log: readonly LibraryLine[] }
  | { readonly type: "step"; readonly step: Uint8Array | undefined; readonly events: readonly KvEvent[] }
  /** Of a followed chain, before the step that completed them. */
  | { readonly type: "blocks"; readonly callId: number; readonly data: Uint8Array<ArrayBuffer> }
  | { readonly type: "reply"; readonly callId: number; readonly value: Reply }
  | { readonly type: "call-failed"; readonly callId: number; readonly error: PlainError }
  /** The last message: `error` undefined after `stop`. */
  | { readonly type: "ended"; readonly error: PlainError | undefined };

const LOAD_FIELDS: readonly (keyof LoadSnapshot)[] = [
  "runningRequests",
  "waitingRequests",
  "activeBlocks",
  "cachedBlocks",
  "totalBlocks",
  "pendingPrefillTokens",
  "steps",
  "generatedTokens",
  "promptTokens",
  "cachedPromptTokens",
  "preemptions",
];

/**
 * The load as shared numbers: the thread writes them after each step, the main side reads whenever asked, no message in
 * between. A reader may see some fields of one step and some of the next.
 */
export class LoadBoard {
  static readonly BYTES = LOAD_FIELDS.length * 8;
  readonly #values: Float64Array;

  constructor(memory: SharedArrayBuffer) {
    this.#values = new Float64Array(memory);
  }

  write(load: LoadSnapshot): void {
    for (let i = 0; i < LOAD_FIELDS.length; i++) this.#values[i] = load[LOAD_FIELDS[i]!];
  }

  read(): LoadSnapshot {
    const load: Partial<Record<keyof LoadSnapshot, number>> = {};
    for (let i = 0; i < LOAD_FIELDS.length; i++) load[LOAD_FIELDS[i]!] = this.#values[i]!;
    return load as LoadSnapshot;
  }
}
