import { Worker } from "node:worker_threads";

/**
 * Ends the process when one fuzz case hangs it: code that never returns cannot be interrupted from its own thread, but
 * another thread sees that the count of cases stands still, says which case it was, and kills. Code that loops uses up CPU
 * time, of which a busy machine gives little per second; code that waits for what never comes uses none.
 */
const CPU_LIMIT_MS = 20_000;
const WALL_LIMIT_MS = 120_000;

const THREAD = `
const { workerData } = require("node:worker_threads");
const { shared, cpuLimitMs, wallLimitMs, name, seed } = workerData;
const cases = new Int32Array(shared);
let last = -1;
let since = process.cpuUsage();
let sinceMs = performance.now();
setInterval(() => {
  const now = Atomics.load(cases, 0);
  if (now !== last) { last = now; since = process.cpuUsage(); sinceMs = performance.now(); return; }
  const { user, system } = process.cpuUsage(since);
  if (now < 0 || ((user + system) / 1000 < cpuLimitMs && performance.now() - sinceMs < wallLimitMs)) return;
  require("node:fs").writeSync(2, "fuzz: " + name + " hangs; again: npm run fuzz -- --target=" + name + " --seed=" + seed + " --case=" + now + "\\n");
  process.kill(process.pid, "SIGKILL");
}, 250);
`;

export class Watchdog {
  readonly #cases = new Int32Array(new SharedArrayBuffer(4)).fill(-1);
  readonly #thread: Worker;

  constructor(name: string, seed: number) {
    const workerData = { shared: this.#cases.buffer, cpuLimitMs: CPU_LIMIT_MS, wallLimitMs: WALL_LIMIT_MS, name, seed };
    this.#thread = new Worker(THREAD, { eval: true, workerData });
    this.#thread.unref();
  }

  /** The case that begins. */
  at(index: number): void {
    Atomics.store(this.#cases, 0, index);
  }

  async close(): Promise<void> {
    await this.#thread.terminate();
  }
}
