import assert from "node:assert/strict";
import { execFile, execFileSync } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { promisify } from "node:util";
import type { DiskReport } from "./fixtures/failing-disk.ts";

/**
 * A disk that is really full and really read-only, under the engine: a file system of half a MB in a mount namespace of
 * the test's own, and, where that is not allowed, at least a file that may not grow (the kernel's limit on file sizes).
 */
const PROGRAM = join(import.meta.dirname, "fixtures/failing-disk.ts");
const IN_NAMESPACE = ["--user", "--map-root-user", "--mount"];
const MOUNT = 'mount -t tmpfs -o size=512k none "$1"';

async function aFolder(t: TestContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-failing-disk-"));
  t.after(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

async function said(command: string, args: readonly string[]): Promise<Record<string, DiskReport & number>> {
  const { stdout } = await promisify(execFile)(command, args, { timeout: 100_000 });
  return JSON.parse(stdout) as Record<string, DiskReport & number>;
}

function whyNoMounts(folder: string): string | false {
  try {
    execFileSync("unshare", [...IN_NAMESPACE, "sh", "-c", MOUNT, "sh", folder], { stdio: "ignore" });
    return false;
  } catch {
    return "this system does not let us mount a file system of our own (unshare --user --mount)";
  }
}

test("failing disk: full and read-only cost nothing but the tier, which comes back by itself", async (t) => {
  const folder = await aFolder(t);
  const why = whyNoMounts(folder);
  if (why !== false) {
    t.skip(why);
    return;
  }
  const script = `${MOUNT} && exec "$2" "$3" small-disk "$1"`;
  const report = await said("unshare", [...IN_NAMESPACE, "sh", "-c", script, "sh", folder, process.execPath, PROGRAM]);
  assert(report["full"]!.writeFailures > 0 && report["full"]!.usedBytes > 0);
  assert.equal(report["restoredWhileFull"], 32, "what is on a full disk is still read");
  assert(report["roomAgain"]!.usedBytes > report["full"]!.usedBytes);
  assert.deepEqual([report["readOnly"]!.degraded, report["readOnly"]!.onboardedBlocks], [1, 0]);
  assert.equal(report["restoredAfterwards"], 32, "what an earlier life wrote is found once the disk can be used");
});

test("failing disk: a file that may not grow degrades the tier and is read on", async (t) => {
  const folder = await aFolder(t);
  // In KiB with bash: room for some 30 blocks of a page each.
  const script = 'ulimit -f 128 && exec "$1" "$2" file-limit "$3"';
  const report = await said("bash", ["-c", script, "bash", process.execPath, PROGRAM, folder]);
  assert(report["full"]!.writeFailures > 0 && report["full"]!.usedBytes > 0);
  assert.equal(report["restoredWhileFull"], 32);
});
