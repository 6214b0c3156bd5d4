import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { createLogger, silentLogger } from "../../observability/index.ts";
import { ManualClock } from "../../std/index.ts";
import { RoleLifecycle } from "./role-lifecycle.ts";

function aLifecycle(): { lifecycle: RoleLifecycle; clock: ManualClock; ran: string[]; logged: string[] } {
  const clock = new ManualClock();
  const logged: string[] = [];
  const logger = createLogger({ level: "debug", format: "jsonl", write: (line) => logged.push(line) });
  return { lifecycle: new RoleLifecycle({ logger, clock }), clock, ran: [], logged };
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
const never = new Promise<void>(() => undefined);

describe("role lifecycle", () => {
  it("stop runs the cleanups once, last opened first, and then done resolves", async () => {
    const { lifecycle, ran, clock } = aLifecycle();
    lifecycle.defer("a", () => void ran.push("a"));
    lifecycle.defer("b", async () => {
      await turn();
      ran.push("b");
    });
    assert.equal(lifecycle.state, "starting");
    lifecycle.ready();
    assert.equal(lifecycle.state, "ready");
    await Promise.all([lifecycle.stop(), lifecycle.stop(), lifecycle.drain(1_000)]);
    await lifecycle.done;
    assert.deepEqual(ran, ["b", "a"]);
    assert.equal(lifecycle.state, "stopped");
    assert.equal(clock.pendingTimerCount, 0);
  });

  it("a drain unregisters and waits for what runs before it cleans up", async () => {
    const { lifecycle, ran } = aLifecycle();
    const running = Promise.withResolvers<void>();
    lifecycle.defer("server", () => void ran.push("closed"));
    lifecycle.onDrain(() => void ran.push("unregistered"));
    lifecycle.onDrain(async () => {
      await running.promise;
      ran.push("finished");
    });
    lifecycle.ready();
    const drained = lifecycle.role().drain(10_000);
    await turn();
    assert.equal(lifecycle.state, "draining");
    assert.deepEqual(ran, ["unregistered"]);
    running.resolve();
    await drained;
    assert.deepEqual(ran, ["unregistered", "finished", "closed"]);
  });

  it("a drain that runs out of time cleans up all the same and says so", async () => {
    const { lifecycle, ran, clock, logged } = aLifecycle();
    lifecycle.defer("server", () => void ran.push("closed"));
    lifecycle.onDrain(() => never);
    lifecycle.ready();
    const drained = lifecycle.drain(10_000);
    await turn();
    clock.advance(9_999);
    await turn();
    assert.deepEqual(ran, []);
    clock.advance(1);
    await drained;
    assert.deepEqual(ran, ["closed"]);
    assert.match(logged.join(""), /ran out of time/);
  });

  it("a stop ends the wait of a drain", async () => {
    const { lifecycle } = aLifecycle();
    lifecycle.onDrain(() => never);
    lifecycle.ready();
    const drained = lifecycle.drain(10_000);
    await turn();
    await lifecycle.stop();
    await drained;
    await lifecycle.done;
  });

  it("cleanups that throw or hang are logged and keep no other from running", async () => {
    const { lifecycle, ran, clock, logged } = aLifecycle();
    lifecycle.defer("last", () => void ran.push("last"));
    lifecycle.defer("throws", () => {
      throw new Error("broken");
    });
    lifecycle.defer("rejects", () => Promise.reject(new Error("broken too")));
    lifecycle.defer("hangs", () => never);
    lifecycle.ready();
    const stopped = lifecycle.stop();
    await turn();
    clock.advance(5_000);
    await stopped;
    await lifecycle.done;
    assert.deepEqual(ran, ["last"]);
    for (const name of ["throws", "rejects", "hangs"]) {
      assert.equal(logged.filter((line) => line.includes(`"step":"${name}"`)).length, 1, name);
    }
  });

  it("a failure cleans up first and then rejects done with the first error", async () => {
    const { lifecycle, ran } = aLifecycle();
    lifecycle.defer("server", () => void ran.push("closed"));
    lifecycle.ready();
    lifecycle.fail(new Error("first"));
    lifecycle.fail(new Error("second"));
    await assert.rejects(lifecycle.done, /first/);
    assert.deepEqual(ran, ["closed"]);
    lifecycle.fail(new Error("too late"));
    await lifecycle.stop();
    await lifecycle.drain(0);
  });

  it("a failure that nobody waits for does not end the process", async () => {
    const lifecycle = new RoleLifecycle({ logger: silentLogger, clock: new ManualClock() });
    lifecycle.fail(new Error("unseen"));
    await lifecycle.stop();
    await turn();
  });

  it("an abort of the signal stops a ready role, before or after it got ready", async () => {
    for (const early of [true, false]) {
      const { lifecycle } = aLifecycle();
      const abort = new AbortController();
      if (early) abort.abort();
      lifecycle.ready(abort.signal);
      abort.abort();
      await lifecycle.done;
      assert.equal(lifecycle.state, "stopped");
    }
  });

  it("what a start opens after the stop is closed at once", async () => {
    const { lifecycle, ran } = aLifecycle();
    await lifecycle.stop();
    lifecycle.ready();
    assert.equal(lifecycle.state, "stopped");
    lifecycle.defer("late", () => void ran.push("late"));
    await turn();
    assert.deepEqual(ran, ["late"]);
  });

  it("a cleanup may call stop without waiting for itself", async () => {
    const { lifecycle } = aLifecycle();
    lifecycle.defer("calls back", () => void lifecycle.stop());
    lifecycle.ready();
    await lifecycle.stop();
  });
});
