import { spawn } from "node:child_process";
import { globSync } from "node:fs";
import { resolve } from "node:path";
import { pullModel } from "../src/model/index.ts";

/**
 * `npm test [-- pattern...]`: gets the test model once (so that no test file downloads by itself), then runs node's test
 * runner over the unit tests beside the code and the whole-system tests in test/. Without a model the tests that need it
 * say so and count as skipped.
 */
const ROOT = resolve(import.meta.dirname, "..");
const PATTERNS = ["src/**/*.test.ts", "test/**/*.test.ts", "benchmarks/**/*.test.ts"];

async function testModel(): Promise<string | undefined> {
  if (process.env["DYN_TEST_MODEL"] !== undefined) return process.env["DYN_TEST_MODEL"];
  try {
    return (await pullModel("SmolLM2-135M-Instruct", {})).path;
  } catch (error) {
    process.stderr.write(`no test model, tests with the real model will be skipped: ${String(error)}\n`);
    return undefined;
  }
}

/** Settings of the person who runs the tests must not change what is tested. */
function cleanEnvironment(): NodeJS.ProcessEnv {
  const kept = Object.entries(process.env).filter(
    ([name]) => !name.startsWith("DYN_") || name.startsWith("DYN_TEST_") || name === "DYN_MODEL_DIR",
  );
  return Object.fromEntries(kept);
}

const patterns = process.argv.slice(2).filter((argument) => !argument.startsWith("--"));
const flags = process.argv.slice(2).filter((argument) => argument.startsWith("--"));
const files = globSync(patterns.length > 0 ? patterns : PATTERNS, { cwd: ROOT }).toSorted();
if (files.length === 0) {
  process.stderr.write(`no test file matches ${patterns.join(" ")}\n`);
  process.exit(2);
}
const model = await testModel();
const child = spawn(
  process.execPath,
  ["--test", "--test-concurrency=2", "--test-timeout=180000", "--test-reporter=spec", ...flags, ...files],
  {
    cwd: ROOT,
    stdio: "inherit",
    env: { ...cleanEnvironment(), ...(model === undefined ? {} : { DYN_TEST_MODEL: model }) },
  },
);
child.on("exit", (code, signal) => process.exit(code ?? (signal === null ? 1 : 130)));
