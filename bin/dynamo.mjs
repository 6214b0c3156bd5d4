#!/usr/bin/env node
/*
 * The command `dynamo`. Plain JavaScript that any Node from 18 on can read: the sources are TypeScript, which only newer
 * ones run, so an older Node hands over to the one that npm installed with this package and acts as if it were it
 * (signals go through, the exit code comes back).
 */
import { existsSync } from "node:fs";
import { spawn } from "node:child_process";
import * as module from "node:module";
import { dirname, join } from "node:path";
import { constants } from "node:os";
import { fileURLToPath } from "node:url";

const MIN_MAJOR = 24;
const packageFolder = dirname(dirname(fileURLToPath(import.meta.url)));

if (Number(process.versions.node.split(".")[0]) >= MIN_MAJOR) await runHere();
else handOver();

async function runHere() {
  module.enableCompileCache?.();
  // The sources run as they are in a checkout; Node does not run TypeScript inside node_modules, and dist is there then.
  const source = join(packageFolder, "src", "cli", "main.ts");
  const { main } = await import(existsSync(source) ? "../src/cli/main.ts" : "../dist/cli/main.js");
  process.exit(await main(process.argv.slice(2)));
}

function handOver() {
  const node = findPinnedNode();
  if (node === undefined) {
    console.error(
      `dynamo: needs Node ${MIN_MAJOR} or later, this is ${process.version}. Run "npm ci" in ${packageFolder} to install one beside it, or update Node.`,
    );
    process.exit(1);
  }
  const child = spawn(node, [fileURLToPath(import.meta.url), ...process.argv.slice(2)], {
    // The channel carries nothing: when it closes, the child knows that this process is gone, even if it was killed.
    stdio: ["inherit", "inherit", "inherit", "ipc"],
  });
  // Ctrl-C in a terminal reaches the child by itself, because it is in the same process group: passing it on would make
  // one key press two. Only somebody who signals this process alone, with SIGTERM or SIGHUP, needs us as a messenger.
  const terminal = process.stdin.isTTY || process.stdout.isTTY || process.stderr.isTTY;
  process.on("SIGINT", () => {
    if (!terminal) child.kill("SIGINT");
  });
  process.on("SIGTERM", () => child.kill("SIGTERM"));
  process.on("SIGHUP", () => child.kill("SIGHUP"));
  child.once("error", (error) => {
    console.error(`dynamo: ${node} could not be started: ${error.message}`);
    process.exit(1);
  });
  child.once("exit", (code, signal) => process.exit(code ?? 128 + (constants.signals[signal] ?? 0)));
}

/** npm puts it beside the package, or further up where several packages share one node_modules. */
function findPinnedNode() {
  const name = process.platform === "win32" ? "node.cmd" : "node";
  for (let folder = packageFolder; ; folder = dirname(folder)) {
    const candidate = join(folder, "node_modules", ".bin", name);
    if (existsSync(candidate)) return candidate;
    if (folder === dirname(folder)) return undefined;
  }
}
