import assert from "node:assert/strict";
import { test } from "node:test";
import { ManualClock } from "../../std/index.ts";
import { TimedLink } from "./timed-link.ts";

async function settled(): Promise<void> {
  await new Promise((resolve) => setImmediate(resolve));
}

test("timed link: two that move at once share the bandwidth, one that comes later waits its part", async () => {
  const clock = new ManualClock();
  const link = new TimedLink(1_000_000, clock);
  const done: string[] = [];
  const move = (name: string, byteCount: number): void => void link.move(byteCount).then(() => done.push(name));
  move("a", 10_000);
  move("b", 20_000);
  clock.advance(19);
  await settled();
  assert.deepEqual(done, []);
  clock.advance(2);
  await settled();
  assert.deepEqual(done, ["a"], "10 kB at half of 1 MB/s");
  clock.advance(10);
  await settled();
  assert.deepEqual(done, ["a", "b"], "the rest alone");
  move("c", 1e9);
  link.stop();
  await settled();
  assert.deepEqual(done, ["a", "b", "c"]);
  await link.move(5);
});
