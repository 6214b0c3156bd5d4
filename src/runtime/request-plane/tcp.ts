import { Metrics, silentLogger, type Logger } from "../../observability/index.ts";
import { TimerWheel, randomId64, systemClock, type Clock, type Random } from "../../std/index.ts";
import type { RequestPlane, RequestPlaneClient, RequestPlaneServer } from "./base.ts";
import { Heartbeat } from "./heartbeat.ts";
import { DEFAULT_LIMITS, type RequestPlaneLimits } from "./limits.ts";
import { TcpClient } from "./tcp-client.ts";
import type { TcpContext } from "./tcp-context.ts";
import { systemNetwork, type TcpNetwork } from "./tcp-network.ts";
import { TcpServer } from "./tcp-server.ts";

/**
 * The request plane over TCP: see the README of this folder for the format, the state machines and what things cost.
 * One event loop owns everything here; the deadlines of all streams hang on one wheel, all heartbeats on one timer.
 */
export interface TcpRequestPlaneOptions {
  /** What to bind. @default "127.0.0.1" */
  readonly host?: string;
  /** 0 lets the system choose. @default 0 */
  readonly port?: number;
  /** What others connect to. @default the bound address; for a wildcard the first address of this machine */
  readonly advertiseHost?: string;
  /** When it is not the bound one: behind a proxy or a port mapping. @default the bound port */
  readonly advertisePort?: number;
  /** Both sides must have the same one, or none. */
  readonly clusterSecret?: string;
  readonly clock?: Clock;
  readonly logger?: Logger;
  readonly metrics?: Metrics;
  /** @default 1000 */
  readonly heartbeatMs?: number;
  /** A peer silent for this many beats is dead. @default 3 */
  readonly heartbeatMisses?: number;
  /** For connection and hello together. @default 3000 */
  readonly connectTimeoutMs?: number;
  readonly limits?: Partial<RequestPlaneLimits>;
  /** @default the system's */
  readonly network?: TcpNetwork;
  /** Of the id that peers are shown. @default the system's */
  readonly random?: Random;
}

export class TcpRequestPlane implements RequestPlane {
  readonly client: RequestPlaneClient;
  readonly #context: TcpContext;
  readonly #servers: RequestPlaneServer[] = [];

  constructor(options: TcpRequestPlaneOptions = {}) {
    const clock = options.clock ?? systemClock;
    this.#context = {
      network: options.network ?? systemNetwork,
      host: options.host ?? "127.0.0.1",
      port: options.port ?? 0,
      advertiseHost: options.advertiseHost,
      advertisePort: options.advertisePort,
      clusterSecret: options.clusterSecret === "" ? undefined : options.clusterSecret,
      clock,
      schedule: (run) => clock.nextTurn(run),
      logger: options.logger ?? silentLogger,
      metrics: options.metrics ?? new Metrics(),
      connectTimeoutMs: options.connectTimeoutMs ?? 3_000,
      limits: { ...DEFAULT_LIMITS, ...options.limits },
      wheel: new TimerWheel({ clock }),
      heartbeat: new Heartbeat({
        clock,
        beatMs: options.heartbeatMs ?? 1_000,
        misses: options.heartbeatMisses ?? 3,
      }),
      peerId: randomId64(options.random),
    };
    this.client = new TcpClient(this.#context);
  }

  async listen(): Promise<RequestPlaneServer> {
    const server = await TcpServer.listen(this.#context);
    this.#servers.push(server);
    return server;
  }

  async close(): Promise<void> {
    await Promise.all([this.client.close(), ...this.#servers.map((server) => server.close())]);
    this.#context.wheel.close();
  }
}
