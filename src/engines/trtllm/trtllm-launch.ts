import { DynamoError } from "../../errors/index.ts";
import type { TrtllmEngineConfig } from "../config.ts";
import { flagValue, hasFlag, reachableHost, type EngineCommand } from "../foreign/index.ts";

/**
 * The command line of a `trtllm-serve` that a worker starts, and the file of options that goes with it: its KV events and its
 * statistics can be switched on nowhere else. Who brings a file of their own has them in it, or goes without.
 */
export interface TrtllmArgs {
  readonly port: number | undefined;
  readonly host: string | undefined;
  /** A file of the user's. */
  readonly hasOptions: boolean;
  /** 0 = not said. */
  readonly contextLength: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
}

export interface TrtllmLaunchPlan {
  readonly command: EngineCommand;
  readonly url: string;
  /** Contents of the options file (JSON, which is YAML); undefined when the user has one. */
  readonly options: string | undefined;
}

const OPTION_FLAGS = ["--extra-llm-api-options", "--config"];
/** Events that wait to be fetched: some seconds' worth, at a thousand a second. */
const EVENT_BUFFER = 65_536;

/** Throws `invalid-config`. */
export function readTrtllmArgs(args: readonly string[]): TrtllmArgs {
  const problems: string[] = [];
  const number = (flag: string): number => {
    const text = flagValue(args, flag);
    if (text === undefined) return 0;
    if (/^[1-9]\d*$/.test(text)) return Number(text);
    problems.push(`${flag}: expected a whole number from 1 up, got ${text}`);
    return 0;
  };
  if (hasFlag(args, "--grpc")) problems.push("--grpc: the worker speaks HTTP to the server");
  const read = {
    port: number("--port") || undefined,
    host: flagValue(args, "--host"),
    hasOptions: OPTION_FLAGS.some((flag) => hasFlag(args, flag)),
    contextLength: number("--max-seq-len"),
    maxSequences: number("--max-batch-size"),
    maxBatchedTokens: number("--max-num-tokens"),
  };
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
  return read;
}

export function trtllmLaunchPlan(
  config: TrtllmEngineConfig,
  args: TrtllmArgs,
  port: number,
  optionsPath: string,
  env: NodeJS.ProcessEnv,
): TrtllmLaunchPlan {
  const launch = config.launch!;
  const [command, ...before] = launch.command;
  const sizes: readonly (readonly [string, number])[] = [
    ["--max_seq_len", config.contextLength],
    ["--max_batch_size", config.maxSequences],
    ["--max_num_tokens", config.maxBatchedTokens],
  ];
  return {
    command: {
      command: command!,
      args: [
        ...before,
        config.modelPath ?? "",
        "--host",
        "127.0.0.1",
        "--port",
        String(port),
        ...sizes.flatMap(([flag, size]) => (size === 0 ? [] : [flag, String(size)])),
        ...(args.hasOptions ? [] : ["--extra_llm_api_options", optionsPath]),
        ...launch.args,
      ],
      env: { ...env, ...launch.env },
    },
    url: `http://${reachableHost(args.host)}:${port}`,
    options: args.hasOptions ? undefined : optionsOf(config),
  };
}

function optionsOf({
  kvEvents,
  blockSizeTokens,
  role = "agg",
  kvTransferConfig = "DEFAULT",
}: TrtllmEngineConfig): string {
  const cache = {
    enable_block_reuse: true,
    // Half a block that is copied is reuse that no event tells of.
    enable_partial_reuse: false,
    ...(kvEvents ? { event_buffer_max_size: EVENT_BUFFER } : {}),
    ...(blockSizeTokens === 0 ? {} : { tokens_per_block: blockSizeTokens }),
  };
  return JSON.stringify({
    kv_cache_config: cache,
    enable_iter_perf_stats: true,
    return_perf_metrics: true,
    guided_decoding_backend: "xgrammar",
    ...(role === "agg" ? {} : { cache_transceiver_config: { backend: kvTransferConfig } }),
  });
}

const PHASES: readonly (readonly [RegExp, string])[] = [
  [/Using LLM with (\S+) backend/, "starting ($1)"],
  [/Loading weights|Loading model weights/i, "loading the weights"],
  [/(?:Allocated|Max KV cache) .*?([\d.]+ GiB)/, "memory for the KV cache: $1"],
  [/Autotun/i, "tuning kernels"],
  [/CUDA graph/i, "capturing CUDA graphs"],
  [/Application startup complete|Uvicorn running on/, "opening its port"],
];

export function trtllmPhaseOf(line: string): string | undefined {
  for (const [pattern, text] of PHASES) {
    const match = pattern.exec(line);
    if (match !== null) return text.replace("$1", match[1] ?? "");
  }
  return undefined;
}

/** Its access log of what we ask all the time. */
export function isTrtllmNoise(line: string): boolean {
  return /"(?:GET \/(?:metrics|health|prometheus\/metrics)|POST \/kv_cache_events) HTTP\/1\.1" 200/.test(line);
}
