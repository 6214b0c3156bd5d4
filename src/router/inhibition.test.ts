import assert from "node:assert/strict";
import { test } from "node:test";
import { REASONS } from "../errors/index.ts";
import { INHIBITION_MS, Inhibition, isWorkerFault } from "./inhibition.ts";

test("inhibition: twice as long for each failure in a row, up to a minute, and from the start after a success", () => {
  const inhibition = new Inhibition();
  let nowMs = 1_000;
  const pauses: number[] = [];
  for (let i = 0; i < 6; i++) {
    assert.equal(inhibition.fail(nowMs), true);
    pauses.push(inhibition.untilMs - nowMs);
    nowMs = inhibition.untilMs;
  }
  assert.deepEqual(pauses, [5_000, 10_000, 20_000, 40_000, 60_000, 60_000]);
  inhibition.succeed();
  inhibition.fail(nowMs);
  assert.equal(inhibition.untilMs - nowMs, INHIBITION_MS);
});

test("inhibition: many streams that lose one worker are one failure", () => {
  const inhibition = new Inhibition();
  for (let i = 0; i < 100; i++) inhibition.fail(i);
  assert.equal(inhibition.untilMs, INHIBITION_MS);
});

test("inhibition: push-back, the engine's failures and the request's own errors are nobody's fault", () => {
  const faults = Object.keys(REASONS).filter(isWorkerFault);
  assert.deepEqual(new Set(faults), new Set([
    "worker-lost", "worker-unreachable", "worker-stalled", "connect-timeout", "engine-stopped", "draining", "endpoint-not-found",
  ])); // prettier-ignore
});
