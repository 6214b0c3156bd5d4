import type { Logger, Metrics } from "../../observability/index.ts";
import type { Clock, TimerWheel } from "../../std/index.ts";
import type { Heartbeat } from "./heartbeat.ts";
import type { RequestPlaneLimits } from "./limits.ts";

/** What the client and the servers of one plane share. */
export interface TcpContext {
  readonly host: string;
  readonly port: number;
  readonly advertiseHost: string | undefined;
  readonly clusterSecret: string | undefined;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly metrics: Metrics;
  readonly connectTimeoutMs: number;
  readonly limits: RequestPlaneLimits;
  readonly wheel: TimerWheel;
  readonly heartbeat: Heartbeat;
  readonly peerId: bigint;
}
