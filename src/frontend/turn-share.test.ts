import assert from "node:assert/strict";
import { test } from "node:test";
import type { Clock } from "../std/index.ts";
import { TurnShare, type Steps } from "./turn-share.ts";

/** A clock whose time passes only by `work`, and whose turns come when told. */
class TurnClock implements Clock {
  nowMs = 0;
  #due: (() => void)[] = [];
  monotonicMs = (): number => this.nowMs;
  wallMs = (): number => this.nowMs;
  setTimer(): never {
    throw new Error("no timers here");
  }
  nextTurn(run: () => void): void {
    this.#due.push(run);
  }
  /** One turn of the loop; false when none is due. */
  turn(): boolean {
    const due = this.#due;
    this.#due = [];
    for (const run of due) run();
    return due.length > 0;
  }
}

/** `count` steps of `ms` each; tells the log which job each belongs to. */
function* work(clock: TurnClock, name: string, count: number, ms: number, log: string[]): Generator<void, void> {
  for (let step = 0; step < count; step++) {
    clock.nowMs += ms;
    log.push(name);
    yield;
  }
}

function start(share: TurnShare, steps: Steps, signal?: AbortSignal): Promise<void> {
  return share.tryFinish(steps) ? Promise.resolve() : share.finish(steps, signal);
}

test("turn share: all jobs together take one share of each turn", async () => {
  const clock = new TurnClock();
  const share = new TurnShare(clock);
  const log: string[] = [];
  const jobs = ["a", "b", "c", "d"].map((name) => start(share, work(clock, name, 30, 0.5, log)));
  assert.equal(log.length, 4, "the first got what was left of this turn, the others nothing");
  for (let done = log.length; clock.turn(); done = log.length)
    assert.ok(log.length - done <= 4, log.slice(done).join());
  await Promise.all(jobs);
  assert.equal(log.length, 120);
});

test("turn share: the first to come is the first to be done, but a huge job steps back", async () => {
  const clock = new TurnClock();
  const share = new TurnShare(clock);
  const log: string[] = [];
  const done: string[] = [];
  const all = [
    ["huge", 100],
    ["small", 6],
    ["smaller", 5],
  ].map(([name, steps]) =>
    start(share, work(clock, name as string, steps as number, 1, log)).then(() => done.push(name as string)),
  );
  while (clock.turn()) await Promise.resolve();
  await Promise.all(all);
  assert.deepEqual(done, ["small", "smaller", "huge"]);
  assert.ok(log.indexOf("small") < 12, log.slice(0, 20).join());
  assert.equal(log.lastIndexOf("small") - log.indexOf("small"), 5);
});

test("turn share: what a turn has left is used by whoever is next, and a new turn starts anew", () => {
  const clock = new TurnClock();
  const share = new TurnShare(clock);
  const log: string[] = [];
  assert.equal(share.tryFinish(work(clock, "a", 2, 0.5, log)), true);
  assert.equal(share.tryFinish(work(clock, "b", 1, 0.5, log)), true);
  assert.equal(share.tryFinish(work(clock, "c", 2, 0.5, log)), false);
  assert.ok(clock.turn());
  assert.equal(share.tryFinish(work(clock, "d", 2, 0.5, log)), true);
  assert.ok(clock.turn());
  assert.equal(clock.turn(), false, "nothing is due when nothing waits");
});

test("turn share: of those that wait for a turn one has it at a time", async () => {
  const clock = new TurnClock();
  const share = new TurnShare(clock);
  const log: string[] = [];
  const waiting = ["a", "b", "c"].map((name) => share.wait().then(() => log.push(name)));
  for (const expected of ["a", "ab", "abc"]) {
    clock.turn();
    await Promise.resolve();
    assert.equal(log.join(""), expected);
  }
  await Promise.all(waiting);
  assert.equal(clock.turn(), false);
});

test("turn share: a job that fails or whose signal aborts rejects, and the others go on", async () => {
  const clock = new TurnClock();
  const share = new TurnShare(clock);
  const log: string[] = [];
  const stop = new AbortController();
  const failing = (function* (): Generator<void, void> {
    yield;
    throw new Error("bad text");
  })();
  const first = start(share, work(clock, "a", 10, 1, log));
  const aborted = start(share, work(clock, "b", 10, 1, log), stop.signal);
  const failed = start(share, failing);
  const last = start(share, work(clock, "c", 10, 1, log));
  stop.abort(new Error("gone"));
  const rejections = Promise.all([assert.rejects(aborted, /gone/), assert.rejects(failed, /bad text/)]);
  while (clock.turn());
  await Promise.all([first, last, rejections]);
  assert.equal(log.includes("b"), false);
});
