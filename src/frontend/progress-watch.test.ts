import assert from "node:assert/strict";
import { test } from "node:test";
import type { DynamoError } from "../errors/index.ts";
import { ManualClock } from "../std/index.ts";
import { ProgressWatch, type WatchedStream, type WorkerProgress } from "./progress-watch.ts";

class FakeStream implements WatchedStream {
  readonly stalls: DynamoError[] = [];
  readonly #watch: ProgressWatch;
  readonly #worker: string;
  isExpecting: boolean;
  readonly progress: WorkerProgress;

  constructor(watch: ProgressWatch, worker: string, isExpecting = true) {
    this.#watch = watch;
    this.#worker = worker;
    this.isExpecting = isExpecting;
    this.progress = watch.enter(worker, this);
  }

  onStalled(error: DynamoError): void {
    this.stalls.push(error);
    this.leave();
  }

  leave(): void {
    this.#watch.leave(this.#worker, this);
  }
}

function aWatch(limitMs = 1_000): { clock: ManualClock; watch: ProgressWatch } {
  const clock = new ManualClock();
  return { clock, watch: new ProgressWatch({ clock, limitMs }) };
}

test("progress watch: a silent worker's streams are told after the limit, all of them, and no other worker's", () => {
  const { clock, watch } = aWatch();
  const silent = [new FakeStream(watch, "a"), new FakeStream(watch, "a"), new FakeStream(watch, "a", false)];
  const lively = new FakeStream(watch, "b");
  for (let i = 0; i < 3; i++) {
    lively.progress.items++;
    clock.advance(250);
  }
  assert.ok(silent.every(({ stalls }) => stalls.length === 0));
  lively.progress.items++;
  clock.advance(250);
  assert.deepEqual(
    silent.map(({ stalls }) => stalls.map(({ reason }) => reason)),
    [["worker-stalled"], ["worker-stalled"], ["worker-stalled"]],
  );
  assert.equal(lively.stalls.length, 0);
  assert.equal(watch.streamCount, 1);
  watch.close();
  assert.equal(clock.pendingTimerCount, 0);
});

test("progress watch: one stream's tokens speak for the whole worker", () => {
  const { clock, watch } = aWatch();
  const [one, other] = [new FakeStream(watch, "a"), new FakeStream(watch, "a")];
  for (let i = 0; i < 40; i++) {
    if (i % 3 === 0) one.progress.items++;
    clock.advance(250);
  }
  assert.equal(one.stalls.length + other.stalls.length, 0);
  watch.close();
});

test("progress watch: streams that wait for a first token, or whose client does not read, prove nothing", () => {
  const { clock, watch } = aWatch();
  const stream = new FakeStream(watch, "a", false);
  clock.advance(20_000);
  assert.equal(stream.stalls.length, 0);
  stream.isExpecting = true;
  clock.advance(500);
  stream.isExpecting = false;
  clock.advance(20_000);
  assert.equal(stream.stalls.length, 0);
  watch.close();
});

test("progress watch: an idle model has no timer, and 0 is no watch", () => {
  const { clock, watch } = aWatch();
  new FakeStream(watch, "a").leave();
  clock.advance(250);
  assert.equal(clock.pendingTimerCount, 0);
  const off = new ProgressWatch({ clock, limitMs: 0 });
  const stream = new FakeStream(off, "a");
  assert.equal(clock.pendingTimerCount, 0);
  assert.equal(stream.stalls.length, 0);
});

test("progress watch: a worker whose reports show steps is not stuck though its streams here get nothing; then it hangs", () => {
  const { clock, watch } = aWatch();
  const starved = new FakeStream(watch, "a");
  for (let i = 0; i < 40; i++) {
    watch.reported("a", 10);
    clock.advance(250);
  }
  assert.equal(starved.stalls.length, 0);
  // What was told before it hung comes late, out of a replay; what it says next corrects it.
  watch.reported("a", 0);
  watch.reported("a", 600);
  clock.advance(250);
  assert.equal(starved.stalls.length, 1);
  watch.reported("a", 0);
  watch.close();
});

test("progress watch: the last report before an engine hangs does not put its streams off", () => {
  const { clock, watch } = aWatch();
  const stream = new FakeStream(watch, "a");
  stream.progress.items++;
  clock.advance(250);
  watch.reported("a", 0);
  clock.advance(750);
  assert.equal(stream.stalls.length, 0);
  clock.advance(250);
  assert.equal(stream.stalls.length, 1);
  watch.close();
});
