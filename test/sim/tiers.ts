import type { Engine } from "../../src/engines/index.ts";
import {
  DiskTier,
  HostTier,
  ObjectTier,
  SightFilter,
  TieredCache,
  type TierFailure,
  type TierMeters,
  type TierName,
  type TieredCacheOptions,
} from "../../src/kvbm/index.ts";
import { SeededRandom, type Clock } from "../../src/std/index.ts";
import type { Logger } from "../../src/observability/index.ts";
import { TieredEngine } from "../../src/worker/tiers/tiered-engine.ts";
import { TIER_FAULT_KINDS, planFaults, type FaultKind } from "./faults.ts";
import type { SimDisk, SimStore } from "./disk.ts";
import type { Marks } from "./marks.ts";
import type { RunPlan } from "./simulation.ts";
import { Draw, planWorkload } from "./workload.ts";
import type { SimProcess } from "./world.ts";

/**
 * Each tenth seed, and half of those with roles: workers keep the blocks that fall out of their engine's cache in host
 * memory, on a simulated disk (`disk.ts`), which outlives them, and some in an object store that all share. The tiers are
 * the real ones.
 */
export interface TiersShape {
  readonly hostBlocks: number;
  /** 0 = no disk. */
  readonly diskBlocks: number;
  readonly diskBytesPerMs: number;
  readonly hasStore: boolean;
  readonly minSights: number;
}

const BLOCK_BYTES = 64;
const PAGE_BYTES = 4_096;
const ENTRY_BYTES = 128;

export function withTiers(plan: RunPlan, seed: number, kinds: readonly FaultKind[] | undefined): RunPlan {
  if (seed % 10 !== 6 && seed % 10 !== 3) return plan;
  const random = new SeededRandom(seed ^ 0x71e25);
  const draw = new Draw(random);
  const tiers: TiersShape = {
    hostBlocks: draw.pick([16, 32, 128]),
    diskBlocks: draw.pick([0, 64, 256, 256]),
    diskBytesPerMs: ENTRY_BYTES / draw.pick([0.02, 0.2, 2]),
    hasStore: draw.chance(0.5),
    minSights: draw.pick([1, 1, 2]),
  };
  const count = plan.faults.length === 0 ? 0 : draw.int(1, 4);
  // More prompts than the caches hold, that begin alike: blocks fall out and are asked for again.
  const workload = { ...plan.workload, prefixes: { count: 6, least: 100, most: 300 } };
  const struck = planFaults(count, plan.workload.spanMs, kinds ?? TIER_FAULT_KINDS, random);
  return {
    ...plan,
    workload,
    calls: planWorkload(workload, random),
    cluster: {
      ...plan.cluster,
      tiers,
      fabric: { ...plan.cluster.fabric, storeBytesPerMs: ENTRY_BYTES / draw.pick([0.2, 2]) },
      // Small caches, so that blocks fall out of them.
      engine: { ...plan.cluster.engine, dataParallelSize: 1, totalBlocks: draw.pick([40, 48, 64]) },
    },
    faults: [...plan.faults.slice(0, 4), ...struck].toSorted((a, b) => a.atMs - b.atMs),
  };
}

/** The tiers of one life of a worker, for the checkers. */
export interface SeatTiers {
  readonly cache: TieredCache;
  readonly host: HostTier;
  readonly disk: DiskTier | undefined;
}

export interface TieredOptions {
  readonly shape: TiersShape;
  readonly engine: Engine;
  readonly process: SimProcess;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly marks: Marks;
  readonly disk: SimDisk;
  readonly store: SimStore;
  readonly onTiers: (tiers: SeatTiers) => void;
}

export function tieredEngine({ shape, engine, process, clock, logger, marks, ...options }: TieredOptions): Engine {
  return new TieredEngine({
    engine,
    clock,
    onParkingFull: () => undefined,
    makeCache: ({ blockBytes, blockSizeTokens, totalBlocks }, { attach, ...hooks }) => {
      const meters = new MarkingMeters(marks);
      const shared = { clock, logger, meters };
      const format = { fingerprint: [1, 2], blockBytes } as const;
      const host = new HostTier({ bytes: shape.hostBlocks * BLOCK_BYTES, blockBytes });
      attach(host.memory);
      const lower: TieredCacheOptions["lower"][number][] = [];
      let disk: DiskTier | undefined;
      if (shape.diskBlocks > 0) {
        const files = options.disk.filesOf(process);
        disk = new DiskTier({ ...shared, format, files, folder: "/kv", bytes: shape.diskBlocks * PAGE_BYTES });
        lower.push({ tier: disk, filter: new SightFilter(shape.minSights) });
      }
      if (shape.hasStore) {
        const tier = new ObjectTier({ ...shared, format, store: options.store.clientOf(process) });
        lower.push({ tier, filter: new SightFilter(1) });
      }
      const cache = new TieredCache({ ...hooks, ...shared, blockSizeTokens, totalBlocks, host, lower });
      options.onTiers({ cache, host, disk });
      return Promise.resolve(cache);
    },
  });
}

const RESTORED = {
  host: "blocks restored from host memory",
  disk: "blocks restored from disk",
  object: "blocks restored from the store",
} as const;

/** Failures are counted by the product; here they say what was reached. */
class MarkingMeters implements TierMeters {
  readonly #marks: Marks;

  constructor(marks: Marks) {
    this.#marks = marks;
  }

  onboarded(from: TierName, blocks: number): void {
    if (blocks > 0) this.#marks.mark(RESTORED[from]);
  }

  failed(tier: TierName, failure: TierFailure): void {
    if (failure === "corrupt") this.#marks.mark(tier === "disk" ? "damaged entry refused" : "damaged object refused");
    if (failure === "deadline") this.#marks.mark("request parked until its deadline");
  }

  degraded(tier: TierName, isDegraded: boolean): void {
    if (isDegraded) this.#marks.mark(tier === "disk" ? "disk tier degraded" : "store tier degraded");
  }

  offloaded(): void {}
  matched(): void {}
  parked(): void {}
  used(): void {}
  waiting(): void {}
}
