import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { run } from "./mocker.ts";

test("dynamo mocker: several workers in one process, each with an id of its own, and all leave on SIGTERM", async () => {
  const folder = await mkdtemp(join(tmpdir(), "mocker-command-"));
  const command = join(import.meta.dirname, "..", "..", "bin", "dynamo.mjs");
  const child = spawn(
    process.execPath,
    [command, "mocker", "--num-workers=3", "--speedup-ratio=0", `--file-kv=${folder}`],
    { stdio: ["ignore", "ignore", "inherit", "ipc"], env: { ...process.env, DYN_LOG: "error" } },
  );
  try {
    const signal = AbortSignal.timeout(30_000);
    const exit = once(child, "exit", { signal }) as Promise<[number | null]>;
    const [ready] = (await Promise.race([
      once(child, "message", { signal }),
      exit.then(([code]) => assert.fail(`it ended with ${code} before it was ready`)),
    ])) as [{ type: string; facts: Record<string, unknown> }];
    assert.equal(ready.type, "ready");
    assert.deepEqual([ready.facts.workers, ready.facts.model], [3, "mocker"]);
    assert.equal(new Set(String(ready.facts.instances).split(" ")).size, 3);
    child.kill("SIGTERM");
    const [code] = await exit;
    assert.equal(code, 0);
  } finally {
    child.kill("SIGKILL");
    await rm(folder, { recursive: true });
  }
});

test("dynamo mocker: what several workers cannot share is refused before anything starts", async () => {
  const context = { env: {}, out: () => undefined, err: () => undefined };
  const argv = ["--num-workers=2", "--request-plane=memory", "--tcp-rpc-port=9000"];
  await assert.rejects(run({ argv, ...context }), { reason: "invalid-config", message: /request-plane: memory.*\n--tcp-rpc-port: expected 0/ }); // prettier-ignore
  await assert.rejects(run({ argv: ["--reasoning=1"], ...context }), { reason: "invalid-config" });
});
