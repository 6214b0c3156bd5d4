import assert from "node:assert/strict";
import test from "node:test";
import type { EventPlane } from "./base.ts";
import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { eventPlaneBattery } from "./event-plane.battery.ts";
import { MapDirectory } from "./map-directory.ts";
import { newStatistics } from "./statistics.ts";
import { ZmqPublishers } from "./zmq-publishers.ts";
import { ZmqEventPlane } from "./zmq.ts";

eventPlaneBattery("zmq event plane", () => {
  const directory = new MapDirectory();
  const planes: EventPlane[] = [];
  return {
    open() {
      const plane = new ZmqEventPlane({ directory });
      planes.push(plane);
      return plane;
    },
    async close() {
      await Promise.all(planes.map((plane) => plane.close()));
      assert.equal(directory.listenerCount, 0, "a directory watch is left open");
    },
  };
});

// Of the soak: small events were pieces of node's buffer pool, and a full ring of them held 64 MiB.
test("zmq publishers: what is kept for replay takes as much memory as the events have bytes", async () => {
  const publishers = await ZmqPublishers.open({
    host: "127.0.0.1",
    advertisedHost: "127.0.0.1",
    queueEvents: 100,
    context: { clock: systemClock, logger: silentLogger, statistics: newStatistics() },
  });
  try {
    const ring = publishers.add("load", "00000000000000aa", 8);
    for (const length of [0, 1, 100, 5_000]) publishers.publish(ring, Buffer.alloc(length, length));
    const { payloads } = ring.events.page(1, 8, 8, 1e6);
    assert.deepEqual(payloads.map(({ buffer }) => buffer.byteLength), [0, 1, 100, 5_000]); // prettier-ignore
    assert.deepEqual(payloads[2], Buffer.alloc(100, 100));
  } finally {
    publishers.close();
  }
});
