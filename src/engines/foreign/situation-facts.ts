import { execFile } from "node:child_process";
import { readFileSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import type { GpuFacts, MachineFacts, ModelFacts } from "./known-bad.ts";

/** What a model's folder and this machine say of themselves, for `known-bad.ts`. Nothing is loaded or started for it. */
export function modelFacts(folder: string): ModelFacts | undefined {
  try {
    const whole = JSON.parse(readFileSync(join(folder, "config.json"), "utf8")) as Record<string, unknown>;
    const text = whole["text_config"];
    const config = typeof text === "object" && text !== null ? { ...whole, ...text } : whole;
    return { config, weightBytes: weightBytesOf(folder) };
  } catch {
    // No folder here, or another kind of model: then nothing of it is known.
    return undefined;
  }
}

/** Links count as what they lead to: the hub's cache consists of them. */
function weightBytesOf(folder: string): number {
  let bytes = 0;
  for (const name of readdirSync(folder)) if (name.endsWith(".safetensors")) bytes += statSync(join(folder, name)).size;
  return bytes;
}

const GPU_TIMEOUT_MS = 5_000;

/** `env` tells which GPUs count (CUDA_VISIBLE_DEVICES). */
export async function machineFacts(env: NodeJS.ProcessEnv): Promise<MachineFacts> {
  return { gpus: visible(await gpus(env), env["CUDA_VISIBLE_DEVICES"]), freeMemoryBytes: process.availableMemory() };
}

/** None where the driver's tool is not there or does not answer. */
async function gpus(env: NodeJS.ProcessEnv): Promise<GpuFacts[]> {
  try {
    const query = ["--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits"];
    const { stdout } = await promisify(execFile)("nvidia-smi", query, { timeout: GPU_TIMEOUT_MS, env });
    return parseGpus(stdout);
  } catch {
    return [];
  }
}

/** Rows of `name, capability, MiB in all, MiB free`. */
export function parseGpus(csv: string): GpuFacts[] {
  return csv.split("\n").flatMap((row) => {
    const [name, capability, total, free] = row.split(",").map((cell) => cell.trim());
    const [major, minor] = (capability ?? "").split(".").map(Number);
    const [totalBytes, freeBytes] = [Number(total) * 2 ** 20, Number(free) * 2 ** 20];
    if (name === undefined || major === undefined || minor === undefined || !Number.isFinite(totalBytes + freeBytes)) return [];
    return [{ name, computeCapability: [major, minor] as const, totalBytes, freeBytes }];
  });
} // prettier-ignore

/** Names by UUID are not looked up: then all count. */
function visible(all: readonly GpuFacts[], list: string | undefined): readonly GpuFacts[] {
  if (list === undefined) return all;
  const indexes = list.split(",").map((word) => word.trim());
  if (indexes.some((word) => !/^\d+$/.test(word))) return list.trim() === "" ? [] : all;
  return indexes.flatMap((index) => all[Number(index)] ?? []);
}
