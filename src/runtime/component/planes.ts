import type { Server } from "node:http";
import type { Logger, Metrics, Tracing } from "../../observability/index.ts";
import type { Clock, Random } from "../../std/index.ts";
import type { Discovery } from "../discovery/index.ts";
import type { EventPlane } from "../event-plane/index.ts";
import type { RequestPlane } from "../request-plane/index.ts";

/** Everything a role gets from outside: the planes, time, chance, logs and metrics. Built in `cli/planes.ts` and in tests. */
export interface Planes {
  readonly discovery: Discovery;
  readonly request: RequestPlane;
  readonly events: EventPlane;
  /** Where HTTP servers listen. @default the system's network */
  readonly http?: HttpNetwork;
  readonly clock: Clock;
  readonly random: Random;
  readonly logger: Logger;
  readonly metrics: Metrics;
  /** undefined: no traces are exported. */
  readonly tracing?: Tracing | undefined;
}

/** Gives a server its connections, by its `connection` event. */
export interface HttpNetwork {
  /** Rejects with what `Server.listen` would emit. */
  listen(server: Server, at: { readonly host: string; readonly port: number }): Promise<{ readonly port: number }>;
}

/** A started role: `startX(config, planes, signal)` gives one back when it is ready to serve. */
export interface RunningRole {
  /** Resolves when the role ended by itself or was stopped; rejects when it failed. */
  readonly done: Promise<void>;
  /** Unregister, finish what runs (at most `timeoutMs`), leave. Idempotent. */
  drain(timeoutMs: number): Promise<void>;
  /** Leave now; what runs ends with an error. Idempotent. */
  stop(): Promise<void>;
}
