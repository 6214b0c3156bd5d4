import { DynamoError } from "../../errors/index.ts";
import type { SglangEngineConfig } from "../config.ts";
import {
  flagValue,
  hasFlag,
  kvEndpointsOf,
  reachableHost,
  type EngineCommand,
  type KvEndpoints,
} from "../foreign/index.ts";

import { transferBackendOf } from "./sglang-transfer.ts";

/** The command line of an SGLang server that a worker starts: what we need in front, what the user wrote behind it, which wins. */
export interface SglangArgs {
  readonly port: number | undefined;
  readonly host: string | undefined;
  readonly apiKey: string | undefined;
  readonly dataParallelSize: number;
  readonly kvEventsConfig: string | undefined;
}

export interface SglangPorts {
  readonly http: number;
  /** Of a prefill server: where decode servers ask for its blocks. 0 = none */
  readonly bootstrap: number;
  /** One for each rank from there on. */
  readonly events: number;
  readonly replay: number;
}

export interface SglangLaunchPlan {
  readonly command: EngineCommand;
  readonly url: string;
  readonly apiKey: string | undefined;
  readonly kv: KvEndpoints | undefined;
}

/** Pages of one token, SGLang's own default, make an index of as many blocks as tokens. */
export const DEFAULT_PAGE_SIZE = 16;

/** Throws `invalid-config` for arguments with which the worker could not work, all of them in one message. */
export function readSglangArgs(args: readonly string[], wantsKvEvents: boolean): SglangArgs {
  const problems: string[] = [];
  const refuse = (flag: string, why: string): void => {
    if (hasFlag(args, flag)) problems.push(`${flag}: ${why}`);
  };
  refuse("--grpc-mode", "the worker speaks HTTP to the server");
  refuse("--is-embedding", "the worker serves answers, not embeddings");
  if (wantsKvEvents) refuse("--disable-radix-cache", "without its prefix cache there are no KV events; add --no-engine-kv-events");
  if (wantsKvEvents && flagValue(args, "--page-size") === "1") {
    problems.push("--page-size: pages of one token are too small for routing by KV blocks; say --page-size 16, or --no-engine-kv-events");
  }
  const number = (...flags: readonly string[]): number | undefined => {
    const flag = flags.find((one) => hasFlag(args, one));
    const text = flag === undefined ? undefined : flagValue(args, flag);
    if (text === undefined) return undefined;
    if (/^[1-9]\d*$/.test(text)) return Number(text);
    problems.push(`${flag}: expected a whole number from 1 up, got ${text}`);
    return undefined;
  };
  const read = {
    port: number("--port"),
    host: flagValue(args, "--host"),
    apiKey: flagValue(args, "--api-key"),
    dataParallelSize: number("--data-parallel-size", "--dp-size", "--dp") ?? 1,
    kvEventsConfig: flagValue(args, "--kv-events-config"),
  };
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
  return read;
} // prettier-ignore

export function sglangLaunchPlan(
  config: SglangEngineConfig,
  args: SglangArgs,
  ports: SglangPorts,
  env: NodeJS.ProcessEnv,
  topic: string,
): SglangLaunchPlan {
  const launch = config.launch!;
  const [command, ...before] = launch.command;
  const kv = kvPlan(config, args, ports, topic);
  const sizes: readonly (readonly [string, number])[] = [
    ["--context-length", config.contextLength],
    ["--max-running-requests", config.maxSequences],
    ["--max-prefill-tokens", config.maxBatchedTokens],
    ["--page-size", config.blockSizeTokens || DEFAULT_PAGE_SIZE],
  ];
  // Priorities and any other order of the queue exclude each other.
  const hasOrder = hasFlag(launch.args, "--schedule-policy");
  return {
    command: {
      command: command!,
      args: [
        ...before,
        "--model-path",
        config.modelPath ?? "",
        ...(config.engineModel === undefined ? [] : ["--served-model-name", config.engineModel]),
        "--host",
        "127.0.0.1",
        "--port",
        String(ports.http),
        ...sizes.flatMap(([flag, size]) => (size === 0 ? [] : [flag, String(size)])),
        "--enable-metrics",
        "--enable-cache-report",
        ...disaggregation(config, ports),
        // Else each token comes with all tokens before it.
        "--incremental-streaming-output",
        ...(hasOrder ? [] : ["--enable-priority-scheduling"]),
        ...(kv.config === undefined ? [] : ["--kv-events-config", kv.config]),
        ...launch.args,
      ],
      env: { ...env, ...launch.env },
    },
    url: `http://${reachableHost(args.host)}:${ports.http}`,
    apiKey: args.apiKey ?? config.apiKey,
    kv: kv.endpoints,
  };
}

function disaggregation({ role = "agg", kvTransferConfig }: SglangEngineConfig, { bootstrap }: SglangPorts): string[] {
  if (role === "agg") return [];
  const backend = transferBackendOf(kvTransferConfig);
  return [
    "--disaggregation-mode",
    role,
    "--disaggregation-transfer-backend",
    backend,
    ...(bootstrap === 0 ? [] : ["--disaggregation-bootstrap-port", String(bootstrap)]),
  ];
}

/** Ours: as for vLLM, the server connects to a socket of the worker's, under a topic that only the two know. */
function kvPlan(
  config: SglangEngineConfig,
  { kvEventsConfig }: SglangArgs,
  ports: SglangPorts,
  topic: string,
): { readonly config?: string; readonly endpoints?: KvEndpoints } {
  if (!config.kvEvents) return {};
  const given = kvEventsConfig ?? config.kvEventsConfig;
  if (given !== undefined) {
    const endpoints = sglangKvEndpoints(given, "127.0.0.1");
    return { ...(kvEventsConfig === undefined ? { config: given } : {}), endpoints };
  }
  const endpoint = `tcp://127.0.0.1:${ports.events}`;
  const replayEndpoint = `tcp://127.0.0.1:${ports.replay}`;
  return {
    config: JSON.stringify({ publisher: "zmq", endpoint, replay_endpoint: replayEndpoint, topic }),
    endpoints: { endpoint, direction: "bind", replayEndpoint, topic },
  };
} // prettier-ignore

/** Throws `invalid-config`. */
export function sglangKvEndpoints(json: string, host: string): KvEndpoints {
  const endpoints = kvEndpointsOf(json, host);
  // Unlike vLLM's, its publisher is "null" unless named.
  if (endpoints !== undefined && /"publisher"\s*:\s*"zmq"/.test(json)) return endpoints;
  throw new DynamoError(
    "invalid-config",
    `--kv-events-config: SGLang publishes only with "publisher":"zmq" in it, got ${json}; --no-engine-kv-events goes without`,
  );
}

const PHASES: readonly (readonly [RegExp, string])[] = [
  [/server_args=ServerArgs\(|\bServerArgs\(/, "reading the model's configuration"],
  [/Init torch distributed begin/, "starting the processes of the devices"],
  [/Load weight begin/, "loading the weights"],
  [/Load weight end.*?elapsed=([\d.]+)/, "weights loaded in $1 s"],
  [/KV Cache is allocated.*?#tokens: ([\d,]+)/, "memory for $1 tokens of KV cache"],
  [/Capture cuda graph begin/i, "capturing CUDA graphs"],
  [/Uvicorn running on|Application startup complete/, "opening its port, warming up"],
  [/The server is fired up and ready to roll/, "ready"],
];

export function sglangPhaseOf(line: string): string | undefined {
  for (const [pattern, text] of PHASES) {
    const match = pattern.exec(line);
    if (match !== null) return text.replace("$1", match[1] ?? "");
  }
  return undefined;
}

/** Its access log of what we ask every second. */
export function isSglangNoise(line: string): boolean {
  return /"GET \/(?:metrics\/?|health|get_load|v1\/loads\S*) HTTP\/1\.1" (?:200|307)|Endpoint '\/get_load' is deprecated/.test(line);
} // prettier-ignore
