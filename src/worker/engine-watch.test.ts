import assert from "node:assert/strict";
import { test } from "node:test";
import { DynamoError, type Reason } from "../errors/index.ts";
import { EMPTY_LOAD } from "../protocol/index.ts";
import { ManualClock } from "../std/index.ts";
import { watchEngine } from "./engine-watch.ts";

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

function aWatch(canary: (timeoutMs: number) => Promise<void> = () => Promise.resolve()) {
  const clock = new ManualClock();
  const load = { ...EMPTY_LOAD };
  const stuck: DynamoError[] = [];
  const stop = watchEngine({
    engine: { load: () => ({ ...load }) },
    clock,
    stallMs: 1_000,
    idleMs: 5_000,
    canary,
    onStuck: (error) => stuck.push(error),
  });
  return { clock, load, stuck, stop };
}

test("engine watch: work without a step for the limit is told once, and not before", () => {
  const { clock, load, stuck } = aWatch();
  load.waitingRequests = 2;
  for (let i = 0; i < 20; i++) {
    load.steps++;
    clock.advance(250);
  }
  assert.equal(stuck.length, 0, "it steps");
  clock.advance(750);
  assert.equal(stuck.length, 0);
  clock.advance(250);
  assert.equal(stuck.length, 1);
  assert.equal(stuck[0]!.reason, "engine-stopped");
  clock.advance(60_000);
  assert.equal(stuck.length, 1);
  assert.equal(clock.pendingTimerCount, 0);
});

test("engine watch: an engine without work may rest, and a pause of the whole process counts as one look", () => {
  const { clock, load, stuck, stop } = aWatch();
  clock.advance(4_000);
  assert.equal(stuck.length, 0);
  load.runningRequests = 1;
  load.steps++;
  clock.advance(250);
  assert.equal(stuck.length, 0);
  stop();
  assert.equal(clock.pendingTimerCount, 0);
});

test("engine watch: a long idle one is asked now and then, with the limit as its time", async () => {
  const asked: number[] = [];
  const { clock, stuck, stop } = aWatch((timeoutMs) => {
    asked.push(timeoutMs);
    return Promise.resolve();
  });
  for (let i = 0; i < 45; i++) {
    clock.advance(250);
    await turn();
  }
  assert.deepEqual(asked, [1_000, 1_000], "after 5 s and after 10.25 s");
  assert.equal(stuck.length, 0);
  stop();
});

test("engine watch: a failed canary is told, one that met a full or leaving worker is not", async () => {
  for (const [reason, count] of [
    ["request-deadline", 1],
    ["engine-failed", 1],
    ["worker-full", 0],
    ["draining", 0],
  ] as [Reason, number][]) {
    const { clock, stuck, stop } = aWatch(() => Promise.reject(new DynamoError(reason, "no")));
    clock.advance(5_000);
    await turn();
    assert.equal(stuck.length, count, reason);
    stop();
  }
});
