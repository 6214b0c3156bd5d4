import type { Logger, Metrics } from "../observability/index.ts";
import type { Clock } from "../std/index.ts";

/**
 * What made decisions worse than they should be: marked in each one's explanation, counted by its kind, and logged at
 * most once a minute and kind, so that a lasting one is seen and a flood of requests is not a flood of lines.
 */
export const NO_DEGRADATION: readonly string[] = Object.freeze([]);
export const NO_INDEX: readonly string[] = Object.freeze(["kv: no index, choosing by load"]);
export const EMPTY_INDEX: readonly string[] = Object.freeze(["kv: index empty, choosing by load"]);
export const SESSION_MOVED = "session: its worker could not take the request";

/** By how the text begins; the first that fits counts. */
const KINDS: readonly (readonly [RegExp, string])[] = [
  [/^kv: no index/, "no_index"],
  [/^kv: index empty/, "index_empty"],
  [/^kv: .*recovering/, "recovering"],
  [/^session: /, "session_moved"],
  [/^router service: /, "router_service"],
  [/^discovery: /, "discovery"],
  [/^events: /, "events"],
];
const LOG_EVERY_MS = 60_000;

export class Degradations {
  readonly #model: string;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #metrics: Metrics;
  /** By kind. */
  readonly #loggedMs = new Map<string, number>();

  constructor(options: {
    readonly model: string;
    readonly clock: Clock;
    readonly logger: Logger;
    readonly metrics: Metrics;
  }) {
    this.#model = options.model;
    this.#clock = options.clock;
    this.#logger = options.logger;
    this.#metrics = options.metrics;
  }

  /** Of one decision. */
  note(texts: readonly string[]): void {
    for (const text of texts) {
      const kind = KINDS.find(([pattern]) => pattern.test(text))?.[1] ?? "other";
      this.#metrics.counter("dynamo_router_degraded_decisions_total").labels(this.#model, kind).add();
      const nowMs = this.#clock.monotonicMs();
      if (nowMs - (this.#loggedMs.get(kind) ?? -Infinity) < LOG_EVERY_MS) continue;
      this.#loggedMs.set(kind, nowMs);
      // At the start there is nothing to know.
      const level = kind === "index_empty" ? "info" : "warn";
      this.#logger[level]({ model: this.#model, kind }, `routing is degraded: ${text}`);
    }
  }
}
