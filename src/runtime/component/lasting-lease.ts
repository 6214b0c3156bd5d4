import { toDynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { Discovery, JsonValue, Lease } from "../discovery/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";

const RETRY_MS = 1_000;

/**
 * A lease that comes back: when it is lost (its process was frozen for longer than the TTL, its store could not be
 * written) it is opened anew with all its keys, tried again each second until it is closed. So a role that lost its place
 * in discovery goes on serving whoever still knows it, and everybody finds it again without a restart. Throws what the
 * first `openLease` throws.
 */
export async function openLastingLease(
  discovery: Discovery,
  options: { readonly clock: Clock; readonly logger: Logger },
): Promise<Lease> {
  return new Lasting(discovery, options, await discovery.openLease());
}

class Lasting implements Lease {
  /** Never settles: nobody has to do anything about it. */
  readonly lost = new Promise<void>(() => undefined);
  readonly #discovery: Discovery;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #keys = new Map<string, JsonValue>();
  /** Undefined while it is lost. */
  #lease: Lease | undefined;
  #id: string;
  #retry: TimerHandle | undefined;
  #isClosed = false;

  constructor(discovery: Discovery, options: { readonly clock: Clock; readonly logger: Logger }, lease: Lease) {
    this.#discovery = discovery;
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
      lease = await this.#discovery.openLease();
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
    if (!this.#isClosed) this.#retry = this.#clock.setTimer(RETRY_MS, () => void this.#reopen());
  }
}
