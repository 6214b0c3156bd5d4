import type { Random } from "../../src/std/index.ts";
import type { Cluster, Seat } from "./cluster.ts";
import { RecoveryWatch } from "./recovery-watch.ts";
import { RoleFaults } from "./role-faults.ts";
import { TierFaults } from "./tier-faults.ts";
import { Draw } from "./workload.ts";

/** The faults of one run: what happens when, drawn from the seed before the run begins; to whom is drawn when it happens. */
export const FAULT_KINDS = [
  "kill worker",
  "power off worker",
  "freeze worker",
  "drain worker",
  "engine dies",
  "engine hangs",
  "kill frontend",
  "freeze frontend",
  "drain frontend",
  "partition",
  "partition one way",
  "slow link",
  "reset connection",
  "discovery unreachable",
  "discovery down",
  "revoke lease",
  "clock jump",
] as const;

/** Of clusters with prefill and decode workers; most strike at the next handoff that comes within their time. */
export const ROLE_FAULT_KINDS = [
  "kill prefill before transfer",
  "kill prefill during transfer",
  "kill prefill after transfer",
  "power off prefill during transfer",
  "kill decode while pulling",
  "break transfer",
  "stall transfers",
  "change role",
] as const;

/** Of clusters with tiers below the engines' caches. */
export const TIER_FAULT_KINDS = [
  "disk full",
  "disk slow",
  "disk hangs",
  "disk fails",
  "disk loses its file",
  "bits flip",
  "kill worker mid-write",
  "power off worker mid-write",
  "store down",
  "store hangs",
  "store corrupts",
] as const;

export type FaultKind =
  (typeof FAULT_KINDS)[number] | (typeof ROLE_FAULT_KINDS)[number] | (typeof TIER_FAULT_KINDS)[number];

export interface PlannedFault {
  readonly kind: FaultKind;
  readonly atMs: number;
  readonly forMs: number;
  /** Index of the worker or frontend; for discovery, of either, workers first. @default drawn when it happens */
  readonly seat?: number;
}

export function planFaults(count: number, spanMs: number, kinds: readonly FaultKind[], random: Random): PlannedFault[] {
  const draw = new Draw(random);
  return Array.from({ length: count }, () => ({
    kind: draw.pick(kinds),
    atMs: draw.real(0, spanMs),
    forMs: draw.chance(0.2) ? draw.real(8_000, 15_000) : draw.real(50, 5_000),
  })).toSorted((a, b) => a.atMs - b.atMs);
}

/** Makes faults happen and takes them back. */
export class Nemesis {
  readonly #cluster: Cluster;
  readonly #draw: Draw;
  readonly #undo = new Set<() => void>();
  /** Kinds that really happened. */
  readonly happened = new Map<FaultKind, number>();
  readonly recovery: RecoveryWatch;
  readonly #roles: RoleFaults;
  readonly #tiers: TierFaults;

  constructor(cluster: Cluster, random: Random) {
    this.#cluster = cluster;
    this.recovery = new RecoveryWatch(cluster);
    this.#draw = new Draw(random);
    this.#roles = new RoleFaults(cluster, this.#draw);
    this.#tiers = new TierFaults(cluster, this.#draw);
  }

  schedule(faults: readonly PlannedFault[]): void {
    for (const fault of faults) this.#cluster.world.timer(fault.atMs, () => this.#strike(fault));
  }

  /** Ends every fault that is under way. */
  stop(): void {
    for (const undo of this.#undo) undo();
    this.#roles.stop();
    this.#tiers.stop();
    this.#cluster.network.healAll();
    this.#cluster.eventsAreLost = false;
  }

  #strike(fault: PlannedFault): void {
    const { kind, forMs, seat: wanted } = fault;
    const { world, network, workers, frontends } = this.#cluster;
    const { marks } = world;
    const took = (): void => {
      this.happened.set(kind, (this.happened.get(kind) ?? 0) + 1);
      world.record(`fault: ${kind} for ${forMs.toFixed(0)} ms`);
    };
    switch (kind) {
      case "kill worker":
      case "power off worker": {
        const seat = this.#serving(workers, wanted);
        if (seat === undefined) return;
        took();
        if (kind === "power off worker") marks.mark("worker host lost power");
        else marks.mark(isBusy(seat) ? "worker killed mid-stream" : "worker killed idle");
        const isSilent = kind === "power off worker";
        this.recovery.lost(seat, isSilent ? "silent" : "killed", () => true);
        this.#cluster.kill(seat, isSilent);
        return;
      }
      case "freeze worker":
      case "freeze frontend": {
        const seat = this.#serving(kind === "freeze worker" ? workers : frontends, wanted);
        if (seat === undefined) return;
        took();
        this.#cluster.trouble(seat, forMs, "frozen");
        if (kind === "freeze frontend") marks.mark("frontend frozen");
        else if (isBusy(seat)) marks.mark("worker frozen mid-stream");
        const { process } = seat;
        if (kind === "freeze worker") this.recovery.lost(seat, "silent", () => process.state === "frozen");
        process.freeze();
        this.#later(forMs, () => {
          if (process.state !== "frozen") return;
          world.record(`${process.name} thaws`);
          if (kind === "freeze worker") marks.mark("worker thawed");
          process.thaw();
        });
        return;
      }
      case "drain worker":
      case "drain frontend": {
        const seat = this.#serving(kind === "drain worker" ? workers : frontends, wanted);
        if (seat === undefined) return;
        took();
        if (isBusy(seat))
          marks.mark(kind === "drain worker" ? "worker drained mid-stream" : "frontend drained mid-stream");
        this.#cluster.drain(seat);
        return;
      }
      case "engine dies": {
        const seat = this.#serving(workers, wanted);
        if (seat?.engine === undefined) return;
        took();
        this.#cluster.trouble(seat);
        marks.mark("engine died");
        const { engine } = seat;
        seat.process.enqueue(() => void engine.die());
        return;
      }
      case "engine hangs": {
        const seat = this.#serving(workers, wanted);
        if (seat?.engine === undefined) return;
        took();
        this.#cluster.trouble(seat, forMs);
        if (isBusy(seat)) marks.mark("engine hung");
        const { engine, process } = seat;
        let isHung = true;
        this.recovery.hangs(seat, () => isHung && process.state === "running");
        engine.hang();
        this.#later(forMs, () => {
          isHung = false;
          process.enqueue(() => engine.letGo());
        });
        return;
      }
      case "kill frontend": {
        const seat = this.#serving(frontends, wanted);
        if (seat === undefined) return;
        took();
        if (isBusy(seat)) marks.mark("frontend killed mid-stream");
        this.#cluster.kill(seat);
        return;
      }
      case "partition":
      case "partition one way":
      case "slow link": {
        took();
        const [from, to] = this.#link();
        const isSlow = kind === "slow link";
        marks.mark(isSlow ? "link slow" : kind === "partition" ? "link partitioned" : "link partitioned one way");
        const fault = isSlow
          ? { blocked: false, bytesPerMs: this.#draw.real(0.5, 50), extraLatencyMs: this.#draw.real(5, 300) }
          : { blocked: true, bytesPerMs: Infinity, extraLatencyMs: 0 };
        world.record(`${from} > ${to}: ${JSON.stringify(fault)}`);
        for (const seat of this.#cluster.seats)
          if (seat.host === from || seat.host === to) this.#cluster.trouble(seat, forMs);
        network.setFault(from, to, fault);
        if (kind !== "partition one way") network.setFault(to, from, fault);
        this.#later(forMs, () => {
          network.setFault(from, to, undefined);
          network.setFault(to, from, undefined);
        });
        return;
      }
      case "reset connection": {
        const ends = [...network.ends].filter(
          (end) => end.isOpen && !end.isClosed && end.remoteHost !== "clients" && end.process.name !== "clients",
        );
        if (ends.length === 0) return;
        took();
        const end = this.#draw.pick(ends);
        for (const seat of workers) {
          if (seat.process === end.process || seat.host === end.remoteHost) this.#cluster.wasReset(seat);
        }
        end.reset();
        return;
      }
      case "discovery unreachable": {
        const { seats } = this.#cluster;
        const seat = wanted === undefined ? this.#draw.pick(seats) : seats[wanted]!;
        const { discovery } = seat;
        if (discovery === undefined || this.#cluster.discoveryIsDown) return;
        took();
        marks.mark("discovery unreachable");
        // A worker that cannot renew its lease is forgotten by those who can read.
        if (seat.kind === "worker") this.#cluster.trouble(seat, forMs);
        discovery.isReachable = false;
        this.#later(forMs, () => {
          if (!this.#cluster.discoveryIsDown) discovery.isReachable = true;
        });
        return;
      }
      case "discovery down": {
        if (this.#cluster.discoveryIsDown) return;
        took();
        marks.mark("discovery down");
        this.#cluster.discoveryGoesDown();
        this.#later(forMs, () => this.#cluster.discoveryIsBack());
        return;
      }
      case "revoke lease": {
        const seat = this.#serving(workers, wanted);
        const entries = [...this.#cluster.store.entries.values()];
        const held = entries.find(({ entry }) => seat !== undefined && entry.key.includes(seat.worker!.instanceId));
        if (seat === undefined || held === undefined) return;
        took();
        // Nobody knows it until it has registered again.
        this.#cluster.trouble(seat, 0);
        this.#cluster.store.revoke(held.entry.leaseId);
        return;
      }
      case "clock jump": {
        const seat = this.#draw.pick(this.#cluster.seats);
        took();
        const byMs = this.#draw.real(-600_000, 600_000);
        marks.mark(byMs < 0 ? "clock jumped back" : "clock jumped forward");
        seat.process.wallOffsetMs += byMs;
        return;
      }
      default:
        for (const part of [this.#roles, this.#tiers]) part.strike(fault, took, (undo) => this.#later(forMs, undo));
    }
  }

  #later(forMs: number, run: () => void): void {
    const undo = (): void => {
      if (this.#undo.delete(undo)) run();
    };
    this.#undo.add(undo);
    this.#cluster.world.timer(forMs, undo);
  }

  #serving(seats: readonly Seat[], wanted: number | undefined): Seat | undefined {
    const serving = seats.filter((seat, index) => seat.isServing && (wanted ?? index) === index);
    return serving.length === 0 ? undefined : this.#draw.pick(serving);
  }

  /** Two hosts of ours. The way to the clients is theirs. */
  #link(): [string, string] {
    const hosts = this.#cluster.seats.map(({ host }) => host);
    const from = this.#draw.pick(hosts);
    const others = hosts.filter((host) => host !== from);
    return [from, others.length === 0 ? from : this.#draw.pick(others)];
  }
}

function isBusy(seat: Seat): boolean {
  if (seat.worker !== undefined) return seat.worker.load().runningRequests > 0;
  return (seat.frontend?.pipeline.live.size ?? 0) > 0;
}
