import type { Logger, Metrics } from "../../observability/index.ts";
import type { Clock, TimerWheel } from "../../std/index.ts";
import type { Schedule } from "./flusher.ts";
import type { Heartbeat } from "./heartbeat.ts";
import type { RequestPlaneLimits } from "./limits.ts";
import type { TcpNetwork } from "./tcp-network.ts";

/** What the client and the servers of one plane share. */
export interface TcpContext {
  readonly network: TcpNetwork;
  readonly host: string;
  readonly port: number;
  readonly advertiseHost: string | undefined;
  readonly advertisePort: number | undefined;
  readonly clusterSecret: string | undefined;
  readonly clock: Clock;
  /** The clock's turns. */
  readonly schedule: Schedule;
  readonly logger: Logger;
  readonly metrics: Metrics;
  readonly connectTimeoutMs: number;
  readonly limits: RequestPlaneLimits;
  readonly wheel: TimerWheel;
  readonly heartbeat: Heartbeat;
  readonly peerId: bigint;
}
