import assert from "node:assert/strict";
import { test } from "node:test";
import { silentLogger } from "../../observability/index.ts";
import { ManualClock } from "../../std/index.ts";
import { MemoryDiscovery, MemoryStore } from "../discovery/index.ts";
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
  const lease = await openLastingLease(mine, { clock, logger: silentLogger });
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

test("lasting lease: what is put while it is lost comes with the next one, tried each second", async () => {
  const clock = new ManualClock();
  const store = new MemoryStore();
  const mine = new MemoryDiscovery({ store, clock });
  let failures = 0;
  const flaky = {
    openLease: () => (failures-- > 0 ? Promise.reject(new Error("store is away")) : mine.openLease()),
  } as unknown as MemoryDiscovery;
  const lease = await openLastingLease(flaky, { clock, logger: silentLogger });
  failures = 2;
  store.revoke(lease.id);
  await turns();
  await lease.put("v1/late", 1);
  clock.advance(1_000);
  await turns();
  assert.deepEqual(await keysOf(mine), []);
  clock.advance(1_000);
  await turns();
  assert.deepEqual(await keysOf(mine), ["v1/late"]);
  await lease.close();
  await mine.close();
});
