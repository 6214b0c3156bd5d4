import assert from "node:assert/strict";
import { test } from "node:test";
import { ServiceRate } from "./service-rate.ts";

const LIMITS = { minMs: 10, maxMs: 60_000 };

test("service rate: the mean follows departures of a full server, and forgets the time when it was not full", () => {
  const rate = new ServiceRate(LIMITS);
  let nowMs = 0;
  for (let i = 0; i < 100; i++) rate.departed((nowMs += 200), true);
  assert.equal(Math.round(rate.meanIntervalMs), 200);
  rate.departed((nowMs += 3_600_000), false);
  rate.departed((nowMs += 1_000_000), true);
  rate.departed((nowMs += 200), true);
  assert.equal(Math.round(rate.meanIntervalMs), 200);
});

test("service rate: each who is refused gets a moment of its own, and moments that passed are not counted again", () => {
  const rate = new ServiceRate(LIMITS);
  rate.departed(0, true);
  rate.departed(100, true);
  assert.deepEqual(
    [1, 2, 3].map(() => rate.retryAfterMs(100)),
    [100, 200, 300],
  );
  rate.departed(200, true);
  assert.equal(rate.retryAfterMs(250), 250, "the fourth moment is at 500");
  rate.departed(1_000, false);
  assert.equal(rate.retryAfterMs(1_000), 100, "all of them are over");
});

test("service rate: bursts count as what they are, measured from the moment the server was full", () => {
  const rate = new ServiceRate(LIMITS);
  assert.equal(rate.retryAfterMs(0), 1_000, "nothing is known yet");
  for (let i = 0; i < 10; i++) rate.departed(100, true);
  assert.ok(Math.abs(rate.meanIntervalMs - 10) < 2, `${rate.meanIntervalMs}`);
  for (let round = 2; round < 20; round++) for (let i = 0; i < 10; i++) rate.departed(round * 100, true);
  assert.ok(Math.abs(rate.meanIntervalMs - 10) < 2, `${rate.meanIntervalMs}`);
});

test("service rate: at a standstill it grows with the silence, and never above the most", () => {
  const rate = new ServiceRate(LIMITS);
  rate.departed(0, true);
  rate.departed(100, true);
  assert.equal(rate.retryAfterMs(5_100), 5_000);
  for (let i = 0; i < 1_000; i++) rate.retryAfterMs(5_100);
  assert.equal(rate.retryAfterMs(5_100), 60_000);
  rate.departed(5_200, false);
  assert.ok(rate.retryAfterMs(70_000) <= 110, "the line is not longer than the most that anybody was told");
});
