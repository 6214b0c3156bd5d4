import type { Logger } from "../../observability/index.ts";
import type { KvEvent, StorageTier } from "../../protocol/index.ts";
import type { Clock } from "../../std/index.ts";
import type { BlockHashes } from "../../tokens/index.ts";
import { NO_BLOCK } from "../block-pool.ts";
import { blocksOf, follows, keyOf, storedEvents, type BlockIdentity } from "./block-identity.ts";
import { DeviceMirror } from "./device-mirror.ts";
import type { HostTier } from "./host-tier.ts";
import { OffloadQueue, type OffloadPriority } from "./offload-queue.ts";
import type { OffloadFilter } from "./sight-filter.ts";
import { TierCosts } from "./tier-costs.ts";
import type { LowerTier, ReadOptions, TierMeters, TierName } from "./tier.ts";

/**
 * The tiers of one engine: what leaves its cache lives on below, and comes back when a request asks for it.
 *
 *     engine's cache (G1) --copyOut--> host (G2) --write--> disk (G3)
 *            ^                         |  ^    \--write--> object store (G4)
 *            +---------copyIn----------+  +---read--- G3, G4
 *
 * Down: every block that the engine registers is copied to the host soon after, a few between two steps while requests
 * run, more when none does; from there to the tiers below, when their filter lets it pass. Queues hold weak references:
 * what has gone when its turn comes is skipped. Up: `match` says what the tiers have beyond the engine's cache and how
 * much of it is sooner here than recomputed, `fetch` reads from below into the host, `copyIn` hands it to the engine.
 *
 * The bytes of a block are copied once each way: the engine's thread reads and writes the host's slots, and so do the
 * file and socket calls. Everything here runs on the worker's event loop; per block it costs some microseconds, and a
 * checksum (70 us per 360 kB) where it goes to or comes from below the host.
 */
export interface CachePort {
  copyOut(sequenceHashes: Uint32Array, slots: Int32Array): Promise<Uint8Array>;
  copyIn(blocks: {
    readonly tokenIds: Uint32Array;
    readonly cacheNamespace: string;
    readonly firstBlock: number;
    readonly slots: Int32Array;
  }): Promise<number>;
}

export interface TieredCacheOptions {
  readonly blockSizeTokens: number;
  /** Of the engine's cache. */
  readonly totalBlocks: number;
  readonly port: CachePort;
  readonly host: HostTier;
  /** @default every block that the engine registers */
  readonly hostFilter?: OffloadFilter | undefined;
  /** Nearest first, each with its filter. */
  readonly lower: readonly { readonly tier: LowerTier; readonly filter: OffloadFilter }[];
  readonly clock: Clock;
  readonly logger: Logger;
  readonly meters: TierMeters;
  /** For routers: blocks that came into or left the tiers below the engine's cache. Never called inside a call of this class. */
  readonly onEvents: (events: readonly KvEvent[]) => void;
  /** True while requests run, which a long row of copies would hold up. */
  readonly isBusy: () => boolean;
}

/** What the tiers have of a sequence beyond the engine's cache: blocks [start, end). */
export interface TierMatch {
  readonly hashes: BlockHashes;
  readonly start: number;
  readonly end: number;
  /** Per block from `start` on: -1 = engine's cache, 0 = host, 1 = first lower tier, ... */
  readonly sources: readonly number[];
  /** True when some are below the host and must be read first. */
  readonly needsRead: boolean;
  /** Computing these blocks would take so long. Infinity while nothing was measured. */
  readonly recomputeMs: number;
}

/** What came back into the engine's cache, by where it had been; all zero until the engine has taken it. */
export interface RestoredFrom {
  hostBlocks: number;
  diskBlocks: number;
  objectBlocks: number;
  /** Of the copy into the engine, a wait for its step included. */
  copyMs: number;
}

const IN_ENGINE = -1;
const IN_HOST = 0;
/** Four copies take 0.3 ms of the engine's thread, between two steps of 10 ms or more. */
const BUSY_BATCH = 4;
const IDLE_BATCH = 16;
/** Some 4 MB of waiting references. */
const QUEUE_BLOCKS = 32_768;
const CLOSE_TIMEOUT_MS = 5_000;
/** 200,000 slots of a disk that does not hang. */
const OPEN_TIMEOUT_MS = 5_000;
/** Writes of one tier at a time. */
const WRITES_AT_A_TIME = 4;

interface Lower {
  readonly tier: LowerTier;
  readonly filter: OffloadFilter;
  readonly queue: OffloadQueue;
  writing: number;
}

export class TieredCache {
  readonly costs = new TierCosts();
  readonly #options: TieredCacheOptions;
  readonly #host: HostTier;
  readonly #mirror: DeviceMirror;
  readonly #queue = new OffloadQueue(QUEUE_BLOCKS);
  readonly #lower: readonly Lower[];
  /** Blocks that are being read, by key. */
  readonly #loading = new Map<number, Promise<void>>();
  /** Everything that is under way, for `close` and `settled`. */
  readonly #running = new Set<Promise<unknown>>();
  #isOffloading = false;
  #isClosed = false;

  constructor(options: TieredCacheOptions) {
    this.#options = options;
    this.#host = options.host;
    this.#mirror = new DeviceMirror(options.totalBlocks);
    this.#lower = options.lower.map((one) => ({ ...one, queue: new OffloadQueue(QUEUE_BLOCKS), writing: 0 }));
  }

  /** Opens the tiers below the host and tells what they still have; of one that takes long, later. */
  async open(): Promise<void> {
    for (const { tier } of this.#lower) tier.onChange = () => this.#tell();
    const { clock, logger } = this.#options;
    const opened = Promise.all(this.#lower.map(({ tier }) => tier.open())).then(() => this.#tell());
    this.#track(opened);
    // A disk that hangs, or is very slow, must not keep its worker from serving: it joins when it is there.
    const late = Promise.withResolvers<void>();
    const timer = clock.setTimer(OPEN_TIMEOUT_MS, () => {
      logger.warn(
        { ms: OPEN_TIMEOUT_MS },
        "KV tiers are still being opened: requests compute what they would have had",
      );
      late.resolve();
    });
    await Promise.race([opened, late.promise]);
    timer.cancel();
  }

  /** Events of the engine, in order, before or after they were passed on. */
  onDeviceEvents(events: readonly KvEvent[]): void {
    for (const event of events) {
      this.#mirror.apply(event);
      if (event.type !== "stored" || event.tier !== "device") continue;
      // One block by itself is mostly the newest of an answer; a prompt comes in rows.
      const priority = event.sequenceHashes.length > 2 || event.startBlock === 0 ? 0 : 1;
      for (const block of blocksOf(event)) this.#offerToHost(block, priority);
    }
    this.#pump();
  }

  /** What the first `limit` blocks of a sequence can take from the tiers; undefined when that is nothing, or not worth it. */
  match(hashes: BlockHashes, limit: number): TierMatch | undefined {
    const { sequenceHashes } = hashes;
    const at = (i: number): [number, number] => [sequenceHashes[2 * i]!, sequenceHashes[2 * i + 1]!];
    let start = 0;
    while (start < limit && this.#mirror.has(...at(start))) start++;
    const sources: number[] = [];
    for (let i = start; i < limit; i++) {
      const source = this.#sourceOf(...at(i));
      if (source === undefined) break;
      sources.push(source);
    }
    this.#see(hashes, start + sources.length);
    this.#noteMatch(limit - start, sources);
    const { count, recomputeMs } = this.costs.worthTaking(sources, this.#options.blockSizeTokens);
    const taken = sources.slice(0, count);
    if (!taken.some((source) => source !== IN_ENGINE)) return undefined;
    const needsRead = taken.some((source) => source > IN_HOST);
    return { hashes, start, end: start + count, sources: taken, needsRead, recomputeMs };
  }

  /**
   * How many leading blocks the engine's cache, the host and the disk have between them, as far as taking them is worth it;
   * the first `inEngine` are known to be in the engine's cache. An object store may be farther away than whoever asks. Only
   * looks: nothing is counted as asked for.
   */
  countNear(sequenceHashes: Uint32Array, inEngine: number): number {
    const sources: number[] = [];
    for (let i = inEngine; i < sequenceHashes.length / 2; i++) {
      const source = this.#sourceOf(sequenceHashes[2 * i]!, sequenceHashes[2 * i + 1]!);
      if (source === undefined || this.#lower[source - 1]?.tier.name === "object") break;
      sources.push(source);
    }
    return inEngine + this.costs.worthTaking(sources, this.#options.blockSizeTokens).count;
  }

  /** Reads what is below the host into it. Resolves when all is there, failed, or late; never rejects. */
  async fetch(match: TierMatch, options: { readonly deadlineMs: number; readonly signal: AbortSignal }): Promise<void> {
    const { clock, meters } = this.#options;
    const startMs = clock.monotonicMs();
    const late = new AbortController();
    const reads: Promise<void>[] = [];
    const perTier = this.#lower.map(() => 0);
    const limits = { deadlineMs: options.deadlineMs, signal: AbortSignal.any([options.signal, late.signal]) };
    for (let from = 0, to = 0; from < match.sources.length; from = to) {
      const source = match.sources[from]!;
      const blocks: BlockIdentity[] = [];
      for (; match.sources[to] === source; to++) blocks.push(identityAt(match.hashes, match.start + to));
      if (source > IN_HOST) perTier[source - 1]! += this.#load(source - 1, blocks, limits, reads);
    }
    const blocksRead = perTier.reduce((sum, count) => sum + count, 0);
    const stop = Promise.withResolvers<void>();
    const timer = clock.setTimer(options.deadlineMs - startMs, () => stop.resolve());
    options.signal.addEventListener("abort", () => stop.resolve(), { once: true });
    const all = Promise.all(reads).then(() => true);
    const inTime = await Promise.race([all, stop.promise.then(() => false)]);
    timer.cancel();
    const elapsedMs = clock.monotonicMs() - startMs;
    if (!options.signal.aborted) meters.parked(elapsedMs, inTime ? "restored" : "late");
    if (inTime) {
      perTier.forEach((count, i) => this.costs.tookToRead(i + 1, count, (elapsedMs * count) / blocksRead));
    } else {
      late.abort();
      if (options.signal.aborted) return;
      this.#lower.forEach(({ tier }, i) => {
        if (perTier[i]! > 0) meters.failed(tier.name, "deadline");
      });
    }
  }

  /**
   * Hands the blocks of a match that are in the host now to the engine, up to the first that is not; what is submitted
   * after this call finds them. What is returned is filled in once the engine has taken them, before it runs a request that
   * was submitted after this call; undefined when nothing was handed over.
   */
  copyIn(match: TierMatch, tokenIds: Uint32Array, cacheNamespace: string): RestoredFrom | undefined {
    const { port, meters, blockSizeTokens, clock, logger, isBusy } = this.#options;
    const pool = this.#host.pool;
    const slots: number[] = [];
    let given = 0;
    let length = 0;
    const from: Record<TierName, number> = { host: 0, disk: 0, object: 0 };
    for (let i = match.start; i < match.end; i++) {
      const { lo, hi } = identityAt(match.hashes, i);
      const slot = pool.find(lo, hi);
      if (slot === NO_BLOCK && !this.#mirror.has(lo, hi)) break;
      slots.push(slot);
      if (slot === NO_BLOCK) continue;
      pool.retain(slot);
      given++;
      length = slots.length;
      const source = match.sources[i - match.start]!;
      from[source <= IN_HOST ? "host" : this.#lower[source - 1]!.tier.name]++;
    }
    if (given === 0) return undefined;
    const restored: RestoredFrom = { hostBlocks: 0, diskBlocks: 0, objectBlocks: 0, copyMs: 0 };
    const held = Int32Array.from(slots.slice(0, length));
    const startMs = clock.monotonicMs();
    // While requests run, the call waits for a step: that says nothing about the copy.
    const isMeasured = !isBusy();
    const copied = port
      .copyIn({
        tokenIds: tokenIds.slice(0, (match.start + length) * blockSizeTokens),
        cacheNamespace,
        firstBlock: match.start,
        slots: held,
      })
      .then(
        (taken) => {
          if (isMeasured) this.costs.tookToImport(given, clock.monotonicMs() - startMs);
          logger.debug({ ...from, taken, ms: clock.monotonicMs() - startMs }, "KV blocks restored");
          if (taken < given) meters.failed("host", "not-taken", given - taken);
          for (const name of ["host", "disk", "object"] as const) {
            const blocks = Math.min(from[name], taken);
            meters.onboarded(name, blocks);
            restored[`${name}Blocks`] = blocks;
          }
          restored.copyMs = clock.monotonicMs() - startMs;
        },
        () => meters.failed("host", "not-taken", given),
      )
      .finally(() => {
        for (let i = held.length - 1; i >= 0; i--) if (held[i] !== NO_BLOCK) pool.release(held[i]!);
      });
    this.#track(copied);
    return restored;
  }

  /** Forgets every block of the host and the disk that nothing uses; returns how many. */
  async clear(): Promise<number> {
    this.#queue.clear();
    this.#options.hostFilter?.clear();
    for (const { queue, filter } of this.#lower) {
      queue.clear();
      filter.clear();
    }
    // What moves now; under load more follows at once, and stays.
    await Promise.allSettled(this.#running);
    let count = this.#host.pool.clear();
    for (const { tier } of this.#lower) count += await tier.clear();
    this.#tell();
    return count;
  }

  /** Resolves when nothing moves any more. */
  async settled(): Promise<void> {
    while (this.#running.size > 0) await Promise.allSettled(this.#running);
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#queue.clear();
    for (const { queue } of this.#lower) queue.clear();
    // A read may hang with its file system; the process must still leave.
    const late = Promise.withResolvers<void>();
    const timer = this.#options.clock.setTimer(CLOSE_TIMEOUT_MS, late.resolve);
    await Promise.race([this.settled(), late.promise]);
    timer.cancel();
    await Promise.all(this.#lower.map(({ tier }) => tier.close()));
  }

  #sourceOf(lo: number, hi: number): number | undefined {
    if (this.#mirror.has(lo, hi)) return IN_ENGINE;
    if (this.#host.pool.find(lo, hi) !== NO_BLOCK) return IN_HOST;
    const lower = this.#lower.findIndex(({ tier }) => tier.has(lo, hi));
    return lower < 0 ? undefined : lower + 1;
  }

  #noteMatch(lookedUp: number, sources: readonly number[]): void {
    const found: Record<TierName, number> = { host: 0, disk: 0, object: 0 };
    for (const source of sources) {
      if (source === IN_HOST) found.host++;
      else if (source > IN_HOST) found[this.#lower[source - 1]!.tier.name]++;
    }
    this.#options.meters.matched(lookedUp, found);
  }

  /** A request has asked for these blocks: each may now be worth a place below where it is. */
  #see(hashes: BlockHashes, count: number): void {
    const { hostFilter, clock } = this.#options;
    const nowMs = clock.monotonicMs();
    for (let i = 0; i < count; i++) {
      const block = identityAt(hashes, i);
      if (this.#host.has(block)) this.#offerBelow(block, 0);
      else if (this.#mirror.has(block.lo, block.hi)) {
        // On its way to the host perhaps: its filters count this sight all the same.
        for (const { filter } of this.#lower) filter.see(keyOf(block.lo, block.hi), nowMs);
        if (hostFilter !== undefined) this.#offerToHost(block, 0);
      }
    }
    this.#pumpAllBelow();
    // Not at once: it tells routers of what makes room.
    if (this.#queue.size > 0) clock.nextTurn(() => this.#pump());
  }

  #offerToHost(block: BlockIdentity, priority: OffloadPriority): void {
    if (this.#isClosed || this.#host.has(block)) return;
    const { hostFilter, clock } = this.#options;
    if (hostFilter?.see(keyOf(block.lo, block.hi), clock.monotonicMs()) === false) return;
    if (!this.#queue.tryAdd(block, priority)) this.#options.meters.failed("host", "queue-full");
  }

  #offerBelow(block: BlockIdentity, priority: OffloadPriority): void {
    const nowMs = this.#options.clock.monotonicMs();
    for (const lower of this.#lower) {
      if (lower.tier.has(block.lo, block.hi) || !lower.filter.see(keyOf(block.lo, block.hi), nowMs)) continue;
      if (!lower.queue.tryAdd(block, priority)) this.#options.meters.failed(lower.tier.name, "queue-full");
    }
  }

  #pump(): void {
    if (this.#isOffloading || this.#queue.size === 0 || this.#isClosed) return;
    this.#isOffloading = true;
    this.#track(
      this.#offload().finally(() => {
        this.#isOffloading = false;
        this.#pumpAllBelow();
      }),
    );
  }

  /** One batch at a time: the engine looks for calls between two steps, so it never makes more copies than one batch there. */
  async #offload(): Promise<void> {
    const { port, meters, isBusy } = this.#options;
    while (this.#queue.size > 0) {
      const blocks: BlockIdentity[] = [];
      const slots: number[] = [];
      const limit = isBusy() ? BUSY_BATCH : IDLE_BATCH;
      while (blocks.length < limit) {
        const block = this.#queue.take();
        if (block === undefined) break;
        if (this.#host.has(block)) continue;
        const isThere = this.#mirror.has(block.lo, block.hi);
        const slot = isThere ? this.#host.take() : NO_BLOCK;
        if (slot === NO_BLOCK) {
          meters.failed("host", isThere ? "no-room" : "gone");
          continue;
        }
        blocks.push(block);
        slots.push(slot);
      }
      this.#tell();
      if (blocks.length === 0) continue;
      const hashes = Uint32Array.from(blocks.flatMap(({ lo, hi }) => [lo, hi]));
      let present: Uint8Array;
      try {
        present = await port.copyOut(hashes, Int32Array.from(slots));
      } catch {
        // The engine is gone or going.
        for (const slot of slots) this.#host.pool.free(slot);
        meters.failed("host", "gone", slots.length);
        continue;
      }
      const stored: BlockIdentity[] = [];
      blocks.forEach((block, i) => {
        if (present[i] === 1) {
          if (this.#keep(slots[i]!, block)) stored.push(block);
        } else {
          this.#host.pool.free(slots[i]!);
          meters.failed("host", "gone");
        }
      });
      meters.offloaded("host", stored.length);
      this.#tell(storedEvents(stored, "host"));
      for (const block of stored) this.#offerBelow(block, 0);
      this.#pumpAllBelow();
    }
  }

  /** A filled slot becomes matchable and evictable; true when its content is new. */
  #keep(slot: number, block: BlockIdentity): boolean {
    const held = this.#host.fill(slot, block);
    this.#host.pool.release(held);
    return held === slot;
  }

  #pumpAllBelow(): void {
    for (const lower of this.#lower) this.#pumpBelow(lower);
  }

  #pumpBelow(lower: Lower): void {
    const { meters } = this.#options;
    const { tier, queue } = lower;
    const { pool } = this.#host;
    while (lower.writing < WRITES_AT_A_TIME && queue.size > 0) {
      // The rest of a prompt is on its way: what is written together is read together.
      if (this.#isOffloading && !queue.hasWholeRun((first) => runLimit(tier, first))) break;
      const { blocks, slots } = this.#takeRun(lower);
      if (blocks.length === 0) continue;
      lower.writing++;
      const data = slots.map((slot) => this.#host.bytesOf(slot));
      this.#track(
        tier.write(blocks, data).then((stored) => {
          for (let i = slots.length - 1; i >= 0; i--) pool.release(slots[i]!);
          lower.writing--;
          if (stored) meters.offloaded(tier.name, blocks.length);
          this.#tell();
          this.#pumpBelow(lower);
        }),
      );
    }
    meters.waiting(tier.name, queue.size);
  }

  /** The blocks at the head of a queue that go into one write, each held in the host; none when all that was taken is gone. */
  #takeRun({ tier, queue }: Lower): { blocks: BlockIdentity[]; slots: number[] } {
    const { meters } = this.#options;
    const { pool } = this.#host;
    const blocks: BlockIdentity[] = [];
    const slots: number[] = [];
    let limit = 1;
    for (let next = queue.peek(); next !== undefined && blocks.length < limit; next = queue.peek()) {
      if (blocks.length > 0 && !follows(next, blocks.at(-1)!)) break;
      queue.take();
      if (tier.has(next.lo, next.hi)) {
        if (blocks.length > 0) break;
        continue;
      }
      const slot = pool.find(next.lo, next.hi);
      if (slot === NO_BLOCK || !tier.isWritable()) {
        meters.failed(tier.name, slot === NO_BLOCK ? "gone" : "degraded");
        continue;
      }
      pool.retain(slot);
      if (blocks.length === 0) limit = runLimit(tier, next);
      blocks.push(next);
      slots.push(slot);
    }
    return { blocks, slots };
  }

  /**
   * Starts to read consecutive blocks from a lower tier into the host, unless they are there or on their way. Adds what is
   * to be waited for to `reads`; returns how many blocks that is.
   */
  #load(index: number, blocks: readonly BlockIdentity[], limits: ReadOptions, reads: Promise<void>[]): number {
    const { tier } = this.#lower[index]!;
    const missing: BlockIdentity[] = [];
    let count = 0;
    for (const block of blocks) {
      const known = this.#loading.get(keyOf(block.lo, block.hi));
      if (known !== undefined) {
        reads.push(known);
        count++;
      } else if (!this.#host.has(block)) missing.push(block);
    }
    for (let from = 0; from < missing.length;) {
      const rest = missing.slice(from, from + tier.maxRunBlocks);
      const run = rest.slice(0, tier.runLength(rest));
      from += run.length;
      const slots = this.#takeSlots(run.length);
      if (slots.length === 0) break;
      reads.push(this.#read(tier, run.slice(0, slots.length), slots, limits));
      count += slots.length;
    }
    return count;
  }

  /** As many of the host's slots as there is room for. */
  #takeSlots(count: number): number[] {
    const slots: number[] = [];
    while (slots.length < count) {
      const slot = this.#host.take();
      if (slot === NO_BLOCK) break;
      slots.push(slot);
    }
    if (slots.length < count) this.#options.meters.failed("host", "no-room", count - slots.length);
    return slots;
  }

  #read(tier: LowerTier, run: readonly BlockIdentity[], slots: readonly number[], limits: ReadOptions): Promise<void> {
    const { pool } = this.#host;
    const read = async (): Promise<void> => {
      const pieces = slots.map((slot) => this.#host.bytesOf(slot));
      const areThere = await tier.read(run, pieces, limits);
      const held: number[] = [];
      const stored: BlockIdentity[] = [];
      run.forEach((block, i) => {
        this.#loading.delete(keyOf(block.lo, block.hi));
        if (areThere[i] !== true) {
          pool.free(slots[i]!);
          return;
        }
        held.push(this.#host.fill(slots[i]!, block));
        if (held.at(-1) === slots[i]) stored.push(block);
      });
      // Kept until those who wait for it had their turn.
      this.#options.clock.nextTurn(() => {
        for (let i = held.length - 1; i >= 0; i--) pool.release(held[i]!);
        this.#tell(storedEvents(stored, "host"));
      });
    };
    const reading = read();
    for (const { lo, hi } of run) this.#loading.set(keyOf(lo, hi), reading);
    this.#track(reading);
    return reading;
  }

  /** What changed in the tiers, removals first: they made the room. */
  #tell(stored: readonly KvEvent[] = []): void {
    const { meters } = this.#options;
    const events: KvEvent[] = [];
    const removed = (tier: StorageTier, sequenceHashes: Uint32Array): void => {
      if (sequenceHashes.length > 0) events.push({ type: "removed", dpRank: 0, tier, sequenceHashes });
    };
    removed("host", this.#host.pool.takeEvicted());
    events.push(...stored);
    meters.used("host", this.#host.usedBytes, this.#host.capacityBytes);
    meters.waiting("host", this.#queue.size);
    for (const { tier } of this.#lower) {
      const gone = tier.takeRemoved();
      const came = tier.takeStored();
      const told = tier.name === "disk" ? "disk" : "external";
      removed(told, gone);
      events.push(...storedEvents(came, told));
      meters.used(tier.name, tier.usedBytes, tier.capacityBytes);
    }
    if (events.length > 0) this.#options.onEvents(events);
  }

  #track(work: Promise<unknown>): void {
    this.#running.add(work);
    void work.finally(() => this.#running.delete(work));
  }
}

/** Runs end at the same depths in every worker, so that a store has a block once. */
function runLimit({ maxRunBlocks }: LowerTier, first: BlockIdentity): number {
  return maxRunBlocks - (first.depth % maxRunBlocks);
}

function identityAt({ sequenceHashes, localHashes }: BlockHashes, i: number): BlockIdentity {
  return {
    lo: sequenceHashes[2 * i]!,
    hi: sequenceHashes[2 * i + 1]!,
    parentLo: i === 0 ? 0 : sequenceHashes[2 * i - 2]!,
    parentHi: i === 0 ? 0 : sequenceHashes[2 * i - 1]!,
    localLo: localHashes[2 * i]!,
    localHi: localHashes[2 * i + 1]!,
    depth: i,
  };
}
