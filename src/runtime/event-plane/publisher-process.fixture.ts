import { MapDirectory } from "./map-directory.ts";
import { ZmqEventPlane } from "./zmq.ts";

/**
 * A publishing process for `zmq-faults.test.ts`: announces one publisher by message, publishes as many events as it is
 * told (`event <n>`), says which sequence it has reached, and ends with its parent.
 */
const [topic, publisherId, ringSize] = process.argv.slice(2) as [string, string, string];
const directory = new MapDirectory();
await directory.watch(topic, (change) => {
  if (change.type === "put") process.send!({ record: change.record });
});
const plane = new ZmqEventPlane({ directory });
const publisher = await plane.publish(topic, { publisherId, ringSize: Number(ringSize) });
process.on("disconnect", () => process.exit());
process.on("message", (count: number) => {
  let sequence = 0;
  for (let i = 0; i < count; i++) sequence = publisher.publish(Buffer.from(`${process.pid}`));
  process.send!({ sequence });
});
