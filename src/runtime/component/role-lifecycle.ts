import type { Logger } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import type { RunningRole } from "./planes.ts";

export type RoleState = "starting" | "ready" | "draining" | "stopped";

interface RoleLifecycleOptions {
  readonly logger: Logger;
  readonly clock: Clock;
  /** What one cleanup may take before the next begins. @default 5000 */
  readonly cleanupTimeoutMs?: number;
}

interface Step {
  readonly name: string;
  readonly run: () => void | Promise<void>;
}

/**
 * Start, drain and stop of a role, the same for all:
 *
 *     starting --ready()--> ready --drain()--> draining --drained or timed out--> cleanup --> stopped
 *         \___________________\___ stop(), fail(), signal _______/
 *
 * What a role opened it `defer`s at once; cleanups run exactly once, last opened first, each within a time limit, and
 * a failing one is logged and does not keep the others from running. `done` settles after the last of them: resolved when the
 * role was stopped, rejected when it failed (the first failure counts).
 */
export class RoleLifecycle {
  readonly done: Promise<void>;
  readonly #options: RoleLifecycleOptions;
  readonly #cleanups: Step[] = [];
  readonly #drains: (() => void | Promise<void>)[] = [];
  readonly #leave = Promise.withResolvers<void>();
  readonly #settle: { readonly resolve: () => void; readonly reject: (error: unknown) => void };
  #state: RoleState = "starting";
  #failure: { readonly error: unknown } | undefined;
  #draining: Promise<void> | undefined;
  #stopping: Promise<void> | undefined;

  constructor(options: RoleLifecycleOptions) {
    this.#options = options;
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    this.done = promise;
    this.#settle = { resolve, reject };
    // A role that fails while nobody looks yet must not end the process; `done` still rejects for who asks.
    promise.catch(() => undefined);
  }

  get state(): RoleState {
    return this.#state;
  }

  /** Runs when the role stops; at once if it already did, so that a start under way leaks nothing. */
  defer(name: string, run: () => void | Promise<void>): void {
    if (this.#state === "stopped") void this.#runStep({ name, run });
    else this.#cleanups.push({ name, run });
  }

  /** Runs at the beginning of a drain, in the order given: unregister, then wait for what runs. */
  onDrain(run: () => void | Promise<void>): void {
    this.#drains.push(run);
  }

  /** The role serves now. From here on an abort of `signal` stops it. */
  ready(signal?: AbortSignal): void {
    if (this.#state !== "starting") return;
    this.#state = "ready";
    if (signal === undefined) return;
    const stop = (): void => void this.stop();
    if (signal.aborted) return stop();
    signal.addEventListener("abort", stop, { once: true });
    this.#cleanups.unshift({ name: "signal", run: () => signal.removeEventListener("abort", stop) });
  }

  /** The role cannot go on: stops it and rejects `done` with the error. */
  fail(error: unknown): void {
    if (this.#failure !== undefined || this.#stopping !== undefined) return;
    this.#failure = { error };
    void this.stop();
  }

  /** Unregister, finish what runs within `timeoutMs`, then stop. Idempotent: the first call's time counts; a `stop` ends the wait. */
  drain(timeoutMs: number): Promise<void> {
    this.#draining ??= this.#drain(timeoutMs);
    return this.#draining;
  }

  async #drain(timeoutMs: number): Promise<void> {
    if (this.#stopping === undefined) {
      this.#state = "draining";
      const drains = this.#within(timeoutMs, "drain", async () => {
        for (const run of this.#drains) await run();
      });
      await Promise.race([drains, this.#leave.promise]);
    }
    await this.stop();
  }

  /** Runs the cleanups now. Idempotent; resolves after the last. Never rejects. */
  stop(): Promise<void> {
    this.#stopping ??= this.#stop();
    return this.#stopping;
  }

  async #stop(): Promise<void> {
    this.#state = "draining";
    this.#leave.resolve();
    // Not in the caller's stack: a cleanup may call `stop`, which then must find the promise.
    await Promise.resolve();
    for (let step = this.#cleanups.pop(); step !== undefined; step = this.#cleanups.pop()) await this.#runStep(step);
    this.#state = "stopped";
    if (this.#failure === undefined) this.#settle.resolve();
    else this.#settle.reject(this.#failure.error);
  }

  #runStep({ name, run }: Step): Promise<void> {
    return this.#within(this.#options.cleanupTimeoutMs ?? 5_000, name, run);
  }

  /** Waits for `run`, but no longer. A throw and a timeout are logged; never rejects. */
  async #within(timeoutMs: number, name: string, run: () => void | Promise<void>): Promise<void> {
    const { clock, logger } = this.#options;
    const timeout = Promise.withResolvers<void>();
    const timer = clock.setTimer(timeoutMs, () => {
      logger.warn({ step: name, timeoutMs }, "shutdown step ran out of time; going on without it");
      timeout.resolve();
    });
    const finished = Promise.resolve()
      .then(run)
      .catch((error: unknown) => logger.error({ err: error, step: name }, "shutdown step failed"))
      .finally(() => timer.cancel());
    await Promise.race([finished, timeout.promise]);
  }

  /** What the role's start function gives back. */
  role(): RunningRole {
    return { done: this.done, drain: (timeoutMs) => this.drain(timeoutMs), stop: () => this.stop() };
  }
}
