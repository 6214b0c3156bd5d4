import assert from "node:assert/strict";
import { test } from "node:test";
import { Metrics, silentLogger } from "../../observability/index.ts";
import type { ModelCard } from "../../protocol/index.ts";
import { newInstanceId, registerCard, registerInstance, type Planes } from "../../runtime/component/index.ts";
import { MemoryDiscovery, MemoryStore, type JsonValue } from "../../runtime/discovery/index.ts";
import { MemoryEventBus, MemoryEventPlane } from "../../runtime/event-plane/index.ts";
import { MemoryNetwork, MemoryRequestPlane } from "../../runtime/request-plane/index.ts";
import { SeededRandom, systemClock } from "../../std/index.ts";
import { KvIndexKeeper } from "./kv-index-keeper.ts";
import type { HostMessage } from "./messages.ts";

const CARD: ModelCard = {
  version: 1,
  name: "m",
  engine: "echo",
  engineVersion: "1",
  contextLength: 4_096,
  blockSizeTokens: 16,
  totalBlocks: 256,
  maxSequences: 8,
  maxBatchedTokens: 2_048,
  dataParallelSize: 1,
  vocabularySize: 256,
  tokenizerSha256: "0".repeat(64),
  tokenizerBytes: 1,
  types: ["completions"],
  role: "agg",
  blockBytes: 0,
  modelFingerprint: "",
  created: 0,
};

/** What a message says, in a word or two. */
function short(message: HostMessage): string {
  if (message.type === "kv-index") return `${message.model}: ${message.index === undefined ? "no index" : "index"}`;
  if (message.type === "kv-ranks") return `${message.model}: ${message.instanceId.at(-1)} [${message.ranks.join()}]`;
  return message.type;
}

test("KV index keeper: tells of indexes and ranks as workers come, change and go", { timeout: 10_000 }, async () => {
  const clock = systemClock;
  const discovery = new MemoryDiscovery({ store: new MemoryStore(), clock });
  const request = new MemoryRequestPlane({ network: new MemoryNetwork(), clock });
  const events = new MemoryEventPlane({ bus: new MemoryEventBus(), clock });
  const metrics = new Metrics();
  const planes: Planes = {
    discovery,
    request,
    events,
    clock,
    random: new SeededRandom(1),
    logger: silentLogger,
    metrics,
  };
  const told: string[] = [];
  let wake = (): void => undefined;
  const keeper = new KvIndexKeeper(planes, "dynamo", (message) => {
    told.push(short(message));
    wake();
  });
  const hears = async (...expected: string[]): Promise<void> => {
    while (told.length < expected.length) {
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
    }
    assert.deepEqual(told.splice(0), expected);
  };
  const [a, b] = ["a", "b"].map((last) => newInstanceId().slice(0, 15) + last);
  const ref = (instanceId: string) => ({ namespace: "dynamo", component: "backend", endpoint: "generate", instanceId });
  const leaseOf = async (instanceId: string, address: string, card: object) => {
    const lease = await discovery.openLease();
    await registerCard(lease, ref(instanceId), card as JsonValue);
    await registerInstance(lease, { ...ref(instanceId), address, pid: 1, host: "h", startedMs: 1 });
    return lease;
  };
  const leaseA = await leaseOf(a!, "memory://1", CARD);
  await keeper.start();
  await hears("m: index", "m: a [0]");
  const leaseB = await leaseOf(b!, "memory://2", { ...CARD, dataParallelSize: 2 });
  await hears("m: b [1,2]");
  // The same again says nothing new: the next message is that of the move.
  await registerInstance(leaseA, { ...ref(a!), address: "memory://1", pid: 1, host: "h", startedMs: 1 });
  await registerInstance(leaseA, { ...ref(a!), address: "memory://3", pid: 1, host: "h", startedMs: 1 });
  await hears("m: a []", "m: a [0]");
  await registerCard(leaseA, ref(a!), { ...CARD, name: "other" } as unknown as JsonValue);
  await hears("m: a []", "other: index", "other: a [0]");
  await leaseB.close();
  await hears("m: b []", "m: no index");
  await leaseOf(b!, "memory://4", { version: 1, name: "damaged" });
  await leaseA.close();
  await hears("other: a []", "other: no index");
  await keeper.close();
  for (const plane of [events, request, discovery]) await plane.close();
});
