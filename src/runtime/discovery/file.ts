import { DynamoError } from "../../errors/index.ts";
import { silentLogger, type Logger } from "../../observability/index.ts";
import { systemClock, systemRandom, type Clock, type Random, type TimerHandle } from "../../std/index.ts";
import type { Discovery, DiscoveryChange, DiscoveryEntry, DiscoveryHealth, Lease, Watch } from "./base.ts";
import { ChangeFeed } from "./change-feed.ts";
import { FileLease } from "./file-lease.ts";
import { FileView } from "./file-view.ts";
import { ownHolder, type Holder } from "./holder.ts";
import { StoreFolder, unavailable } from "./store-folder.ts";
import { checkPrefix, checkTtl, DEFAULT_TTL_MS, entriesUnder } from "./store-key.ts";

/**
 * Discovery through a folder that all processes share: nothing to install, survives any of them. `docs/design/discovery-file.md`
 * tells why it is built so. Leases are folders (file-lease.ts writes them), watchers poll (file-view.ts reads them), the layout
 * is in store-folder.ts. Works on one machine and on a shared file system; death of a process is seen at once on the same machine
 * (Linux), within the TTL elsewhere.
 *
 * Polling runs only while there is a watch. A process that only lists judges silence only from one list to the next,
 * so it may still show a lease that ended on another machine until somebody sweeps it.
 */
export interface FileDiscoveryOptions {
  /** Shared by all processes of a cluster; made with mode 0700 when missing. */
  readonly root: string;
  readonly clock?: Clock;
  readonly logger?: Logger;
  /** Between two looks for changes. @default 100 */
  readonly pollMs?: number;
  /** Spreads the first whole look of many watchers after the store was unreadable. */
  readonly random?: Random;
}

const DEFAULT_POLL_MS = 100;
/**
 * While the store is unreadable, a watcher waits up to so many intervals until it looks again: when the store comes back, a
 * cluster's watchers, which then read all of it, do so spread over a second.
 */
const MAX_UNREADABLE_POLLS = 10;

export class FileDiscovery implements Discovery {
  readonly #folder: StoreFolder;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #pollMs: number;
  readonly #random: Random;
  readonly #holder: Holder = ownHolder();
  readonly #view: FileView;
  readonly #leases = new Set<FileLease>();
  readonly #feeds = new Set<ChangeFeed>();
  /** Until the next one is opened. */
  #hasLostLease = false;
  #timer: TimerHandle | undefined;
  #polling: Promise<void> | undefined;
  #pollAgain = false;
  #prepared: Promise<void> | undefined;
  #open = true;

  constructor(options: FileDiscoveryOptions) {
    this.#folder = new StoreFolder(options.root);
    this.#clock = options.clock ?? systemClock;
    this.#logger = options.logger ?? silentLogger;
    this.#pollMs = options.pollMs ?? DEFAULT_POLL_MS;
    this.#random = options.random ?? systemRandom;
    this.#view = new FileView({
      folder: this.#folder,
      clock: this.#clock,
      logger: this.#logger,
      own: this.#holder,
      onChanged: (key, stored, expired) => {
        for (const feed of this.#feeds) feed.changed(key, stored, expired);
      },
    });
  }

  async openLease(options: { readonly ttlMs?: number } = {}): Promise<Lease> {
    const ttlMs = options.ttlMs ?? DEFAULT_TTL_MS;
    checkTtl(ttlMs);
    this.#requireOpen();
    const lease = await FileLease.open({
      folder: this.#folder,
      clock: this.#clock,
      logger: this.#logger,
      holder: this.#holder,
      ttlMs,
      onChange: () => this.#pollSoon(),
      onEnd: (ended) => {
        this.#leases.delete(ended);
        this.#hasLostLease ||= ended.isLost;
      },
    });
    if (!this.#open) {
      await lease.close();
      this.#requireOpen();
    }
    this.#hasLostLease = false;
    this.#leases.add(lease);
    return lease;
  }

  async list(prefix: string): Promise<DiscoveryEntry[]> {
    checkPrefix(prefix);
    this.#requireOpen();
    await this.#prepare();
    await this.#view.refresh({ relist: this.#feeds.size === 0, sweep: false });
    return entriesUnder(prefix, this.#view.table).map((stored) => stored.entry);
  }

  async watch(prefix: string, listener: (change: DiscoveryChange) => void): Promise<Watch> {
    checkPrefix(prefix);
    this.#requireOpen();
    await this.#prepare();
    await this.#view.refresh({ relist: this.#feeds.size === 0, sweep: false });
    this.#requireOpen();
    const feed = new ChangeFeed({
      prefix,
      listener,
      logger: this.#logger,
      onClose: (closed) => {
        this.#feeds.delete(closed);
        if (this.#feeds.size === 0) this.#timer?.cancel();
      },
    });
    this.#feeds.add(feed);
    feed.start(this.#view.table);
    if (this.#feeds.size === 1) this.#schedulePoll();
    return feed;
  }

  health(): DiscoveryHealth {
    if (!this.#open) return { healthy: false, detail: "closed" };
    let detail = this.#view.trouble;
    for (const lease of this.#leases) detail ??= lease.failure;
    if (this.#hasLostLease) detail ??= "a lease was lost and is not opened again yet";
    return detail === undefined ? { healthy: true } : { healthy: false, detail };
  }

  async close(): Promise<void> {
    this.#open = false;
    await Promise.all([...this.#feeds, ...this.#leases].map((part) => part.close()));
    await this.#polling;
  }

  /** Once, so that a watcher may start before the first worker. A folder that vanishes later is a fault, not a first start. */
  async #prepare(): Promise<void> {
    this.#prepared ??= this.#folder.prepare();
    try {
      await this.#prepared;
    } catch (error) {
      this.#prepared = undefined;
      throw unavailable("made", error);
    }
  }

  #requireOpen(): void {
    if (!this.#open) throw new DynamoError("discovery-unavailable", "this discovery client is closed");
  }

  // ---- polling ----

  #schedulePoll(): void {
    this.#timer?.cancel();
    if (this.#feeds.size === 0) return;
    const delayMs = this.#view.isUnreadable
      ? this.#pollMs * (1 + this.#random.nextFloat() * (MAX_UNREADABLE_POLLS - 1))
      : this.#pollMs;
    this.#timer = this.#clock.setTimer(delayMs, () => this.#pollSoon());
  }

  /** Looks now, or once more after the look that runs. */
  #pollSoon(): void {
    if (this.#feeds.size === 0) return;
    if (this.#polling !== undefined) {
      this.#pollAgain = true;
      return;
    }
    this.#timer?.cancel();
    this.#polling = this.#poll().finally(() => {
      this.#polling = undefined;
      if (this.#pollAgain) {
        this.#pollAgain = false;
        this.#pollSoon();
      } else {
        this.#schedulePoll();
      }
    });
  }

  async #poll(): Promise<void> {
    try {
      await this.#view.refresh({ relist: false, sweep: true });
    } catch {
      // Logged by the view and shown by `health`; the next poll tries again.
    }
  }
}
