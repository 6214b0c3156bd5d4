import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";
import { startInProcessCluster } from "../helpers/in-process-cluster.ts";
import { pythonWithOpenai } from "../helpers/python-openai.ts";

const run = promisify(execFile);

test(
  "the official Python openai client: models, chat, streams, completions, logprobs, errors, abort",
  { timeout: 170_000 },
  async (t) => {
    const python = await pythonWithOpenai();
    if (python.interpreter === undefined) {
      t.skip(python.reason);
      return;
    }
    const cluster = await startInProcessCluster();
    try {
      const script = join(import.meta.dirname, "../fixtures/python_openai_client.py");
      const { stdout } = await run(python.interpreter, [script, `${cluster.baseUrl}/v1`, "echo"], { timeout: 60_000 });
      const result = JSON.parse(stdout) as Record<string, unknown>;
      t.diagnostic(stdout.slice(0, 2_000));
      assert.equal(result["ok"], true, stdout);
    } finally {
      await cluster.stop();
    }
  },
);
