import { DynamoError } from "../../errors/index.ts";
import type { LlamaServerEngineConfig } from "../config.ts";
import { flagValue, hasFlag, type EngineCommand } from "../foreign/index.ts";

/** The command line of a `llama-server` that a worker starts: ours in front, what the user wrote behind `--` after it. */
export interface LlamaServerArgs {
  readonly port: number | undefined;
  readonly apiKey: string | undefined;
}

/** Throws `invalid-config` for arguments with which the worker could not work. */
export function readLlamaServerArgs(args: readonly string[]): LlamaServerArgs {
  const problems: string[] = [];
  for (const [flag, why] of [
    ["--api-prefix", "the worker asks at the root"],
    ["--ssl-key-file", "the worker speaks plain HTTP to a server of its own, on loopback"],
    ["--embedding", "the worker wants answers"],
    ["--embeddings", "the worker wants answers"],
    ["--reranking", "the worker wants answers"],
  ] as const) {
    if (hasFlag(args, flag)) problems.push(`${flag}: ${why}`);
  }
  const text = flagValue(args, "--port");
  const port = text === undefined ? undefined : Number(text);
  if (port !== undefined && (!Number.isInteger(port) || port < 1 || port > 65_535)) {
    problems.push(`--port: expected 1 to 65535, got ${text}`);
  }
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
  return { port, apiKey: flagValue(args, "--api-key") };
}

export function llamaServerCommand(
  config: LlamaServerEngineConfig,
  port: number,
  env: NodeJS.ProcessEnv,
): EngineCommand {
  const { launch, modelPath = "", contextLength, maxSequences, maxBatchedTokens, engineModel, apiKey } = config;
  const [command, ...before] = launch!.command;
  const sizes: readonly (readonly [string, number])[] = [
    // Its context is that of all slots together.
    ["--ctx-size", contextLength * Math.max(1, maxSequences)],
    ["--parallel", contextLength > 0 ? Math.max(1, maxSequences) : maxSequences],
    ["--batch-size", maxBatchedTokens],
  ];
  return {
    command: command!,
    args: [
      ...before,
      "--model",
      modelPath,
      "--host",
      "127.0.0.1",
      "--port",
      String(port),
      "--metrics",
      ...(engineModel === undefined ? [] : ["--alias", engineModel]),
      ...sizes.flatMap(([flag, size]) => (size === 0 ? [] : [flag, String(size)])),
      ...launch!.args,
    ],
    // A key on a command line is everybody's.
    env: { ...env, ...(apiKey === undefined ? {} : { LLAMA_API_KEY: apiKey }), ...launch!.env },
  };
}

/** What its lines say about its start. */
const PHASES: readonly (readonly [RegExp, string])[] = [
  [/loading model/i, "loading the model"],
  [/load_tensors:\s+(.*buffer size.*)/, "weights in memory ($1)"],
  [/n_slots = (\d+), n_ctx_slot = (\d+)/, "making $1 slots of $2 tokens"],
  [/warming up the model/, "warming up"],
  [/server is listening|listening on/, "opening its port"],
];

export function llamaServerPhaseOf(line: string): string | undefined {
  for (const [pattern, text] of PHASES) {
    const match = pattern.exec(line);
    if (match !== null) return text.replace("$1", match[1] ?? "").replace("$2", match[2] ?? "");
  }
  return undefined;
}

/** Its log of what we ask every second. */
export function isLlamaServerNoise(line: string): boolean {
  return /(?:GET|request:)\s+(?:GET )?\/(?:metrics|health|slots|props)\b/.test(line);
}
