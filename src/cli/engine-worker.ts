import type { CommandContext, CommandRun } from "./commands.ts";
import type { EngineCommandName } from "./options.ts";
import { isKnownFlag } from "./resolve-options.ts";
import { run as runWorker } from "./worker.ts";

/**
 * `dynamo vllm`, `dynamo sglang`, `dynamo trtllm`: `python -m dynamo.vllm` and its like in our place. Options of ours are ours;
 * every other flag is the engine's, with the word behind it if that is none, as it stands on command lines that people have:
 * `--tensor-parallel-size 2 --enforce-eager`. What stands behind `--` is the engine's in any case.
 */
export function engineWorker(engine: EngineCommandName): CommandRun {
  return ({ argv, ...context }: CommandContext) => {
    const { ours, theirs } = splitEngineArgs(engine, argv);
    const behind = theirs.length === 0 ? [] : ["--", ...theirs];
    return runWorker({ ...context, argv: [`--engine=${engine}`, ...ours, ...behind] });
  };
}

/** What an engine calls things that we have too. */
const THEIR_NAMES: Readonly<Record<EngineCommandName, Readonly<Record<string, string>>>> = {
  vllm: {},
  sglang: {
    "model-path": "model",
    "page-size": "kv-cache-block-size",
    "max-running-requests": "max-num-seqs",
    "max-prefill-tokens": "max-num-batched-tokens",
  },
  trtllm: {
    "model-path": "model",
    "max-seq-len": "context-length",
    "max-batch-size": "max-num-seqs",
    "max-num-tokens": "max-num-batched-tokens",
  },
};

export function splitEngineArgs(
  engine: EngineCommandName,
  argv: readonly string[],
): { readonly ours: string[]; readonly theirs: string[] } {
  const ours: string[] = [];
  const theirs: string[] = [];
  const end = argv.indexOf("--");
  const words = end === -1 ? argv : argv.slice(0, end);
  for (let i = 0; i < words.length; i++) {
    const word = words[i]!;
    const isFlag = /^--?[a-zA-Z]/.test(word);
    const written = word.replace(/^--/, "").split("=", 1)[0]!;
    const name = THEIR_NAMES[engine][written.replaceAll("_", "-")] ?? written;
    const value = word.includes("=") ? word.slice(word.indexOf("=") + 1) : (words[i + 1] ?? "");
    // Sizes as engines write them, 4k, are for engines to read.
    const isOurs = word.startsWith("--") && isKnownFlag(name, "worker") && !/^\d+[kKmMgG]$/.test(value);
    const target = isFlag && !isOurs ? theirs : ours;
    target.push(isOurs ? `--${name}${word.slice(2 + written.length)}` : word);
    if (isFlag && !word.includes("=")) while (i + 1 < words.length && !/^--?[a-zA-Z]/.test(words[i + 1]!)) target.push(words[++i]!);
  }
  if (end !== -1) theirs.push(...argv.slice(end + 1));
  return { ours, theirs };
} // prettier-ignore
