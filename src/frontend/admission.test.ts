import assert from "node:assert/strict";
import { test } from "node:test";
import { DynamoError } from "../errors/index.ts";
import { GaugeChild } from "../observability/index.ts";
import { ManualClock } from "../std/index.ts";
import { AdmissionGate } from "./admission.ts";

const ignore = (): void => undefined;

function aGate(limit: number, queueLimit: number): { gate: AdmissionGate; clock: ManualClock; queued: GaugeChild } {
  const clock = new ManualClock();
  const queued = new GaugeChild();
  return { gate: new AdmissionGate({ limit, queueLimit, clock, queuedGauge: queued }), clock, queued };
}

test("admission: places are given in order of arrival and a released place goes to the longest waiting", async () => {
  const { gate, queued } = aGate(1, 2);
  const first = gate.tryEnter()!;
  assert.equal(gate.tryEnter(), undefined);
  const order: string[] = [];
  const second = gate.enter(ignore).then((permit) => (order.push("second"), permit));
  const third = gate.enter(ignore).then((permit) => (order.push("third"), permit));
  assert.equal(queued.value, 2);
  first.release();
  first.release();
  (await second).release();
  (await third).release();
  assert.deepEqual(order, ["second", "third"]);
  assert.equal(gate.activeCount, 0);
  assert.equal(queued.value, 0);
});

test("admission: a full queue is an error at once, with a time after which to retry that follows the pace of releases", async () => {
  const { gate, clock } = aGate(1, 1);
  let permit = gate.tryEnter()!;
  for (let i = 0; i < 100; i++) {
    clock.advance(5_000);
    permit.release();
    permit = gate.tryEnter()!;
  }
  const waiting = gate.enter(ignore);
  assert.throws(
    () => void gate.enter(ignore),
    (error) =>
      error instanceof DynamoError &&
      error.reason === "too-many-requests" &&
      Math.abs(error.retryAfterMs! - 5_000) < 100,
  );
  permit.release();
  (await waiting).release();
});

test("admission: who leaves the queue takes no place, and leaving twice or after being let in does nothing", async () => {
  const { gate } = aGate(1, 2);
  const first = gate.tryEnter()!;
  let leave = ignore;
  const left = gate.enter((fn) => (leave = fn));
  let leaveLater = ignore;
  const stays = gate.enter((fn) => (leaveLater = fn));
  leave();
  leave();
  await assert.rejects(left, /left while its request waited/);
  first.release();
  const permit = await stays;
  leaveLater();
  assert.equal(gate.activeCount, 1);
  permit.release();
  assert.equal(gate.activeCount, 0);
});
