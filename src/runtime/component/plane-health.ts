import type { Metrics } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import type { Discovery } from "../discovery/index.ts";
import type { EventPlane } from "../event-plane/index.ts";

/**
 * How the discovery and event planes are, for whoever goes on without them: a gauge per plane, read at scrape time, and
 * the words for a routing explanation. The planes say it in the log themselves. Asked at each decision, so a look is
 * kept for `LOOK_MS`, and there is no timer.
 */
const LOOK_MS = 250;
const NONE: readonly string[] = Object.freeze([]);

export interface PlaneHealthOptions {
  readonly discovery: Discovery;
  readonly events: EventPlane;
  readonly clock: Clock;
  readonly metrics: Metrics;
}

export class PlaneHealth {
  readonly #options: PlaneHealthOptions;
  /** Workers whose lease expired and that are still routed to. Set by whoever keeps them. */
  keptWorkers = 0;
  #lookedMs = -Infinity;
  #degradations: readonly string[] = NONE;

  constructor(options: PlaneHealthOptions) {
    this.#options = options;
    const gauge = options.metrics.gauge("dynamo_plane_degraded");
    const discovery = gauge.labels("discovery");
    const events = gauge.labels("events");
    options.metrics.onCollect(() => {
      discovery.set(options.discovery.health().healthy ? 0 : 1);
      events.set(options.events.health?.().healthy === false ? 1 : 0);
    });
  }

  /** Such as `discovery: ... , choosing among the last known workers`; empty when all is well. */
  get degradations(): readonly string[] {
    const nowMs = this.#options.clock.monotonicMs();
    if (nowMs - this.#lookedMs >= LOOK_MS) {
      this.#lookedMs = nowMs;
      this.#degradations = this.#look();
    }
    return this.#degradations;
  }

  #look(): readonly string[] {
    const found: string[] = [];
    const discovery = this.#options.discovery.health();
    if (!discovery.healthy) found.push("discovery: unreadable, choosing among the last known workers");
    if (this.keptWorkers > 0) found.push(`discovery: ${this.keptWorkers} workers have no lease, but a live connection`);
    const events = this.#options.events.health?.();
    if (events?.healthy === false) found.push(`events: ${events.detail ?? "unreachable"}, load and overlap may be old`);
    return found.length === 0 ? NONE : found;
  }
}
