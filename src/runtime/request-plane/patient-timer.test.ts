import assert from "node:assert/strict";
import { test } from "node:test";
import type { Clock } from "../../std/index.ts";
import { setPatientTimer } from "./patient-timer.ts";

/** A loop that can stand still: time goes on, and afterwards timers that came due run before anything else does. */
class Loop {
  nowMs = 0;
  #timers: { dueMs: number; run: () => void }[] = [];
  #turns: (() => void)[] = [];
  readonly clock: Clock = {
    monotonicMs: () => this.nowMs,
    wallMs: () => this.nowMs,
    setTimer: (delayMs, run) => {
      const timer = { dueMs: this.nowMs + delayMs, run };
      this.#timers.push(timer);
      return { cancel: () => void (this.#timers = this.#timers.filter((each) => each !== timer)) };
    },
    nextTurn: (run) => void this.#turns.push(run),
  };

  /** One turn after so long: due timers, then what the sockets brought, then what was put off to this turn's end. */
  turn(afterMs: number, sockets: () => void = () => undefined): void {
    this.nowMs += afterMs;
    const due = this.#timers.filter(({ dueMs }) => dueMs <= this.nowMs);
    this.#timers = this.#timers.filter(({ dueMs }) => dueMs > this.nowMs);
    for (const { run } of due) run();
    sockets();
    for (const run of this.#turns.splice(0)) run();
  }

  get timerCount(): number {
    return this.#timers.length;
  }
}

test("patient timer: runs once after its time", () => {
  const loop = new Loop();
  const ran: number[] = [];
  setPatientTimer(loop.clock, 100, () => ran.push(loop.nowMs));
  for (let i = 0; i < 40; i++) loop.turn(5);
  assert.deepEqual(ran, [100]);
  assert.equal(loop.timerCount, 0);
});

test("patient timer: a pause of this process, at any point and however long, does not use the time up", () => {
  for (let at = 0; at < 70; at += 5) {
    const loop = new Loop();
    setPatientTimer(loop.clock, 100, () => assert.fail(`a pause at ${at} ms`));
    for (let i = 0; i < at; i += 5) loop.turn(5);
    loop.turn(60_000);
    assert.equal(loop.timerCount, 1);
  }
});

test("patient timer: a word of the peer that lay there when the last step came cancels it", () => {
  const loop = new Loop();
  const timer = setPatientTimer(loop.clock, 100, () => assert.fail("the peer had answered"));
  for (let i = 0; i < 19; i++) loop.turn(5);
  loop.turn(60_000, () => timer.cancel());
  loop.turn(60_000);
  assert.equal(loop.timerCount, 0);
});
