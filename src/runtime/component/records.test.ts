import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { MemoryDiscovery, MemoryStore, type JsonValue } from "../discovery/index.ts";
import type { PublisherRecord } from "../event-plane/index.ts";
import {
  instanceKey,
  newInstanceId,
  parseInstance,
  registerInstance,
  watchInstances,
  type Instance,
} from "./instance.ts";
import { registerCard, watchCards, type CardChange } from "./model-card-record.ts";
import { discoveryPublisherDirectory } from "./publisher-directory.ts";

function anInstance(fields: Partial<Instance> = {}): Instance {
  return {
    namespace: "dynamo",
    component: "backend",
    endpoint: "generate",
    instanceId: "00c0ffee00c0ffee",
    address: "tcp://127.0.0.1:39123",
    pid: 4711,
    host: "here",
    startedMs: 1_700_000_000_000,
    ...fields,
  };
}

/** Two processes that share a store. */
function twoViews(): { mine: MemoryDiscovery; theirs: MemoryDiscovery } {
  const store = new MemoryStore();
  return { mine: new MemoryDiscovery({ store }), theirs: new MemoryDiscovery({ store }) };
}

/** Memory discovery tells its watchers in a microtask. */
const told = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

describe("instances", () => {
  it("a new id is 16 hex digits and not repeated", () => {
    const ids = new Set(Array.from({ length: 1_000 }, newInstanceId));
    assert.equal(ids.size, 1_000);
    for (const id of ids) assert.match(id, /^[0-9a-f]{16}$/);
  });

  it("the key is the agreed one", () => {
    assert.equal(instanceKey(anInstance()), "v1/instances/dynamo/backend/generate/00c0ffee00c0ffee");
  });

  it("a registered instance is seen by others until its lease ends", async () => {
    const { mine, theirs } = twoViews();
    const changes: unknown[] = [];
    await watchInstances(theirs, { namespace: "dynamo" }, (change) => changes.push(change));
    const lease = await mine.openLease();
    await registerInstance(lease, anInstance());
    await told();
    await lease.close();
    await told();
    const address = { namespace: "dynamo", component: "backend", endpoint: "generate" };
    assert.deepEqual(changes, [
      { type: "put", instance: anInstance() },
      { type: "delete", instanceId: "00c0ffee00c0ffee", address },
    ]);
  });

  it("a scope takes its own namespace, component and endpoint only", async () => {
    const { mine, theirs } = twoViews();
    const lease = await mine.openLease();
    const instances = [
      anInstance({ instanceId: "0000000000000001" }),
      anInstance({ instanceId: "0000000000000002", endpoint: "clear" }),
      anInstance({ instanceId: "0000000000000003", component: "backend2" }),
      anInstance({ instanceId: "0000000000000004", namespace: "dynamo2" }),
    ];
    for (const instance of instances) await registerInstance(lease, instance);
    const idsOf = async (scope: { namespace: string; component?: string; endpoint?: string }): Promise<string> => {
      let ids = "";
      const watch = await watchInstances(theirs, scope, (change) => {
        if (change.type === "put") ids += change.instance.instanceId.slice(-1);
      });
      await watch.close();
      return ids;
    };
    assert.equal(await idsOf({ namespace: "dynamo" }), "213");
    assert.equal(await idsOf({ namespace: "dynamo", component: "backend" }), "21");
    assert.equal(await idsOf({ namespace: "dynamo", endpoint: "generate" }), "13");
    assert.equal(await idsOf({ namespace: "dynamo", component: "backend", endpoint: "generate" }), "1");
    await assert.rejects(
      watchInstances(theirs, { namespace: "a/b" }, () => undefined),
      DynamoError,
    );
  });

  it("foreign data that is no instance is left out; one that turns bad counts as gone", async () => {
    const { mine, theirs } = twoViews();
    const lease = await mine.openLease();
    const changes: string[] = [];
    await watchInstances(theirs, { namespace: "dynamo" }, (change) => changes.push(change.type));
    const key = instanceKey(anInstance());
    const { address: _, ...withoutAddress } = anInstance();
    await lease.put(key, withoutAddress as unknown as JsonValue);
    await lease.put("v1/instances/dynamo/stray", 1);
    await lease.put("v1/instances/dynamo/backend/generate/not-an-id", { ...anInstance() });
    await told();
    assert.deepEqual(changes, []);
    await registerInstance(lease, anInstance());
    await lease.put(key, { ...anInstance({ instanceId: "00000000000000ff" }) });
    await told();
    assert.deepEqual(changes, ["put", "delete"]);
  });

  it("parsing takes what registering writes, drops what it does not know, and refuses the rest", () => {
    assert.deepEqual(parseInstance({ ...anInstance(), added: "later" }), anInstance());
    const wrong: JsonValue[] = [null, 1, "x", [], {}, { ...anInstance(), namespace: "a.b" }];
    const fields: [string, JsonValue][] = [
      ["instanceId", "C0FFEE00C0FFEE00"],
      ["instanceId", "c0ffee"],
      ["address", ""],
      ["address", "127.0.0.1:1"],
      ["address", `tcp://${"x".repeat(600)}`],
      ["address", "tcp://a b"],
      ["pid", -1],
      ["pid", 1.5],
      ["host", null],
      ["startedMs", "now"],
      ["endpoint", "../x"],
    ];
    for (const [name, value] of fields) wrong.push({ ...anInstance(), [name]: value });
    for (const value of wrong) assert.equal(parseInstance(value), undefined, JSON.stringify(value));
  });
});

describe("model cards", () => {
  it("are carried unread, and go with their lease", async () => {
    const { mine, theirs } = twoViews();
    const lease = await mine.openLease();
    const card = { anything: [1, { deep: null }] };
    await registerCard(lease, anInstance(), card);
    const changes: CardChange[] = [];
    await watchCards(theirs, { namespace: "dynamo" }, (change) => changes.push(change));
    await lease.close();
    await told();
    const instanceId = "00c0ffee00c0ffee";
    const endpoint = { namespace: "dynamo", component: "backend", endpoint: "generate" };
    assert.deepEqual(changes, [
      { type: "put", instanceId, endpoint, card },
      { type: "delete", instanceId, endpoint },
    ]);
  });
});

describe("publisher directory", () => {
  const record: PublisherRecord = {
    publisherId: "00000000000000aa",
    address: "tcp://127.0.0.1:1",
    replayAddress: "tcp://127.0.0.1:2",
  };

  it("announces under a topic until withdrawn or until the lease ends", async () => {
    const { mine, theirs } = twoViews();
    const lease = await mine.openLease();
    const directory = discoveryPublisherDirectory(mine, () => Promise.resolve(lease), "dynamo");
    const reader = discoveryPublisherDirectory(theirs, () => theirs.openLease(), "dynamo");
    const changes: unknown[] = [];
    await reader.watch("kv.events", (change) => changes.push(change));
    const announcement = await directory.announce("kv.events", record);
    await directory.announce("kv.events.other", record);
    assert.deepEqual(
      (await mine.list("v1/events/")).map((entry) => entry.key),
      ["v1/events/dynamo/kv.events.other/00000000000000aa", "v1/events/dynamo/kv.events/00000000000000aa"],
    );
    await told();
    await announcement.withdraw();
    await told();
    await directory.announce("kv.events", record);
    await told();
    await lease.close();
    await told();
    const put = { type: "put", record };
    const gone = { type: "delete", publisherId: record.publisherId };
    assert.deepEqual(changes, [put, gone, put, gone]);
  });

  it("leaves out records that are damaged or stand under another's key, and refuses wrong topics", async () => {
    const { mine } = twoViews();
    const lease = await mine.openLease();
    const directory = discoveryPublisherDirectory(mine, () => Promise.resolve(lease), "dynamo");
    const changes: unknown[] = [];
    await directory.watch("t", (change) => changes.push(change));
    const prefix = "v1/events/dynamo/t/";
    await lease.put(`${prefix}00000000000000bb`, { ...record });
    await lease.put(`${prefix}00000000000000aa`, { publisherId: record.publisherId, address: 7 });
    await lease.put(`${prefix}x`, { ...record, publisherId: "x" });
    await told();
    assert.deepEqual(changes, []);
    await assert.rejects(directory.announce("a/b", record), DynamoError);
    await assert.rejects(
      directory.watch("", () => undefined),
      DynamoError,
    );
  });
});
