import assert from "node:assert/strict";
import { test } from "node:test";
import { ManualClock } from "../../std/index.ts";
import { MemoryNetwork, MemoryRequestPlane } from "./memory.ts";
import { ENDPOINT, Served, assertReason, open, requestPlaneBattery, until } from "./request-plane.battery.ts";

requestPlaneBattery("memory", () => {
  const network = new MemoryNetwork();
  const planes: MemoryRequestPlane[] = [];
  return {
    plane: ({ limits = {}, address } = {}) => {
      const plane = new MemoryRequestPlane({ network, limits, ...(address === undefined ? {} : { address }) });
      planes.push(plane);
      return plane;
    },
    deadAddress: () => "memory://424242",
    close: async () => {
      await Promise.all(planes.map((plane) => plane.close()));
    },
  };
});

test("memory: under a manual clock and scheduler nothing moves by itself", async () => {
  const clock = new ManualClock();
  const turns: (() => void)[] = [];
  const network = new MemoryNetwork({ schedule: (run) => turns.push(run) });
  const runTurns = (): void => {
    for (let run = turns.shift(); run !== undefined; run = turns.shift()) run();
  };
  const plane = new MemoryRequestPlane({ network, clock });
  const server = await plane.listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const recorder = open(plane, server.address, { timeoutMs: 1_000 });
  const late = open(plane, server.address, { timeoutMs: 500 });
  assert.equal(served.streams.length, 0);
  runTurns();
  assert.equal(served.streams.length, 2);
  served.streams[0]!.write(Buffer.from("now"));
  server.flush();
  assert.equal(recorder.items.length, 0, "delivered inside flush");
  runTurns();
  assert.deepEqual(recorder.texts, ["now"]);
  clock.advance(499);
  assert.equal(late.endCount, 0);
  clock.advance(30);
  assertReason(late.end, "request-deadline");
  served.streams[0]!.end();
  runTurns();
  assert.equal(recorder.end, undefined);
  assert.equal(recorder.endCount, 1);
  const closed = plane.close();
  runTurns();
  await closed;
  assert.equal(clock.pendingTimerCount, 0);
});

test("memory: a killed server looks like a broken connection to its clients", async () => {
  const network = new MemoryNetwork();
  const plane = new MemoryRequestPlane({ network });
  const server = await plane.listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const recorder = open(plane, server.address);
  const stream = await served.stream();
  stream.write(Buffer.from("lost on the way"));
  network.kill(server.address);
  assertReason((await recorder.ended()).end, "worker-lost");
  await until(() => stream.ended, "the killed server's stream runs on");
  assertReason((await open(plane, server.address).ended()).end, "worker-unreachable");
  await plane.close();
});
