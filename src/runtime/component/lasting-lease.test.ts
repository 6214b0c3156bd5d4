import assert from "node:assert/strict";
import { mkdtemp, rename, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { silentLogger } from "../../observability/index.ts";
import { ManualClock, SeededRandom, systemClock } from "../../std/index.ts";
import {
  DEFAULT_TTL_MS,
  FileDiscovery,
  MemoryDiscovery,
  MemoryStore,
  type Discovery,
  type DiscoveryChange,
  type Lease,
} from "../discovery/index.ts";
import { openLastingLease } from "./lasting-lease.ts";

const turns = async (): Promise<void> => {
  for (let i = 0; i < 10; i++) await new Promise((resolve) => setImmediate(resolve));
};

async function keysOf(discovery: MemoryDiscovery): Promise<string[]> {
  return (await discovery.list("")).map(({ key }) => key);
}

test("lasting lease: after it was revoked, all it holds is there again, and closing takes it away for good", async () => {
  const clock = new ManualClock();
  const store = new MemoryStore();
  const [mine, theirs] = [new MemoryDiscovery({ store, clock }), new MemoryDiscovery({ store, clock })];
  const lease = await openLastingLease(mine, { clock, logger: silentLogger, random: new SeededRandom(1) });
  await lease.put("v1/a", 1);
  await lease.put("v1/b", 2);
  await lease.delete("v1/b");
  for (let i = 0; i < 3; i++) {
    const { id } = lease;
    assert.equal(store.revoke(id), true);
    await turns();
    assert.notEqual(lease.id, id);
    assert.deepEqual(await keysOf(theirs), ["v1/a"]);
  }
  await lease.put("v1/c", 3);
  await lease.close();
  await lease.close();
  await turns();
  clock.advance(10_000);
  await turns();
  assert.deepEqual(await keysOf(theirs), []);
  await mine.close();
  await theirs.close();
});

test("lasting lease: what is put while it is lost comes with the next one", async () => {
  const clock = new ManualClock();
  const store = new MemoryStore();
  const mine = new MemoryDiscovery({ store, clock });
  let failures = 0;
  const flaky = {
    openLease: () => (failures-- > 0 ? Promise.reject(new Error("store is away")) : mine.openLease()),
  } as unknown as MemoryDiscovery;
  const lease = await openLastingLease(flaky, { clock, logger: silentLogger, random: new SeededRandom(1) });
  failures = 2;
  store.revoke(lease.id);
  await turns();
  await lease.put("v1/late", 1);
  assert.deepEqual(await keysOf(mine), []);
  for (let i = 0; i < 4; i++) {
    clock.advance(1_000);
    await turns();
  }
  assert.deepEqual(await keysOf(mine), ["v1/late"]);
  await lease.close();
  await mine.close();
});

const TTL_MS = 500;

async function aStore(t: TestContext) {
  const root = join(await mkdtemp(join(tmpdir(), "lasting-lease-")), "store");
  const opened: FileDiscovery[] = [];
  t.after(async () => {
    await Promise.all(opened.map((discovery) => discovery.close()));
    await rm(join(root, ".."), { recursive: true });
  });
  const open = (): FileDiscovery => {
    const discovery = new FileDiscovery({ root, pollMs: 20 });
    opened.push(discovery);
    return discovery;
  };
  const keep = (discovery: Discovery): Promise<Lease> =>
    openLastingLease(discovery, {
      clock: systemClock,
      random: new SeededRandom(1),
      logger: silentLogger,
      ttlMs: TTL_MS,
    });
  return { root, open, keep };
}

async function until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
  const endMs = performance.now() + 15_000;
  while (!(await condition())) {
    assert.ok(performance.now() < endMs, `never came: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

test("lasting lease: a store away for longer than the TTL costs no watcher a key, and the keys are announced again", async (t) => {
  const { root, open, keep } = await aStore(t);
  const holder = open();
  const lease = await keep(holder);
  await lease.put("v1/a", { one: 1 });
  const changes: DiscoveryChange[] = [];
  const watcher = open();
  await watcher.watch("v1/", (change) => changes.push(change));
  const { id } = lease;

  await rename(root, `${root}.aside`);
  await writeFile(root, "in the way");
  await until("the lease to be lost", () => holder.health().detail?.includes("a lease was lost") === true);
  assert.equal(watcher.health().healthy, false);
  await lease.put("v1/b", 2); // Kept for later.
  await rm(root);
  await rename(`${root}.aside`, root);

  await until("a new lease", () => lease.id !== id);
  const keys = async (): Promise<string> => (await watcher.list("v1/")).map(({ key }) => key).join(" ");
  await until("both keys", async () => (await keys()) === "v1/a v1/b");
  assert.deepEqual(
    changes.filter(({ type }) => type === "delete"),
    [],
  );
  assert.deepEqual(holder.health(), { healthy: true });
  await until("the watcher to be well", () => watcher.health().healthy);
  await lease.close();
  await until("the keys to go", async () => (await keys()) === "");
});

test("lasting lease: one that others gave up and cleared away comes back with its keys", async (t) => {
  const { root, open, keep } = await aStore(t);
  const lease = await keep(open());
  await lease.put("v1/a", 1);
  await lease.put("v1/gone", 1);
  await lease.delete("v1/gone");
  const { id } = lease;
  // What a watcher's sweep does to a lease that was silent for three TTLs.
  await rename(join(root, "leases", id), join(root, "closed", id));
  await until("another lease", () => lease.id !== id);
  const entries = await open().list("v1/");
  assert.deepEqual(
    entries.map(({ key, leaseId }) => [key, leaseId]),
    [["v1/a", lease.id]],
  );
});

test("lasting lease: a whole cluster that lost its leases in one instant comes back spread over time", async () => {
  const clock = new ManualClock();
  const reopenedMs: number[] = [];
  const store = new MemoryDiscovery({ store: new MemoryStore(), clock });
  let isDown = false;
  /** A store that ends all its leases at once, is away, and comes back. */
  const losers: (() => void)[] = [];
  const discovery = {
    openLease: async (): Promise<Lease> => {
      if (isDown) throw new DynamoError("discovery-unavailable", "away");
      const inner = await store.openLease();
      const { promise, resolve } = Promise.withResolvers<void>();
      losers.push(resolve);
      reopenedMs.push(clock.monotonicMs());
      return {
        id: inner.id,
        lost: promise,
        put: (key, value) => inner.put(key, value),
        delete: (key) => inner.delete(key),
        close: () => inner.close(),
      };
    },
  } as Discovery;
  const random = new SeededRandom(7);
  const leases: Lease[] = [];
  for (let i = 0; i < 100; i++) {
    leases.push(await openLastingLease(discovery, { clock, random, logger: silentLogger }));
    await leases[i]!.put(`v1/worker-${i}`, i);
  }
  isDown = true;
  for (const lose of losers) lose();
  const pass = async (ms: number): Promise<void> => {
    for (let passed = 0; passed < ms; passed += 50) {
      clock.advance(50);
      await new Promise((resolve) => setImmediate(resolve));
    }
  };
  await pass(60_000);
  reopenedMs.length = 0;
  isDown = false;
  const backMs = clock.monotonicMs();
  await pass(10_000);
  assert.equal(reopenedMs.length, 100);
  const lastMs = Math.max(...reopenedMs) - backMs;
  assert.ok(lastMs <= DEFAULT_TTL_MS / 2 + 50, `watchers give a lease up after 7.5 s of silence; back after ${lastMs}`);
  assert.equal((await store.list("v1/")).length, 100);
  const perSlot = new Map<number, number>();
  for (const ms of reopenedMs) {
    const slot = Math.floor((ms - backMs) / 250);
    perSlot.set(slot, (perSlot.get(slot) ?? 0) + 1);
  }
  assert.ok(Math.max(...perSlot.values()) <= 15, `returns per quarter second: ${[...perSlot.values()].join(" ")}`);
  for (const lease of leases) await lease.close();
  await store.close();
});
