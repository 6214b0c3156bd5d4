import assert from "node:assert/strict";
import type { EventPlane } from "./base.ts";
import { eventPlaneBattery } from "./event-plane.battery.ts";
import { MapDirectory } from "./map-directory.ts";
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
