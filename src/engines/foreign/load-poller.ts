import type { Logger } from "../../observability/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import type { EngineDialect, ScrapedLoad } from "./answer.ts";
import type { EngineHttp } from "./engine-http.ts";
import { familiesWithPrefix } from "./prometheus-text.ts";

/**
 * Scrapes an engine's metrics: every `intervalMs` while it works, five times as seldom while nothing changes. What it said
 * counts for `maxAgeMs`; then it is stale, is said to be, and nothing is concluded from it any more.
 */
export interface LoadPollerOptions {
  readonly dialect: EngineDialect;
  readonly http: EngineHttp;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly intervalMs: number;
  readonly maxAgeMs: number;
  /** For one answer. */
  readonly timeoutMs: number;
  /** Answers of the engine, in order. */
  readonly onScrape: (load: ScrapedLoad) => void;
  /** It did not answer; `isGone` when nobody listens at its address any more. */
  readonly onMiss: (isGone: boolean) => void;
  readonly isBusy: () => boolean;
}

const IDLE_FACTOR = 5;

export class LoadPoller {
  readonly #options: LoadPollerOptions;
  #timer: TimerHandle | undefined;
  #isOpen = false;
  #isAsking = false;
  #text = "";
  #load: ScrapedLoad | undefined;
  #scrapedMs = -Infinity;
  #unchanged = 0;
  #isStaleLogged = false;
  scrapes = 0;
  misses = 0;

  constructor(options: LoadPollerOptions) {
    this.#options = options;
  }

  start(): void {
    if (this.#isOpen) return;
    this.#isOpen = true;
    this.#schedule(0);
  }

  stop(): void {
    this.#isOpen = false;
    this.#timer?.cancel();
    this.#load = undefined;
  }

  /** Now, not at the next time; while one is under way, that one counts. */
  hurry(): void {
    if (!this.#isOpen || this.#isAsking) return;
    this.#timer?.cancel();
    this.#schedule(0);
  }

  /** The newest scrape while it counts. */
  get load(): ScrapedLoad | undefined {
    return this.ageMs <= this.#options.maxAgeMs ? this.#load : undefined;
  }

  /** Of the newest scrape, whatever its age. */
  get text(): string {
    return this.#text;
  }

  get ageMs(): number {
    return this.#options.clock.monotonicMs() - this.#scrapedMs;
  }

  get isStale(): boolean {
    return this.ageMs > this.#options.maxAgeMs;
  }

  /** The engine's own families; nothing once they are stale. */
  ownMetrics(): string {
    return this.isStale ? "" : familiesWithPrefix(this.#text, this.#options.dialect.metricsPrefix);
  }

  #schedule(delayMs: number): void {
    this.#timer = this.#options.clock.setTimer(delayMs, () => void this.#scrape());
  }

  async #ask(path: string): Promise<string> {
    const { http, timeoutMs } = this.#options;
    const { status, text } = await http.ask("GET", path, { timeoutMs });
    if (status !== 200) throw new Error(`status ${status} for ${path}`);
    return text;
  }

  async #scrape(): Promise<void> {
    const { dialect, clock, onScrape, onMiss, intervalMs, isBusy, logger } = this.#options;
    this.#isAsking = true;
    try {
      const { loadPath } = dialect;
      const [text, loadText] = await Promise.all([
        this.#ask(dialect.metricsPath),
        loadPath === undefined ? undefined : this.#ask(loadPath),
      ]);
      if (!this.#isOpen) return;
      const load = dialect.loadOf(text, loadText);
      this.#unchanged = sameLoad(load, this.#load) && !isBusy() ? this.#unchanged + 1 : 0;
      this.#text = text;
      this.#load = load;
      this.#scrapedMs = clock.monotonicMs();
      this.#isStaleLogged = false;
      this.scrapes++;
      onScrape(load);
    } catch (thrown) {
      if (!this.#isOpen) return;
      this.misses++;
      this.#unchanged = 0;
      if (this.isStale && !this.#isStaleLogged) {
        this.#isStaleLogged = true;
        logger.warn({ diagnostic: (thrown as Error).message }, "the engine's load is stale: its metrics do not come");
      }
      onMiss((thrown as { reason?: unknown }).reason === "worker-unreachable");
    } finally {
      this.#isAsking = false;
      if (this.#isOpen) this.#schedule(this.#unchanged > 2 ? intervalMs * IDLE_FACTOR : intervalMs);
    }
  }
}

function sameLoad(one: ScrapedLoad, other: ScrapedLoad | undefined): boolean {
  return (
    other !== undefined &&
    one.runningRequests === other.runningRequests &&
    one.waitingRequests === other.waitingRequests &&
    one.kvUsage === other.kvUsage &&
    one.steps === other.steps
  );
}
