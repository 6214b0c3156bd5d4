import { DynamoError } from "../../errors/index.ts";
import type { EngineOptions } from "../load-engine.ts";
import type { EngineDialect } from "./answer.ts";
import { EngineHttp, parseEngineUrl } from "./engine-http.ts";
import type { EngineCommand } from "./engine-process.ts";
import { EngineServer } from "./engine-server.ts";
import type { ForeignEngineConfig } from "./foreign-config.ts";
import { ForeignEngine } from "./foreign-engine.ts";
import type { KvFeed } from "./kv-feed.ts";
import { claimFreePorts, claimName, claimPort, type PortClaim } from "./port-claims.ts";

/** From a configuration to an engine: what is the same for all servers, whether they run already or are started. */
export interface ForeignPlace {
  readonly dialect: EngineDialect;
  readonly url: string;
  readonly apiKey: string | undefined;
  /** With every request. */
  readonly headers?: Readonly<Record<string, string>>;
  readonly feed: KvFeed | undefined;
}

/** A server that runs already: one worker on this machine has it. Throws `address-in-use`, `invalid-config`. */
export function attachEngine(
  config: ForeignEngineConfig,
  options: EngineOptions,
  place: (url: string, host: string) => ForeignPlace,
): ForeignEngine {
  const { url } = config;
  if (url === undefined) throw new DynamoError("internal", "an engine has an address or a command");
  const { origin, socketPath } = parseEngineUrl(url);
  const opened = place(url, socketPath === undefined ? new URL(origin).hostname : LOOPBACK);
  const claim = claimName(`attached-${url}`);
  if (typeof claim === "number") {
    throw new DynamoError(
      "address-in-use",
      `process ${claim} is a worker of the engine at ${url} already; a second one would count its load and its cache twice`,
    );
  }
  return foreignEngine(config, options, opened, { onStopped: claim });
}

export interface LaunchedPlace extends ForeignPlace {
  /** `SGLang`, for messages. */
  readonly name: string;
  readonly command: EngineCommand;
  readonly phaseOf: (line: string) => string | undefined;
  readonly isNoise: (line: string) => boolean;
  /** Files that were made for it. */
  readonly onStopped?: () => void;
}

/** Ports for the server that is to be started; kept until the engine has stopped. */
export interface LaunchPorts {
  /** The one that somebody named with `flag`, or a free one. */
  http(wanted: number, flag: string): Promise<number>;
  /** So many in a row. */
  free(count: number): Promise<number>;
}

/** A server that this worker starts and ends. Throws `address-in-use`, `invalid-config`. */
export async function launchEngine(
  config: ForeignEngineConfig,
  options: EngineOptions,
  plan: (ports: LaunchPorts) => Promise<LaunchedPlace>,
): Promise<ForeignEngine> {
  const claims: PortClaim[] = [];
  const take = (claim: PortClaim): number => {
    claims.push(claim);
    return claim.port;
  };
  const release = (): void => {
    for (const claim of claims.splice(0)) claim.release();
  };
  const free = async (count: number): Promise<number> => take(await claimFreePorts(LOOPBACK, count, Math.random));
  try {
    const place = await plan({
      http: async (wanted, flag) => (wanted === 0 ? free(1) : take(await claimPort(LOOPBACK, wanted, flag))),
      free,
    });
    const logPath = config.launch?.logPath;
    const server = new EngineServer({
      name: place.name,
      launch: place.command,
      clock: options.clock,
      logger: options.logger,
      phaseOf: place.phaseOf,
      isNoise: place.isNoise,
      ...(logPath === undefined ? {} : { logPath }),
      onExit: (exit) => engine.onServerExit(exit),
    });
    const onStopped = (): void => {
      place.onStopped?.();
      release();
    };
    const engine: ForeignEngine = foreignEngine(config, options, place, { server, onStopped });
    return engine;
  } catch (thrown) {
    release();
    throw thrown;
  }
}

const LOOPBACK = "127.0.0.1";

function foreignEngine(
  config: ForeignEngineConfig,
  { clock, logger }: EngineOptions,
  { dialect, url, apiKey, headers, feed }: ForeignPlace,
  more: { readonly server?: EngineServer; readonly onStopped: () => void },
): ForeignEngine {
  const { vocabularySize, startTimeoutMs, metricsIntervalMs, metricsMaxAgeMs, hangTimeoutMs } = config;
  const http = new EngineHttp({ url, ...(apiKey === undefined ? {} : { apiKey }), ...(headers && { headers }) });
  const times = { startTimeoutMs, metricsIntervalMs, metricsMaxAgeMs, hangTimeoutMs };
  return new ForeignEngine({ dialect, http, feed, clock, logger, vocabularySize, ...times, ...more });
}
