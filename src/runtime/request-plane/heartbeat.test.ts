import assert from "node:assert/strict";
import { test } from "node:test";
import { ManualClock } from "../../std/index.ts";
import { Heartbeat } from "./heartbeat.ts";

const BEAT_MS = 1_000;

interface Watched {
  lastReceivedMs: number;
  readonly pingsMs: number[];
  readonly frozenMs: number[];
}

/** A heartbeat that watches one connection; `turn` lets the loop go round. */
function aHeartbeat(): {
  clock: ManualClock;
  watched: Watched;
  advance: (ms: number) => Promise<void>;
  stop: () => void;
} {
  const clock = new ManualClock();
  clock.advance(5_000);
  const heartbeat = new Heartbeat({ clock, beatMs: BEAT_MS, misses: 3 });
  const watched: Watched = { lastReceivedMs: clock.monotonicMs(), pingsMs: [], frozenMs: [] };
  const connection = {
    get lastReceivedMs(): number {
      return watched.lastReceivedMs;
    },
    ping: (): void => void watched.pingsMs.push(clock.monotonicMs()),
    frozen: (): void => {
      watched.frozenMs.push(clock.monotonicMs());
      heartbeat.delete(connection);
    },
  };
  heartbeat.add(connection);
  const advance = async (ms: number): Promise<void> => {
    for (let left = ms; left > 0; left -= 50) {
      clock.advance(Math.min(50, left));
      await new Promise((resolve) => setImmediate(resolve));
    }
  };
  return { clock, watched, advance, stop: () => heartbeat.delete(connection) };
}

test("heartbeat: a silent peer is asked every beat and dropped at the third", async () => {
  const { clock, watched, advance } = aHeartbeat();
  const silentSinceMs = watched.lastReceivedMs;
  await advance(3_300);
  assert.equal(watched.pingsMs.length, 2);
  assert.equal(watched.frozenMs.length, 1);
  const tookMs = watched.frozenMs[0]! - silentSinceMs;
  assert.ok(tookMs >= 3 * BEAT_MS && tookMs <= 3.25 * BEAT_MS + 50, `dropped after ${tookMs} ms`);
  assert.equal(clock.pendingTimerCount, 0, "a heartbeat without connections keeps no timer");
});

test("heartbeat: a peer that speaks is not asked, one that answers is not dropped", async () => {
  const { clock, watched, advance, stop } = aHeartbeat();
  for (let i = 0; i < 10; i++) {
    watched.lastReceivedMs = clock.monotonicMs();
    await advance(700);
  }
  assert.equal(watched.pingsMs.length, 0);
  for (let i = 0; i < 5; i++) {
    watched.lastReceivedMs = clock.monotonicMs();
    await advance(2_600);
  }
  assert.equal(watched.frozenMs.length, 0);
  stop();
});

test("heartbeat: a process that was itself stopped asks its peers before it drops them", async () => {
  const { clock, watched, advance, stop } = aHeartbeat();
  await advance(100);
  // One step without a turn of the loop: everything stood still, the peer too.
  clock.advance(60_000);
  await advance(300);
  assert.equal(watched.frozenMs.length, 0);
  assert.ok(watched.pingsMs.length >= 1);
  watched.lastReceivedMs = clock.monotonicMs();
  await advance(900);
  assert.equal(watched.frozenMs.length, 0);
  stop();
  assert.equal(clock.pendingTimerCount, 0);
});
