import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { ManualClock } from "../../std/index.ts";
import { ChangeRecorder, discoveryBattery, rejectsWith } from "./discovery.battery.ts";
import { MemoryDiscovery, MemoryStore } from "./memory.ts";

discoveryBattery(
  "memory",
  () => {
    const store = new MemoryStore();
    return Promise.resolve({
      open: () => Promise.resolve(new MemoryDiscovery({ store })),
      cleanup: () => Promise.resolve(),
    });
  },
  { historyCount: 300 },
);

describe("memory discovery", () => {
  it("an abandoned client's keys vanish when its lease expires, not before", async () => {
    const [store, clock] = [new MemoryStore(), new ManualClock()];
    const [victim, watcher] = [new MemoryDiscovery({ store, clock }), new MemoryDiscovery({ store, clock })];
    const lease = await victim.openLease({ ttlMs: 10_000 });
    await lease.put("v1/a", 1);
    const [seen, silenced] = [new ChangeRecorder(), new ChangeRecorder()];
    await watcher.watch("", seen.listener);
    await victim.watch("", silenced.listener);
    victim.abandon();
    clock.advance(9_999);
    assert.equal((await watcher.list("")).length, 1);
    clock.advance(1);
    await lease.lost;
    await seen.becomes({});
    assert.deepEqual([...seen.expired], ["v1/a"]);
    assert.deepEqual(silenced.values, { "v1/a": 1 });
    assert.equal(clock.pendingTimerCount, 0);
  });

  it("a revoked lease is lost to its holder, and its keys are gone", async () => {
    const store = new MemoryStore();
    const discovery = new MemoryDiscovery({ store });
    const lease = await discovery.openLease();
    await lease.put("v1/a", 1);
    const seen = new ChangeRecorder();
    await discovery.watch("", seen.listener);
    assert.equal(store.revoke(lease.id), true);
    await lease.lost;
    await seen.becomes({});
    assert.equal(seen.expired.size, 0);
    assert.equal(store.revoke(lease.id), false);
    assert.deepEqual(await discovery.list(""), []);
    await assert.rejects(lease.put("v1/a", 1), rejectsWith("lease-lost"));
  });

  it("in a store with a clock a lease lives as long as its holder renews it", async () => {
    const [world, holders] = [new ManualClock(), new ManualClock()];
    const store = new MemoryStore({ clock: world });
    const discovery = new MemoryDiscovery({ store, clock: holders, ttlMs: 1_000 });
    const lease = await discovery.openLease();
    await lease.put("v1/a", 1);
    for (let i = 0; i < 20; i++) {
      world.advance(250);
      holders.advance(250);
    }
    assert.equal(store.entries.size, 1);
    // Its process stands still: others see it go, and it learns of that when it goes on.
    world.advance(1_000);
    assert.equal(store.entries.size, 0);
    await assert.rejects(lease.put("v1/a", 1), rejectsWith("lease-lost"));
    holders.advance(250);
    await lease.lost;
    await discovery.close();
    assert.equal(world.pendingTimerCount + holders.pendingTimerCount, 0);
  });

  it("a holder out of reach keeps what it was told, and is told the difference when it is back", async () => {
    const clock = new ManualClock();
    const store = new MemoryStore({ clock });
    const [far, near] = [new MemoryDiscovery({ store, clock }), new MemoryDiscovery({ store, clock })];
    const seen = new ChangeRecorder();
    await far.watch("", seen.listener);
    const [gone, stays] = [await near.openLease(), await near.openLease()];
    await gone.put("v1/a", 1);
    await stays.put("v1/b", 1);
    await seen.becomes({ "v1/a": 1, "v1/b": 1 });
    far.isReachable = false;
    assert.equal(far.health().healthy, false);
    await assert.rejects(far.list(""), rejectsWith("discovery-unavailable"));
    await assert.rejects(far.openLease(), rejectsWith("discovery-unavailable"));
    await gone.close();
    await stays.put("v1/b", 2);
    await stays.put("v1/c", 3);
    await new Promise<void>((resolve) => clock.nextTurn(resolve));
    assert.deepEqual(seen.values, { "v1/a": 1, "v1/b": 1 });
    far.isReachable = true;
    await seen.becomes({ "v1/b": 2, "v1/c": 3 });
    await Promise.all([far.close(), near.close()]);
  });

  it("what came and went while a holder was out of reach, and was not told yet, is not told as there", async () => {
    const store = new MemoryStore();
    const later: (() => void)[] = [];
    const [far, near] = [
      new MemoryDiscovery({ store, schedule: (run) => later.push(run) }),
      new MemoryDiscovery({ store }),
    ];
    const seen = new ChangeRecorder();
    await far.watch("", seen.listener);
    const lease = await near.openLease();
    // Heard of, and the process stands still before it can look.
    await lease.put("v1/a", 1);
    far.isReachable = false;
    await lease.close();
    far.isReachable = true;
    for (const run of later.splice(0)) run();
    assert.deepEqual(seen.values, {});
    await Promise.all([far.close(), near.close()]);
  });

  it("a holder out of reach for longer than its lease loses it; a shorter time harms nothing", async () => {
    const clock = new ManualClock();
    const store = new MemoryStore({ clock });
    const discovery = new MemoryDiscovery({ store, clock, ttlMs: 1_000 });
    const lease = await discovery.openLease();
    await lease.put("v1/a", 1);
    discovery.isReachable = false;
    clock.advance(700);
    discovery.isReachable = true;
    clock.advance(5_000);
    assert.equal(store.entries.size, 1);
    discovery.isReachable = false;
    clock.advance(1_500);
    await lease.lost;
    assert.equal(store.entries.size, 0);
    await discovery.close();
  });

  it("a lease that nobody renews is told as expired, also to who could not read when it went", async () => {
    const clock = new ManualClock();
    const store = new MemoryStore({ clock });
    const [holder, reader, cutOff] = Array.from(
      { length: 3 },
      () => new MemoryDiscovery({ store, clock, ttlMs: 1_000 }),
    );
    const lease = await holder!.openLease();
    await lease.put("v1/a", 1);
    await lease.put("v1/b", 2);
    const [seen, late] = [new ChangeRecorder(), new ChangeRecorder()];
    await reader!.watch("", seen.listener);
    await cutOff!.watch("", late.listener);
    await lease.delete("v1/b");
    await late.becomes({ "v1/a": 1 });
    assert.equal(late.expired.size, 0);
    cutOff!.isReachable = false;
    holder!.isReachable = false;
    clock.advance(1_500);
    await seen.becomes({});
    assert.deepEqual([...seen.expired], ["v1/a"]);
    cutOff!.isReachable = true;
    await late.becomes({});
    assert.deepEqual([...late.expired], ["v1/a"]);
  });

  it("a listener that throws does not silence the others", async () => {
    const discovery = new MemoryDiscovery();
    const seen = new ChangeRecorder();
    await discovery.watch("", () => {
      throw new Error("from the listener");
    });
    await discovery.watch("", seen.listener);
    const lease = await discovery.openLease();
    await lease.put("v1/a", 1);
    await seen.becomes({ "v1/a": 1 });
  });

  it("a full store refuses further keys and takes changes of those it has", async () => {
    const discovery = new MemoryDiscovery();
    const lease = await discovery.openLease();
    for (let i = 0; i < 65_536; i++) await lease.put(`v1/${i}`, 0);
    await assert.rejects(lease.put("v1/more", 0), rejectsWith("discovery-unavailable"));
    await lease.put("v1/7", 1);
    assert.equal((await discovery.list("v1/")).length, 65_536);
  });
});
