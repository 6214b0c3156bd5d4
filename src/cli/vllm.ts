import type { CommandContext } from "./commands.ts";
import { isKnownFlag } from "./resolve-options.ts";
import { run as runWorker } from "./worker.ts";

/**
 * `dynamo vllm`: `python -m dynamo.vllm` in our place. Options of ours are ours; every other flag is the engine's, with the
 * word behind it if that is none, as it stands on command lines that people have: `--tensor-parallel-size 2
 * --enforce-eager`. What stands behind `--` is the engine's in any case.
 */
export function run(context: CommandContext): Promise<number> {
  const { ours, theirs } = splitVllmArgs(context.argv);
  return runWorker({ ...context, argv: ["--engine=vllm", ...ours, ...(theirs.length === 0 ? [] : ["--", ...theirs])] });
}

export function splitVllmArgs(argv: readonly string[]): { readonly ours: string[]; readonly theirs: string[] } {
  const ours: string[] = [];
  const theirs: string[] = [];
  const end = argv.indexOf("--");
  const words = end === -1 ? argv : argv.slice(0, end);
  for (let i = 0; i < words.length; i++) {
    const word = words[i]!;
    const isFlag = /^--?[a-zA-Z]/.test(word);
    const name = word.replace(/^--/, "").split("=", 1)[0]!;
    const value = word.includes("=") ? word.slice(word.indexOf("=") + 1) : (words[i + 1] ?? "");
    // Sizes as vLLM writes them, 4k, are for vLLM to read.
    const isOurs = word.startsWith("--") && isKnownFlag(name, "worker") && !/^\d+[kKmMgG]$/.test(value);
    const target = isFlag && !isOurs ? theirs : ours;
    target.push(word);
    if (isFlag && !word.includes("=")) while (i + 1 < words.length && !/^--?[a-zA-Z]/.test(words[i + 1]!)) target.push(words[++i]!);
  }
  if (end !== -1) theirs.push(...argv.slice(end + 1));
  return { ours, theirs };
} // prettier-ignore
