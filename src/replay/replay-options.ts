import type { MockerEngineConfig } from "../engines/index.ts";
import type { TimingModel } from "../perf-model/index.ts";
import type { RouterConfig, RoutingPolicy } from "../router/index.ts";

/** How a trace is run. Everything random comes from `seed`: the same options and trace give the same report. */
export interface ReplayOptions {
  readonly policy: RoutingPolicy;
  readonly workers: number;
  /** Of each worker; what is not given has the mocker's default. Its `speedupRatio` makes the simulated hardware faster. */
  readonly engine?: Partial<Omit<MockerEngineConfig, "kind">>;
  /** @default the polynomials, or the profile that the caller read */
  readonly timing?: TimingModel;
  readonly router?: Partial<RouterConfig>;
  /** @default 1 */
  readonly seed?: number;
  readonly arrivals?: Arrivals;
  /** Only the first sessions. @default all */
  readonly maxSessions?: number;
  /** Spreads each arrival evenly over this time: traces whose times are rounded send bursts that never were. @default 0 */
  readonly smearMs?: number;
  /** From a pass's begin until the router knows its KV events. @default 1 */
  readonly eventDelayMs?: number;
  /** Between load reports of a worker. @default 250 */
  readonly loadIntervalMs?: number;
  readonly signal?: AbortSignal;
}

export type Arrivals =
  /** When the trace says, its times divided by `speedup`. */
  | { readonly kind: "schedule"; readonly speedup: number }
  /** So many sessions at a time, each replaced when it ends. */
  | { readonly kind: "concurrency"; readonly sessions: number };

export const ON_SCHEDULE: Arrivals = { kind: "schedule", speedup: 1 };
