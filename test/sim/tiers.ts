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
import type { Clock } from "../../src/std/index.ts";
import type { Logger } from "../../src/observability/index.ts";
import { TieredEngine } from "../../src/worker/tiers/tiered-engine.ts";
import type { SimDisk, SimStore } from "./disk.ts";
import type { Marks } from "./marks.ts";
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
