import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";

/**
 * A real vLLM for tests, where there is one: a virtual environment named by DYN_TEST_VLLM, or at
 * ~/.cache/dynamo-ts/vllm. Real weights: a folder named by DYN_TEST_VLLM_MODEL, or SmolLM2-135M-Instruct inside that
 * environment's folder.
 */
const VENV = process.env["DYN_TEST_VLLM"] ?? join(homedir(), ".cache", "dynamo-ts", "vllm");

/** The command; undefined where there is none. */
export const REAL_VLLM = existsSync(join(VENV, "bin", "vllm")) ? join(VENV, "bin", "vllm") : undefined;

const MODEL = process.env["DYN_TEST_VLLM_MODEL"] ?? join(VENV, "SmolLM2-135M-Instruct");
export const REAL_VLLM_MODEL = existsSync(join(MODEL, "tokenizer.json")) ? MODEL : undefined;

/** For `skip`: why, or false. */
export function whyNoVllm(needsModel = false): string | false {
  if (REAL_VLLM === undefined) return `no real vLLM (DYN_TEST_VLLM; none in ${VENV})`;
  if (needsModel && REAL_VLLM_MODEL === undefined)
    return `no model folder for it (DYN_TEST_VLLM_MODEL; none at ${MODEL})`;
  return false;
}

/** Small, quick to start, one thread, and nothing asked of the net. Others that run beside it get their turn. */
export const REAL_VLLM_ENV: Readonly<Record<string, string>> = {
  VLLM_SERVER_DEV_MODE: "1",
  VLLM_NO_USAGE_STATS: "1",
  DO_NOT_TRACK: "1",
  HF_HUB_OFFLINE: "1",
  TRANSFORMERS_OFFLINE: "1",
  VLLM_CPU_OMP_THREADS_BIND: "nobind",
  OMP_NUM_THREADS: "1",
  // Without it the first requests compile their kernels, for seconds.
  TORCHDYNAMO_DISABLE: "1",
};

export const REAL_VLLM_ARGS: readonly string[] = ["--enforce-eager", "--max-num-seqs", "8"];
