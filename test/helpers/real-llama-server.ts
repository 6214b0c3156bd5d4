import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { DEFAULT_MODEL, ModelStore } from "../../src/model/index.ts";

/**
 * A real llama.cpp server for tests, where there is one: the program that DYN_TEST_LLAMA_SERVER names, or what
 * test/helpers/llama-server/install.sh put under ~/.cache/dynamo-ts/llama-server. The model is the one of the model store.
 */
const COMMAND =
  process.env["DYN_TEST_LLAMA_SERVER"] ?? join(homedir(), ".cache", "dynamo-ts", "llama-server", "bin", "llama-server");

export const REAL_LLAMA_SERVER = existsSync(COMMAND) ? COMMAND : undefined;

/** A GGUF file; undefined when it was not pulled. */
export const REAL_LLAMA_MODEL = new ModelStore({ env: process.env }).resolve(DEFAULT_MODEL)?.path;

/** For `skip`: why, or false. */
export function whyNoLlamaServer(): string | false {
  if (REAL_LLAMA_SERVER === undefined) {
    return `no real llama.cpp server (DYN_TEST_LLAMA_SERVER; none at ${COMMAND}; test/helpers/llama-server/install.sh makes one)`;
  }
  if (REAL_LLAMA_MODEL === undefined) return `${DEFAULT_MODEL} is not pulled (dynamo model pull ${DEFAULT_MODEL})`;
  return false;
}
