import { delimiter } from "node:path";
import { DynamoError } from "../../errors/index.ts";
import {
  flagValue,
  hasFlag,
  kvEndpointsOf,
  reachableHost,
  type EngineCommand,
  type KvEndpoints,
} from "../foreign/index.ts";
import type { VllmEngineConfig } from "../config.ts";
import { NIXL_PAUSE_VARIABLE, quietNixlFolder } from "./quiet-nixl.ts";
import { readKvTransfer, type VllmKvTransfer } from "./vllm-transfer.ts";

/**
 * The command line of a `vllm serve` that a worker starts. What we need goes in front, what the user wrote behind `--` comes
 * after it and wins; where the user's own word decides an address or a size, it is read back from there.
 */
export interface VllmLaunchPlan {
  readonly command: EngineCommand;
  readonly url: string;
  readonly apiKey: string | undefined;
  readonly kv: KvEndpoints | undefined;
  readonly kvTransfer: VllmKvTransfer | undefined;
}

export interface VllmPorts {
  readonly http: number;
  /** One for each rank from there on. */
  readonly events: number;
  readonly replay: number;
  /** Where decode servers ask for the connector's metadata; 0 = the server has no part in that. */
  readonly sideChannel: number;
}

/** What the user's own arguments say about things that are our business too. */
export interface VllmArgs {
  readonly port: number | undefined;
  readonly host: string | undefined;
  readonly socketPath: string | undefined;
  readonly apiKey: string | undefined;
  readonly dataParallelSize: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly kvEventsConfig: string | undefined;
  readonly kvTransferConfig: string | undefined;
  readonly device: string | undefined;
}

/** Throws `invalid-config` for arguments with which the worker could not work, all of them in one message. */
export function readVllmArgs(args: readonly string[]): VllmArgs {
  const problems: string[] = [];
  const refuse = (flag: string, why: string): void => {
    if (hasFlag(args, flag)) problems.push(`${flag}: ${why}`);
  };
  refuse("--headless", "the worker speaks to the server's HTTP port, which a headless one has not");
  refuse("--grpc", "the worker speaks HTTP to the server");
  refuse("--disable-log-stats", "the worker takes sizes and load from the server's metrics");
  const number = (flag: string, min: number): number | undefined => {
    const text = flagValue(args, flag);
    if (text === undefined) return undefined;
    const value = sizeOf(text);
    if (value === undefined || value < min) {
      problems.push(`${flag}: expected a whole number from ${min} up, got ${text}`);
      return undefined;
    }
    return value;
  };
  const read = {
    port: number("--port", 1),
    host: flagValue(args, "--host"),
    socketPath: flagValue(args, "--uds"),
    apiKey: flagValue(args, "--api-key"),
    dataParallelSize: number("--data-parallel-size", 1) ?? number("-dp", 1) ?? 1,
    maxSequences: number("--max-num-seqs", 1) ?? 0,
    maxBatchedTokens: number("--max-num-batched-tokens", 1) ?? 0,
    kvEventsConfig: flagValue(args, "--kv-events-config"),
    kvTransferConfig: flagValue(args, "--kv-transfer-config"),
    device: flagValue(args, "--device"),
  };
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
  return read;
} // prettier-ignore

/** vLLM takes `8k` for 8,000 and `8K` for 8,192. */
function sizeOf(text: string): number | undefined {
  const match = /^(\d+)([kKmM]?)$/.exec(text);
  if (match === null) return undefined;
  const factor = { "": 1, k: 1_000, K: 1_024, m: 1_000_000, M: 1_048_576 }[match[2] as "" | "k" | "K" | "m" | "M"];
  return Number(match[1]) * factor;
}

export function vllmLaunchPlan(
  config: VllmEngineConfig,
  args: VllmArgs,
  ports: VllmPorts,
  env: NodeJS.ProcessEnv,
  topic: string,
): VllmLaunchPlan {
  const launch = config.launch!;
  const [command, ...before] = launch.command;
  const kv = kvPlan(config, args, ports, topic);
  const moves = transferPlan(config, args, ports, env);
  const sizes: readonly (readonly [string, number])[] = [
    ["--max-model-len", config.contextLength],
    ["--max-num-seqs", config.maxSequences],
    ["--max-num-batched-tokens", config.maxBatchedTokens],
    ["--block-size", config.blockSizeTokens],
  ];
  return {
    command: {
      command: command!,
      args: [
        ...before,
        "serve",
        config.modelPath ?? "",
        ...(config.engineModel === undefined ? [] : ["--served-model-name", config.engineModel]),
        ...(args.socketPath === undefined ? ["--host", "127.0.0.1", "--port", String(ports.http)] : []),
        ...sizes.flatMap(([flag, size]) => (size === 0 ? [] : [flag, String(size)])),
        "--enable-prompt-tokens-details",
        "--scheduling-policy",
        "priority",
        ...(kv.config === undefined ? [] : ["--kv-events-config", kv.config]),
        ...moves.args,
        ...launch.args,
      ],
      // Equal block hashes on all workers, for whoever compares them.
      env: { PYTHONHASHSEED: "0", ...moves.env, ...env, ...moves.forcedEnv, ...launch.env },
    },
    url: args.socketPath === undefined ? `http://${reachableHost(args.host)}:${ports.http}` : `unix:${args.socketPath}`,
    apiKey: args.apiKey ?? config.apiKey,
    kv: kv.endpoints,
    kvTransfer: moves.transfer,
  };
}

const LOOPBACK = "127.0.0.1";
/** 5 % of a core of an idle server, and some tenths of a millisecond to a transfer. */
const NIXL_PAUSE_US = 500;

/**
 * The connector's flag and environment. `env` gives way to what the user has set; `forcedEnv` does not: two servers of one
 * host cannot have the same side channel, and a path is put in front of the user's, not in its place.
 */
function transferPlan(
  { role = "agg", kvTransferConfig, nixlPauseUs = NIXL_PAUSE_US }: VllmEngineConfig,
  args: VllmArgs,
  { sideChannel }: VllmPorts,
  env: NodeJS.ProcessEnv,
): {
  readonly args: readonly string[];
  readonly env: NodeJS.ProcessEnv;
  readonly forcedEnv: NodeJS.ProcessEnv;
  readonly transfer: VllmKvTransfer | undefined;
} {
  if (role === "agg") {
    // Some connector of its own, to a tier below its cache, that is nothing of ours.
    const own =
      args.kvTransferConfig === undefined && kvTransferConfig !== undefined
        ? ["--kv-transfer-config", kvTransferConfig]
        : [];
    return { args: own, env: {}, forcedEnv: {}, transfer: undefined };
  }
  const isCpu = isCpuServer(args.device, env);
  const transfer = readKvTransfer({ role, given: args.kvTransferConfig ?? kvTransferConfig, isCpu });
  const flags = args.kvTransferConfig === undefined ? ["--kv-transfer-config", transfer.json] : [];
  if (transfer.kind === "example") return { args: flags, env: {}, forcedEnv: {}, transfer };
  const isQuiet = nixlPauseUs > 0;
  const path = [quietNixlFolder(), env.PYTHONPATH ?? ""].filter((part) => part !== "").join(delimiter);
  return {
    args: flags,
    env: { VLLM_NIXL_SIDE_CHANNEL_HOST: LOOPBACK },
    forcedEnv: {
      VLLM_NIXL_SIDE_CHANNEL_PORT: String(sideChannel),
      ...(isQuiet ? { PYTHONPATH: path, [NIXL_PAUSE_VARIABLE]: String(nixlPauseUs) } : {}),
    },
    transfer,
  };
}

/** vLLM's builds for CPUs are told nothing about it; what they are started with tells. */
function isCpuServer(device: string | undefined, env: NodeJS.ProcessEnv): boolean {
  return device === "cpu" || Object.keys(env).some((name) => name.startsWith("VLLM_CPU_"));
}

/**
 * Ours: the server connects to a socket of the worker's on loopback, so that no other machine hears it, and a topic that
 * nobody else knows keeps strangers' batches out.
 */
function kvPlan(
  config: VllmEngineConfig,
  { kvEventsConfig }: VllmArgs,
  ports: VllmPorts,
  topic: string,
): { readonly config?: string; readonly endpoints?: KvEndpoints } {
  if (!config.kvEvents) return {};
  const given = kvEventsConfig ?? config.kvEventsConfig;
  if (given !== undefined) {
    const endpoints = kvEndpointsOf(given, "127.0.0.1");
    return { ...(kvEventsConfig === undefined ? { config: given } : {}), ...(endpoints === undefined ? {} : { endpoints }) };
  }
  const endpoint = `tcp://127.0.0.1:${ports.events}`;
  const replayEndpoint = `tcp://127.0.0.1:${ports.replay}`;
  return {
    config: JSON.stringify({
      enable_kv_cache_events: true,
      publisher: "zmq",
      endpoint,
      replay_endpoint: replayEndpoint,
      topic,
    }),
    endpoints: { endpoint, direction: "bind", replayEndpoint, topic },
  };
} // prettier-ignore

/** What vLLM's lines say about its start, for people who wait. */
const PHASES: readonly (readonly [RegExp, string])[] = [
  [/Resolved architecture: (\S+)/, "reading the model's configuration ($1)"],
  [/Initializing a V1 LLM engine/, "starting the engine process"],
  [/Starting to load model/, "loading the weights"],
  [/Loading weights took ([\d.]+)/, "weights loaded in $1 s"],
  [/(?:torch\.compile|Dynamo bytecode transform|Compiling a graph)/, "compiling"],
  [/Capturing CUDA graphs?/i, "capturing CUDA graphs"],
  [/GPU KV cache size: ([\d,]+) tokens/, "memory for $1 tokens of KV cache"],
  [/Starting vLLM server on/, "opening its port"],
];

export function vllmPhaseOf(line: string): string | undefined {
  for (const [pattern, text] of PHASES) {
    const match = pattern.exec(line);
    if (match !== null) return text.replace("$1", match[1] ?? "");
  }
  return undefined;
}

/** Its access log of what we ask every second. */
export function isVllmNoise(line: string): boolean {
  return /"GET \/(?:metrics|health|load) HTTP\/1\.1" 200/.test(line);
}
