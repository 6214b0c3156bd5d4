import type { Logger } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import type { TierMeters, TierName } from "./tier.ts";

/**
 * Whether a tier is worth trying. A failure makes it degraded: left alone for a second, then tried with what comes next,
 * left alone twice as long when that fails too, and whole again with the first success. One log line each way.
 */
const FIRST_PAUSE_MS = 1_000;
const LONGEST_PAUSE_MS = 30_000;

export interface TierHealthOptions {
  readonly tier: TierName;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly meters: TierMeters;
}

export class TierHealth {
  readonly #options: TierHealthOptions;
  #pauseMs = 0;
  #retryAtMs = -Infinity;

  constructor(options: TierHealthOptions) {
    this.#options = options;
    options.meters.degraded(options.tier, false);
  }

  get isDegraded(): boolean {
    return this.#pauseMs > 0;
  }

  mayTry(): boolean {
    return this.#options.clock.monotonicMs() >= this.#retryAtMs;
  }

  failed(thrown: unknown): void {
    const { tier, clock, logger, meters } = this.#options;
    // Of several that were under way one counts.
    if (!this.mayTry()) return;
    if (!this.isDegraded) {
      meters.degraded(tier, true);
      logger.warn(
        { tier, diagnostic: thrown instanceof Error ? thrown.message : String(thrown) },
        "KV tier degraded: requests compute what it would have had; it is tried again by itself",
      );
    }
    this.#pauseMs = Math.min(LONGEST_PAUSE_MS, Math.max(FIRST_PAUSE_MS, this.#pauseMs * 2));
    this.#retryAtMs = clock.monotonicMs() + this.#pauseMs;
  }

  worked(): void {
    if (!this.isDegraded) return;
    const { tier, logger, meters } = this.#options;
    this.#pauseMs = 0;
    this.#retryAtMs = -Infinity;
    meters.degraded(tier, false);
    logger.info({ tier }, "KV tier works again");
  }
}
