/**
 * What the file store costs, for docs/design/discovery-file.md: `node src/runtime/discovery/file.bench.ts [leases] [seconds]`.
 * One process holds the leases (three keys each, 1 kB), this one watches them and is measured by the kernel's accounting.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { FileDiscovery } from "./file.ts";

const HOLD = "--hold";

/** Part of one core that this process used while `run` took place, in percent. */
async function cpuPercent(run: () => Promise<unknown>): Promise<number> {
  const cpu = process.cpuUsage();
  const startMs = performance.now();
  await run();
  const { user, system } = process.cpuUsage(cpu);
  return (user + system) / 10 / (performance.now() - startMs);
}

const wait = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

async function hold(root: string, leaseCount: number): Promise<void> {
  const discovery = new FileDiscovery({ root });
  const value = { text: "x".repeat(1_000) };
  for (let i = 0; i < leaseCount; i++) {
    const lease = await discovery.openLease();
    for (const kind of ["instances", "mdc", "events"]) await lease.put(`v1/${kind}/${i}`, value);
  }
  process.stdout.write("ready\n");
  const seconds = 10;
  process.stdout.write(
    `holder: ${(await cpuPercent(() => wait(seconds * 1_000))).toFixed(2)} % of a core to renew all leases\n`,
  );
  process.stdin.resume();
}

async function measure(leaseCount: number, seconds: number): Promise<void> {
  const root = await mkdtemp(join(tmpdir(), "discovery-bench-"));
  const child = spawn(process.execPath, [import.meta.filename, HOLD, root, String(leaseCount)], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  try {
    await once(child.stdout, "data");
    console.log(`node ${process.version}, ${cpus()[0]?.model}, ${cpus().length} cores, ${leaseCount} leases of 3 keys`);
    const watcher = new FileDiscovery({ root });
    let puts = 0;
    let onPut: () => void = () => undefined;
    const startMs = performance.now();
    await watcher.watch("", () => {
      puts++;
      onPut();
    });
    console.log(`first set: ${puts} entries in ${(performance.now() - startMs).toFixed(0)} ms`);
    child.stdout.pipe(process.stdout);
    const idle = await cpuPercent(() => wait(seconds * 1_000));
    console.log(`idle watcher: ${idle.toFixed(2)} % of a core over ${seconds} s`);

    const writer = new FileDiscovery({ root });
    const lease = await writer.openLease();
    const [writeMs, seenMs]: [number[], number[]] = [[], []];
    for (let i = 0; i < 50; i++) {
      await wait(37);
      const seen = Promise.withResolvers<void>();
      onPut = seen.resolve;
      const beforeMs = performance.now();
      await lease.put("v1/changing", i);
      const putMs = performance.now();
      await seen.promise;
      writeMs.push(putMs - beforeMs);
      seenMs.push(performance.now() - putMs);
    }
    for (const [what, times] of [
      ["put", writeMs],
      ["put to seen", seenMs],
    ] as const) {
      times.sort((a, b) => a - b);
      console.log(`${what}: median ${times[25]!.toFixed(1)} ms, worst ${times[49]!.toFixed(1)} ms`);
    }
    await writer.close();
    await watcher.close();
  } finally {
    child.kill("SIGKILL");
    await rm(root, { recursive: true });
  }
}

const [first, ...rest] = process.argv.slice(2);
if (first === HOLD) await hold(rest[0]!, Number(rest[1]));
else await measure(Number(first ?? 100), Number(rest[0] ?? 20));
