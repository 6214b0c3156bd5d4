import type { MetricsSnapshot } from "../../observability/index.ts";
import type { BusyThresholds, DecisionExplanation, FlatKvShare } from "../../router/index.ts";
import type { SplitView } from "../split-stage.ts";
import type { LiveRequestView } from "../live-requests.ts";

/**
 * Every message between the frontend's host thread and the threads that serve HTTP. Order is kept per direction. All of
 * it is plain data of this process; nothing here comes from outside unchecked.
 */
export type HostMessage =
  /** Start serving; port 0 = choose one and tell it. */
  | { readonly type: "listen"; readonly port: number }
  /** The index of a model, or that there is none now. `health` are the counts of a `KvFeedHealth`. */
  | { readonly type: "kv-index"; readonly model: string; readonly index: PostedIndex | undefined }
  /** The index's numbers for a worker's ranks; none = the worker is forgotten. */
  | {
      readonly type: "kv-ranks";
      readonly model: string;
      readonly instanceId: string;
      readonly ranks: readonly number[];
    }
  /** Whether all threads serve the model, so that any of them may list it. */
  | { readonly type: "listed"; readonly model: string; readonly isListed: boolean }
  | { readonly type: "question"; readonly id: number; readonly question: Question }
  /** To who asked: of all others, host included. */
  | { readonly type: "answers"; readonly id: number; readonly answers: readonly Answer[] | undefined }
  | { readonly type: "drain"; readonly timeoutMs: number }
  | { readonly type: "stop" };

export type ThreadMessage =
  | { readonly type: "ready"; readonly port: number }
  /** It could not start, or broke; it ends by itself. */
  | {
      readonly type: "failed";
      readonly reason: string;
      readonly message: string;
      readonly diagnostic: string | undefined;
    }
  /** The first worker of a model joined this thread's router, or the last one left. */
  | { readonly type: "served"; readonly model: string; readonly isServed: boolean }
  | { readonly type: "ask"; readonly id: number; readonly question: Question }
  | { readonly type: "answer"; readonly id: number; readonly answer: Answer };

export interface PostedIndex {
  readonly share: FlatKvShare;
  readonly health: Int32Array<SharedArrayBuffer>;
}

/** What one thread asks all others. */
export type Question =
  | { readonly type: "metrics" }
  | { readonly type: "explain"; readonly requestId: string }
  | { readonly type: "live-requests"; readonly limit: number }
  | { readonly type: "cancel-request"; readonly id: string }
  | { readonly type: "busy-thresholds"; readonly model: string; readonly thresholds: BusyThresholds };

export type Answer =
  | { readonly type: "metrics"; readonly snapshot: MetricsSnapshot }
  | { readonly type: "explain"; readonly explained: ExplainedRequest | undefined }
  | { readonly type: "live-requests"; readonly total: number; readonly requests: readonly LiveRequestView[] }
  | { readonly type: "cancel-request"; readonly count: number }
  | { readonly type: "done" };

export interface ExplainedRequest {
  readonly model: string;
  readonly decisions: readonly DecisionExplanation[];
  /** One per choice; none where there are no prefill workers. */
  readonly disaggregation?: readonly SplitView[];
}
