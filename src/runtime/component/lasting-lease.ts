import { toDynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { DEFAULT_TTL_MS, type Discovery, type JsonValue, type Lease } from "../discovery/index.ts";
import type { Clock, Random, TimerHandle } from "../../std/index.ts";

/**
 * The wait before a try is a random part of this much of the TTL, which doubles from the first to the last. The last stays
 * well under the silence at which watchers give a lease up (three quarters of the TTL): who waits for a store that is
 * back already must not be forgotten meanwhile.
 */
const FIRST_BACK_OFF_OF_TTL = 1 / 8;
const MAX_BACK_OFF_OF_TTL = 1 / 2;

/**
 * A lease that comes back: when it is lost (its process was frozen for longer than the TTL, its store could not be
 * written) it is opened anew with all its keys, tried again until it is closed. So a role that lost its place
 * in discovery goes on serving whoever still knows it, and everybody finds it again without a restart. Throws what the
 * first `openLease` throws.
 *
 * Each wait is a random part of a growing back-off: when a store comes back after minutes, the processes of a cluster
 * return spread over seconds. The last known set of the watchers bridges that: a lease is silent only while they can look.
 */
export async function openLastingLease(discovery: Discovery, options: LastingLeaseOptions): Promise<Lease> {
  return new Lasting(discovery, options, await discovery.openLease(leaseOptions(options)));
}

export interface LastingLeaseOptions {
  readonly clock: Clock;
  readonly logger: Logger;
  readonly random: Random;
  /** @default the store's */
  readonly ttlMs?: number;
}

class Lasting implements Lease {
  /** Never settles: nobody has to do anything about it. */
  readonly lost = new Promise<void>(() => undefined);
  readonly #discovery: Discovery;
  readonly #options: LastingLeaseOptions;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #keys = new Map<string, JsonValue>();
  /** Undefined while it is lost. */
  #lease: Lease | undefined;
  #id: string;
  #retry: TimerHandle | undefined;
  #tries = 0;
  #isClosed = false;

  constructor(discovery: Discovery, options: LastingLeaseOptions, lease: Lease) {
    this.#discovery = discovery;
    this.#options = options;
    this.#clock = options.clock;
    this.#logger = options.logger;
    this.#id = lease.id;
    this.#hold(lease);
  }

  /** Of the newest lease. */
  get id(): string {
    return this.#id;
  }

  async put(key: string, value: JsonValue): Promise<void> {
    this.#keys.set(key, value);
    try {
      await this.#lease?.put(key, value);
    } catch (thrown) {
      // Lost meanwhile: it is among the keys of the next one.
      if (toDynamoError(thrown).reason === "lease-lost") return;
      this.#keys.delete(key);
      throw thrown;
    }
  }

  async delete(key: string): Promise<void> {
    this.#keys.delete(key);
    await this.#lease?.delete(key);
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#retry?.cancel();
    await this.#lease?.close();
  }

  #hold(lease: Lease): void {
    this.#lease = lease;
    this.#id = lease.id;
    this.#tries = 0;
    void lease.lost.then(() => {
      if (this.#isClosed || this.#lease !== lease) return;
      this.#lease = undefined;
      this.#logger.warn({ leaseId: lease.id }, "the discovery lease was lost: registering again");
      void this.#reopen();
    });
  }

  /** Never rejects. */
  async #reopen(): Promise<void> {
    let lease: Lease | undefined;
    try {
      lease = await this.#discovery.openLease(leaseOptions(this.#options));
      for (const [key, value] of this.#keys) await lease.put(key, value);
      if (!this.#isClosed) {
        this.#hold(lease);
        this.#logger.info({ leaseId: lease.id, keys: this.#keys.size }, "registered in discovery again");
        return;
      }
    } catch (thrown) {
      const { reason, diagnostic } = toDynamoError(thrown);
      this.#logger.debug({ reason, diagnostic }, "not registered in discovery yet");
    }
    await lease?.close().catch(() => undefined);
    if (this.#isClosed) return;
    const { random, ttlMs = DEFAULT_TTL_MS } = this.#options;
    const backOffMs = ttlMs * Math.min(MAX_BACK_OFF_OF_TTL, FIRST_BACK_OFF_OF_TTL * 2 ** this.#tries++);
    const waitMs = random.nextFloat() * backOffMs;
    this.#retry = this.#clock.setTimer(waitMs, () => void this.#reopen());
  }
}

function leaseOptions({ ttlMs }: LastingLeaseOptions): { ttlMs?: number } {
  return ttlMs === undefined ? {} : { ttlMs };
}
