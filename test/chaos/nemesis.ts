import type { Random } from "../../src/std/index.ts";
import { until } from "../helpers/in-process-cluster.ts";
import type { ChaosCluster, ChaosWorker } from "./chaos-cluster.ts";

/**
 * Breaks things, one after another and some at once, by a seeded plan: the same seed draws the same faults at the same
 * times (what the processes make of them is theirs). Of the workers at least one is left alone at any time, and of the
 * frontends at least one.
 */
export const FAULTS = {
  "worker-kill": "SIGKILL of a worker; it is started again",
  "worker-freeze": "SIGSTOP of a worker, later SIGCONT",
  "worker-drain": "SIGTERM of a worker; it is started again",
  "frontend-kill": "SIGKILL of a frontend; it is started again",
  "frontend-freeze": "SIGSTOP of a frontend, later SIGCONT",
  "frontend-drain": "SIGTERM of a frontend; it is started again",
  "connection-reset": "RST on every connection between the frontends and a worker",
  "network-hold": "every byte between the frontends and a worker held for a while",
  "discovery-removed": "the discovery folder deleted",
  "discovery-hidden": "the discovery folder unreadable for a while",
  "disk-full": "no room where the discovery folder is, for a while",
} as const;

export type Fault = keyof typeof FAULTS;
export const FAULT_NAMES = Object.keys(FAULTS) as Fault[];

export interface NemesisOptions {
  readonly cluster: ChaosCluster;
  readonly random: Random;
  /** Mean time between two faults. */
  readonly meanGapMs: number;
  /** The longest a freeze, a hold or an outage lasts. */
  readonly maxOutageMs: number;
  readonly onFault: (text: string) => void;
}

/** A span of time in which something was broken. */
export interface Disturbance {
  readonly fault: Fault;
  readonly target: string;
  readonly fromMs: number;
  toMs: number;
}

export class Nemesis {
  readonly counts = Object.fromEntries(FAULT_NAMES.map((name) => [name, 0])) as Record<Fault, number>;
  readonly skipped = new Map<Fault, string>();
  readonly disturbances: Disturbance[] = [];
  readonly problems: string[] = [];
  readonly #options: NemesisOptions;
  readonly #running = new Set<Promise<void>>();
  readonly #busyWorkers = new Set<number>();
  readonly #busyFrontends = new Set<number>();
  #isDiscoveryBusy = false;
  #isDiscoveryEmptied = false;
  /** Each fault once, in random order, before any comes again. */
  #deck: Fault[] = [];

  constructor(options: NemesisOptions) {
    this.#options = options;
    const { noDiskReason } = options.cluster;
    if (noDiskReason !== undefined) this.skipped.set("disk-full", noDiskReason);
  }

  /** Injects faults until `durationMs` is over, then heals what is still broken. */
  async run(durationMs: number): Promise<void> {
    const endMs = performance.now() + durationMs;
    for (;;) {
      const { random, meanGapMs } = this.#options;
      const gapMs = meanGapMs * (0.5 + random.nextFloat());
      if (performance.now() + gapMs >= endMs) break;
      await sleep(gapMs);
      const fault = this.#draw();
      // Its target is broken already: its turn comes again.
      if (!this.#inject(fault, endMs)) this.#deck.unshift(fault);
    }
    await Promise.all(this.#running);
  }

  #draw(): Fault {
    const { random } = this.#options;
    if (this.#deck.length === 0) {
      this.#deck = FAULT_NAMES.filter((name) => !this.skipped.has(name));
      for (let i = this.#deck.length - 1; i > 0; i--) {
        const j = Math.floor(random.nextFloat() * (i + 1));
        [this.#deck[i], this.#deck[j]] = [this.#deck[j]!, this.#deck[i]!];
      }
    }
    return this.#deck.pop()!;
  }

  /** False when there is nothing left to break in that way. */
  #inject(fault: Fault, endMs: number): boolean {
    const { cluster, random } = this.#options;
    const outageMs = Math.min(
      200 + random.nextFloat() * this.#options.maxOutageMs,
      Math.max(200, endMs - performance.now()),
    );
    const pick = random.nextFloat();
    if (fault.startsWith("discovery") || fault === "disk-full") {
      // A frontend that starts on an emptied store cannot know of any worker.
      if (this.#isDiscoveryBusy || (fault === "discovery-removed" && this.#busyFrontends.size > 0)) return false;
      this.#begin(fault, "discovery", () => this.#breakDiscovery(fault, outageMs));
      return true;
    }
    if (this.#isDiscoveryEmptied && (fault === "frontend-kill" || fault === "frontend-drain")) return false;
    const isWorker = !fault.startsWith("frontend");
    const busy = isWorker ? this.#busyWorkers : this.#busyFrontends;
    const all = isWorker ? cluster.workers : cluster.frontends;
    // One is always left alone.
    if (busy.size >= all.length - 1) return false;
    const free = all.map((_, index) => index).filter((index) => !busy.has(index));
    const index = free[Math.floor(pick * free.length)]!;
    busy.add(index);
    this.#begin(fault, all[index]!.process.name, async () => {
      try {
        await (isWorker ? this.#breakWorker(fault, index, outageMs) : this.#breakProcess(fault, index, outageMs));
      } finally {
        busy.delete(index);
      }
    });
    return true;
  }

  #begin(fault: Fault, target: string, run: () => Promise<void>): void {
    this.counts[fault]++;
    const disturbance: Disturbance = { fault, target, fromMs: performance.now(), toMs: Infinity };
    this.disturbances.push(disturbance);
    this.#options.onFault(`${fault} ${target}`);
    const running = run()
      .catch((thrown: unknown) => void this.problems.push(`${fault} ${target}: ${String(thrown)}`))
      .finally(() => {
        disturbance.toMs = performance.now();
        this.#options.onFault(`${fault} ${target} over after ${Math.round(disturbance.toMs - disturbance.fromMs)} ms`);
        this.#running.delete(running);
      });
    this.#running.add(running);
  }

  async #breakWorker(fault: Fault, index: number, outageMs: number): Promise<void> {
    const { cluster } = this.#options;
    const worker = cluster.workers[index]!;
    if (fault === "connection-reset") {
      // Well again at once: it may be the one that is left alone from here on.
      worker.proxy.reset();
      return;
    }
    if (fault === "network-hold") {
      worker.proxy.hold();
      await sleep(outageMs);
      worker.proxy.release();
      return;
    }
    await this.#signal(worker.process, fault, outageMs);
    await this.#isRouted(worker);
  }

  async #breakProcess(fault: Fault, index: number, outageMs: number): Promise<void> {
    const frontend = this.#options.cluster.frontends[index]!;
    await this.#signal(frontend.process, fault, Math.min(outageMs, 3_000));
  }

  async #signal(target: ChaosCluster["processes"][number], fault: Fault, outageMs: number): Promise<void> {
    if (fault.endsWith("-kill")) {
      target.kill("SIGKILL");
      await until(() => !target.isReady, `${target.name} to die`);
      await ready(target);
    } else if (fault.endsWith("-drain")) {
      const code = await Promise.race([target.restart(), sleep(30_000)]);
      if (code !== 0) this.problems.push(`${target.name} left with ${String(code)} after SIGTERM`);
      await ready(target);
    } else {
      target.kill("SIGSTOP");
      await sleep(outageMs);
      target.kill("SIGCONT");
    }
  }

  /** A worker counts as undisturbed once every frontend that is well routes to it, not when it says it serves. */
  async #isRouted(worker: ChaosWorker): Promise<void> {
    const { cluster } = this.#options;
    const isKnown = async (): Promise<boolean> => {
      const { instanceId } = worker.process;
      const asked = cluster.frontends.filter((_, index) => !this.#busyFrontends.has(index));
      const known = await Promise.all(asked.map(({ port }) => cluster.servingInstances(port)));
      return known.every((ids) => ids.includes(instanceId));
    };
    await until(isKnown, `the frontends to route to ${worker.process.name}`, 120_000);
  }

  async #breakDiscovery(fault: Fault, outageMs: number): Promise<void> {
    const { cluster } = this.#options;
    this.#isDiscoveryBusy = true;
    try {
      if (fault === "discovery-removed") {
        this.#isDiscoveryEmptied = true;
        cluster.removeDiscovery();
        // The holders write it again at their next renewal.
        await sleep(4_000);
        this.#isDiscoveryEmptied = false;
      } else if (fault === "discovery-hidden") {
        cluster.hideDiscovery();
        await sleep(outageMs);
        cluster.showDiscovery();
      } else {
        cluster.fillDisk();
        await sleep(outageMs);
        cluster.emptyDisk();
      }
    } finally {
      this.#isDiscoveryBusy = false;
    }
  }
}

async function ready(target: { readonly name: string; readonly isReady: boolean }): Promise<void> {
  await until(() => target.isReady, `${target.name} to serve again`, 120_000);
}

/** Undefined, as what a race against it gives. */
function sleep(ms: number): Promise<undefined> {
  return new Promise((resolve) => setTimeout(() => resolve(undefined), ms));
}
