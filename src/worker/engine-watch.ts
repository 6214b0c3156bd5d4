import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Clock, TimerHandle } from "../std/index.ts";

/**
 * Whether the engine still computes, as the worker itself sees it. It has work and made no step for `stallMs`: it hangs.
 * It had none for `idleMs`: a canary asks it for one token, which must come within `stallMs`. Either failure is told once,
 * and ends the watch.
 *
 * Looks four times per `stallMs`; a look costs one reading of the load. A process that was itself frozen must not blame its
 * engine: however long the pause, a look counts as one.
 */
export interface EngineWatchOptions {
  readonly engine: Pick<Engine, "load">;
  readonly clock: Clock;
  /** 0 = no watch. */
  readonly stallMs: number;
  readonly idleMs: number;
  /** Resolves when a whole answer came within `timeoutMs`. */
  readonly canary: (timeoutMs: number) => Promise<void>;
  readonly onStuck: (error: DynamoError) => void;
}

const LOOKS = 4;
/** What a canary may end with and the engine be well: it is busy or leaving. */
const NO_FAULT = new Set(["worker-full", "draining", "cancelled"]);

/** Returns its stop. */
export function watchEngine({ engine, clock, stallMs, idleMs, canary, onStuck }: EngineWatchOptions): () => void {
  if (stallMs === 0) return () => undefined;
  let steps = engine.load().steps;
  let movedMs = clock.monotonicMs();
  let misses = 0;
  let isAsking = false;
  let isOver = false;
  let timer: TimerHandle;

  const stuck = (error: DynamoError): void => {
    if (isOver) return;
    isOver = true;
    timer.cancel();
    onStuck(error);
  };

  const ask = async (): Promise<void> => {
    isAsking = true;
    try {
      await canary(stallMs);
    } catch (thrown) {
      const cause = toDynamoError(thrown);
      if (NO_FAULT.has(cause.reason)) return;
      const { reason, diagnostic } = cause;
      stuck(
        new DynamoError("engine-stopped", "the idle engine did not answer", {
          diagnostic: `canary: ${reason} ${diagnostic ?? cause.publicMessage}`,
          cause,
        }),
      );
    } finally {
      isAsking = false;
      movedMs = clock.monotonicMs();
    }
  };

  const look = (): void => {
    timer = clock.setTimer(stallMs / LOOKS, look);
    const load = engine.load();
    const requests = load.runningRequests + load.waitingRequests;
    const nowMs = clock.monotonicMs();
    const hasMoved = load.steps !== steps;
    if (hasMoved) {
      steps = load.steps;
      movedMs = nowMs;
    }
    misses = requests > 0 && !hasMoved ? misses + 1 : 0;
    if (misses >= LOOKS) {
      const diagnostic = `${requests} requests, ${steps} steps so far, none for ${Math.round(nowMs - movedMs)} ms`;
      stuck(new DynamoError("engine-stopped", "the engine hangs: it has work and computes nothing", { diagnostic }));
    } else if (requests === 0 && !isAsking && nowMs - movedMs >= idleMs) void ask();
  };

  timer = clock.setTimer(stallMs / LOOKS, look);
  return () => {
    isOver = true;
    timer.cancel();
  };
}
