import type { ActiveSequenceEvent, RestoredBlocks } from "../protocol/index.ts";
import type { BlockHashes } from "../tokens/index.ts";
import type { RouterConfig } from "./config.ts";
import type { DecisionExplanation } from "./explain/render.ts";
import type { PreferredTaint } from "./worker-set.ts";

/**
 * What the router is asked. Keep the object for further attempts of the same request: the router puts the prompt's
 * hashes into it at first use.
 */
export interface RouteRequest {
  /** For the explanation and for replicas. @default made up */
  readonly requestId?: string;
  /** length = prompt tokens. May be empty when `hashes` and `promptTokenCount` are given. */
  readonly tokenIds: Uint32Array;
  /** @default the length of `tokenIds` */
  readonly promptTokenCount?: number;
  /** Isolates KV reuse: enters the hash seed. @default shared */
  readonly cacheNamespace?: string;
  /** Workers already tried for this request. */
  readonly excluded?: ReadonlySet<string>;
  /** Only these workers. @default all */
  readonly allowed?: ReadonlySet<string>;
  /** This worker and no other; without a rank the policy chooses among its ranks. */
  readonly pinned?: { readonly instanceId: string; readonly dpRank?: number };
  readonly requiredTaints?: readonly string[];
  readonly preferredTaints?: readonly PreferredTaint[];
  /** Requests of one session stay on one worker while session affinity is on. */
  readonly sessionId?: string;
  /** Larger first, before anything else. @default 0 */
  readonly strictPriority?: number;
  /** A head start in the queue, seconds. @default 0 */
  readonly priorityJump?: number;
  /** Tokens the caller expects to get. @default 0 = unknown */
  readonly expectedOutputTokens?: number;
  /** On the monotonic clock: a request that still waits then fails. @default none */
  readonly deadlineMs?: number;
  /** Settings for this request only. */
  readonly overrides?: RouteOverrides;
  /** Why the decision knows less than it should, for the explanation: set by who falls back to this router. */
  readonly degradation?: string;
  /** The caller wants the explanation soon: a router in another process sends it along. @default false */
  readonly explain?: boolean;
  /**
   * An answer that was under way on another worker, so many tokens long (0 or more), which end `tokenIds`: neither the queue
   * nor busy thresholds hold it up. @default a new request
   */
  readonly resumedTokens?: number | undefined;
  /**
   * Only where it has a place and KV memory for the prompt at once: else it waits, in arrival order, until it has. One that
   * is larger than any worker is told so by the worker. @default false
   */
  readonly needsRoom?: boolean;
  /** Of the workers that prefill for others: for a router in another process, which has them and the others. @default the others */
  readonly pool?: "prefill";
  /** What the worker is to do of the request, for the explanation. @default "aggregated" */
  readonly stage?: RouteStage;
  /** Set by the router. */
  hashes?: BlockHashes | undefined;
}

export type RouteStage = "aggregated" | "prefill" | "decode";

/** Dynamo's for the decode stage: the blocks come along, so neither what is cached nor the prompt's computation counts. */
export const DECODE_STAGE_OVERRIDES: RouteOverrides = Object.freeze({
  overlapScoreCredit: 0,
  assumeKvReuse: false,
  trackPrefillTokens: false,
});

export type RouteOverrides = Partial<
  Pick<
    RouterConfig,
    | "overlapScoreCredit"
    | "prefillLoadScale"
    | "temperature"
    | "assumeKvReuse"
    | "trackPrefillTokens"
    | "sharedCacheMultiplier"
  >
>;

/** How a request ended on its worker. */
export interface RequestEnd {
  /** `finished`, or the reason of the error. */
  readonly outcome: string;
}

export interface RoutingDecision {
  readonly instanceId: string;
  readonly address: string;
  readonly dpRank: number;
  readonly policy: string;
  readonly reason: string;
  readonly candidateCount: number;
  /** Leading prompt blocks that the chosen rank should have, in any tier. */
  readonly overlapBlocks: number;
  /** Time in the router's queue. */
  readonly queuedMs: number;
  /**
   * The worker's first word on the request: the prompt is computed, and so much of it came from its cache. Called again when
   * the engine counted otherwise in the end: then only that number is taken over.
   */
  firstToken(cachedTokens: number): void;
  /** Before it: prompt blocks that the worker brought back from the tiers below its engine's cache. */
  restored(blocks: RestoredBlocks): void;
  /** Generated tokens, as they come. */
  addTokens(count: number): void;
  /** As for operators, with what is known of the request by now; undefined when a remote router was not asked for it. */
  explain(): DecisionExplanation | undefined;
  /** Must be called exactly when the request left the worker, however it ended. Further calls do nothing. */
  release(end?: RequestEnd): void;
}

/** What replicas tell each other of their bookings; output growth is not told, as in Dynamo. */
export type BookingEvent = ActiveSequenceEvent;
