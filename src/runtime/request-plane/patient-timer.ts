import type { Clock, TimerHandle } from "../../std/index.ts";

/**
 * A limit on how long a peer may take, that this process's own pauses do not use up: stopped for a while (SIGSTOP, a
 * suspended machine), it finds its timers due before it has read what the peer sent long ago, and timers it sets at once
 * may count from before the pause. So the time passes in steps, a pause is two of them at most, and the end is judged in
 * the turn after the last, when the sockets have been read.
 */
const STEPS = 4;

/** Calls `run` once, `delayMs` from now or later; not after `cancel`. */
export function setPatientTimer(clock: Clock, delayMs: number, run: () => void): TimerHandle {
  let isCancelled = false;
  let timer: TimerHandle;
  const wait = (stepsLeft: number): void => {
    timer = clock.setTimer(delayMs / STEPS, () => {
      if (stepsLeft > 1) wait(stepsLeft - 1);
      else
        clock.nextTurn(() => {
          if (!isCancelled) run();
        });
    });
  };
  wait(STEPS);
  return {
    cancel: () => {
      isCancelled = true;
      timer.cancel();
    },
  };
}
