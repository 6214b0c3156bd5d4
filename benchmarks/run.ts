import { spawn } from "node:child_process";
import { once } from "node:events";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { machineLine } from "./harness.ts";

/**
 * `npm run bench [-- name...]`: runs the named benchmarks, or all but the soak. Each is `benchmarks/<name>.ts`, which exports `run`
 * and calls it when it is the main module; it runs in a process of its own, so that one's heap and compiled code do not
 * colour the next one's figures.
 */
/** Takes many minutes. */
const ONLY_BY_NAME = new Set(["soak"]);
const NOT_BENCHMARKS = new Set(["run.ts", "harness.ts", "vllm-frames.ts"]);

function findNames(): string[] {
  return readdirSync(import.meta.dirname)
    .filter((file) => file.endsWith(".ts") && !file.endsWith(".test.ts") && !NOT_BENCHMARKS.has(file))
    .map((file) => file.slice(0, -".ts".length))
    .sort();
}

async function runInProcess(name: string): Promise<number> {
  const child = spawn(process.execPath, [join(import.meta.dirname, `${name}.ts`)], { stdio: "inherit" });
  // Ctrl-C reaches the child by itself; wait for it to clean up.
  const ignore = () => undefined;
  process.on("SIGINT", ignore);
  const [code] = (await once(child, "exit")) as [number | null];
  process.off("SIGINT", ignore);
  return code ?? 1;
}

async function main(args: readonly string[]): Promise<number> {
  const known = findNames();
  const unknown = args.filter((name) => !known.includes(name));
  if (unknown.length > 0) {
    console.error(`unknown benchmark: ${unknown.join(", ")}; there are: ${known.join(", ")}`);
    return 2;
  }
  const failed: string[] = [];
  console.log(machineLine());
  for (const name of args.length > 0 ? args : known.filter((one) => !ONLY_BY_NAME.has(one))) {
    console.log(`\n${join("benchmarks", `${name}.ts`)}   npm run bench -- ${name}\n`);
    const code = await runInProcess(name);
    if (code === 130) return code;
    if (code !== 0) failed.push(name);
  }
  if (failed.length > 0) console.error(`\nfailed: ${failed.join(", ")}`);
  return failed.length > 0 ? 1 : 0;
}

process.exitCode = await main(process.argv.slice(2));
