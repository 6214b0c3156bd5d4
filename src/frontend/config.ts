import type { RouterConfig, RouterMode, SplitMode } from "../router/index.ts";

export type { RouterConfig, RouterMode };

/** What a frontend needs to know; `cli/` fills it from flags, environment and file. */
export interface FrontendConfig {
  readonly namespace: string;
  readonly httpHost: string;
  /** 0 = any free port. */
  readonly httpPort: number;
  /** One of ours, or the name of a policy that was registered. */
  readonly routerMode: RouterMode | (string & {});
  /** What is not given has Dynamo's default. */
  readonly router?: Partial<RouterConfig>;
  /** `--router-replica-sync`: frontends tell each other what they have on the workers. @default false */
  readonly routerReplicaSync?: boolean;
  /** Ask a router service; `routerMode` is then for when none answers. @default the frontend routes by itself */
  readonly routerService?: { readonly answerTimeoutMs: number };
  /** Asked for by the operators' endpoints and fields; without one, clients of this machine are operators. */
  readonly adminKey?: string;
  /** @default DEFAULT_MIGRATION */
  readonly migration?: MigrationConfig;
  /** How long a worker may give no token to requests it has begun; 0 = for ever. @default DEFAULT_STALL_LIMIT_MS */
  readonly stallLimitMs?: number;
  /** Whether requests are split where there are prefill workers. @default "auto" */
  readonly disagg?: SplitMode;
  /** How long a prefill worker's blocks are waited for. @default DEFAULT_HANDOFF_TIMEOUT_MS */
  readonly handoffTimeoutMs?: number;
  /** How long a request that is to be split waits for room at a decode worker. @default DEFAULT_DECODE_WAIT_MS */
  readonly decodeWaitMs?: number;
  readonly limits: FrontendLimits;
  readonly drainTimeoutMs: number;
  /** How long a frontend that leaves still answers with 503 while somebody holds a connection. @default 500 */
  readonly lingerMs?: number;
}

/** How requests go on when their worker cannot. */
export interface MigrationConfig {
  /** Times per choice; 0 = the request fails with its worker. */
  readonly limit: number;
  /** Prompt and answer above which a request is not moved: computing them again would cost others too much. */
  readonly maxSequenceTokens: number;
}

export const DEFAULT_MIGRATION: MigrationConfig = { limit: 3, maxSequenceTokens: Infinity };
export const DEFAULT_STALL_LIMIT_MS = 30_000;
export const DEFAULT_HANDOFF_TIMEOUT_MS = 5_000;
export const DEFAULT_DECODE_WAIT_MS = 10_000;

/** Bounds on everything a client can send; the reasons stand beside the defaults in `cli/options.ts`. */
export interface FrontendLimits {
  readonly bodyBytes: number;
  readonly headersTimeoutMs: number;
  readonly bodyTimeoutMs: number;
  readonly messages: number;
  readonly n: number;
  readonly stopStrings: number;
  readonly prompts: number;
  /** Requests served at once. */
  readonly concurrentRequests: number;
  /** Answers of one model worked on at once; undefined = what its workers run, and a few more for each. */
  readonly concurrentPerModel: number | undefined;
  /** Of that, when other threads take the rest: 1 / threads. */
  readonly capacityShare: number;
  /** Requests that wait for a place; then 529. */
  readonly queuedRequests: number;
  /** Whole request. */
  readonly requestTimeoutMs: number;
  /** In one queue, the gate's or the router's; 0 = no limit, as below. */
  readonly queueTimeoutMs: number;
  /** From sending to a worker to its first token. */
  readonly firstTokenTimeoutMs: number;
  /** Between two tokens. */
  readonly idleTimeoutMs: number;
  /** Bytes a client may leave unread before its stream is closed. */
  readonly responseBufferBytes: number;
  readonly connections: number;
  /** Of prompt stretches and their tokens, per model (`preprocess/text-cache.ts`); 0 = no cache. */
  readonly tokenizerCacheBytes: number;
}

export const DEFAULT_LIMITS: FrontendLimits = {
  bodyBytes: 16 * 1024 * 1024,
  headersTimeoutMs: 10_000,
  bodyTimeoutMs: 60_000,
  messages: 2_048,
  n: 16,
  stopStrings: 16,
  prompts: 256,
  concurrentRequests: 1_024,
  concurrentPerModel: undefined,
  capacityShare: 1,
  queuedRequests: 1_024,
  requestTimeoutMs: 600_000,
  queueTimeoutMs: 120_000,
  firstTokenTimeoutMs: 300_000,
  idleTimeoutMs: 60_000,
  responseBufferBytes: 1024 * 1024,
  connections: 16_384,
  tokenizerCacheBytes: 64 * 1024 * 1024,
};
