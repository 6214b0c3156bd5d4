import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { CounterChild, Metrics, silentLogger } from "../../observability/index.ts";
import { KV_EVENTS_TOPIC, kvQueryEndpoint, type KvStored } from "../../protocol/index.ts";
import { MemoryEventBus, MemoryEventPlane, type EventPublisher } from "../../runtime/event-plane/index.ts";
import { MemoryNetwork, MemoryRequestPlane, type RequestPlaneServer } from "../../runtime/request-plane/index.ts";
import { systemClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import { KvPublisher } from "../../worker/kv-publisher/index.ts";
import { FlatKvIndex, OverlapScores } from "../indexer/index.ts";
import { KvEventFeed, type KvEventFeedOptions } from "./kv-event-feed.ts";

const ID = "00c0ffee00c0ffee";
const PREFIX = "dynamo.backend";

function storedEvent(path: readonly number[], dpRank = 0): KvStored {
  const { sequenceHashes, localHashes } = hashBlocks(Uint32Array.from(path), 1, blockHashSeed());
  return { type: "stored", dpRank, tier: "device", parentHash: undefined, startBlock: 0, sequenceHashes, localHashes };
}

async function until(condition: () => boolean, what: string, timeoutMs = 5_000): Promise<void> {
  const deadlineMs = performance.now() + timeoutMs;
  while (!condition()) {
    if (performance.now() > deadlineMs) throw new Error(`waited ${timeoutMs} ms for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

/** A router's feed and worker parts on memory planes; `drop` loses events. */
async function setUp(options: { drop?: () => boolean; feed?: Partial<KvEventFeedOptions> } = {}) {
  const bus = new MemoryEventBus({ drop: (kind) => kind !== "beacon" && (options.drop?.() ?? false) });
  const network = new MemoryNetwork();
  const clock = systemClock;
  const planes: { close(): Promise<void> }[] = [];
  const kept = <P extends { close(): Promise<void> }>(plane: P): P => (planes.push(plane), plane);
  const metrics = new Metrics();
  const logged: string[] = [];
  const logger = Object.assign(Object.create(silentLogger) as typeof silentLogger, {
    warn: (_fields: unknown, text: string) => logged.push(text),
    info: (_fields: unknown, text: string) => logged.push(text),
  });
  const feed = new KvEventFeed({
    events: kept(new MemoryEventPlane({ bus, clock })),
    client: kept(new MemoryRequestPlane({ network, clock })).client,
    clock,
    logger,
    metrics,
    queryTimeoutMs: 500,
    ...options.feed,
  });
  await feed.start();
  const index = new FlatKvIndex({ maxBytes: 16 * 2 ** 20 });
  const servers: RequestPlaneServer[] = [];
  const startWorker = async (instanceId = ID, ranks = 1) => {
    const server = await kept(new MemoryRequestPlane({ network, clock })).listen();
    servers.push(server);
    const plane = kept(new MemoryEventPlane({ bus, clock }));
    const publisher: EventPublisher = await plane.publish(KV_EVENTS_TOPIC, { publisherId: instanceId });
    const kv = new KvPublisher({ publisher, clock, logger: silentLogger, dropped: new CounterChild() });
    const withdrawals = kv.endpoints(ranks).map(({ name, handler }) => server.serve(`${PREFIX}.${name}`, handler));
    return {
      kv,
      server,
      publisher,
      withdraw: () => withdrawals.forEach((withdraw) => withdraw()),
      join: () =>
        feed.addWorker({
          instanceId,
          model: "m",
          address: server.address,
          endpointPrefix: PREFIX,
          dataParallelSize: ranks,
          index,
        }),
    };
  };
  const overlap = (path: readonly number[], instanceId = ID, dpRank = 0): number => {
    const { sequenceHashes, blockCount } = hashBlocks(Uint32Array.from(path), 1, blockHashSeed());
    const scores = new OverlapScores();
    index.findMatches(sequenceHashes, blockCount, scores);
    return scores.device[index.rankOf(instanceId, dpRank)]!;
  };
  const counter = async (pattern: RegExp): Promise<number> => {
    const line = (await metrics.render()).split("\n").find((candidate) => pattern.test(candidate));
    return line === undefined ? 0 : Number(line.split(" ").at(-1));
  };
  const close = async (): Promise<void> => {
    await feed.close();
    for (const server of servers) await server.close();
    for (const plane of planes) await plane.close();
  };
  return { feed, index, startWorker, overlap, counter, render: () => metrics.render(), close, logged };
}

describe("KV event feed", () => {
  it("a router that starts late gets everything by a dump of many pages, within a second, and then follows", async () => {
    const cluster = await setUp();
    const worker = await cluster.startWorker();
    const long = Array.from({ length: 30_000 }, (_, i) => i);
    worker.kv.onKvEvents([storedEvent(long)]);
    const startMs = performance.now();
    worker.join();
    assert.match(cluster.feed.health(cluster.index).degradation!, /1 of 1 ranks recovering/);
    await until(() => cluster.overlap(long) === 30_000, "the dump");
    assert.ok(performance.now() - startMs < 1_000);
    worker.kv.onKvEvents([storedEvent([7, 8])]);
    await until(() => cluster.overlap([7, 8]) === 2, "the event after it");
    assert.equal(cluster.feed.health(cluster.index).degradation, undefined);
    worker.kv.onKvEvents([{ type: "cleared", dpRank: 0 }]);
    await until(() => cluster.overlap([7, 8]) === 0, "the barrier");
    assert.ok((await cluster.counter(/kv_cache_events_applied\{status="ok",event_type="stored"\}/)) >= 15);
    await cluster.close();
  });

  it("a scrape shows the index's size, and nothing of a model without workers", async () => {
    const cluster = await setUp();
    const figure = (name: string): Promise<number> => cluster.counter(new RegExp(`^dynamo_kvindexer_${name}(\\{| )`));
    assert.equal(await figure("models"), 0);
    const [one, two] = [await cluster.startWorker(), await cluster.startWorker("00000000000000b2")];
    for (const worker of [one, two]) worker.join();
    await until(() => cluster.feed.health(cluster.index).recoveringCount === 0, "the joins");
    for (const worker of [one, two]) worker.kv.onKvEvents([storedEvent([1, 2, 3])]);
    await until(() => cluster.overlap([1, 2, 3]) === 3 && cluster.overlap([1, 2, 3], "00000000000000b2") === 3, "both");
    assert.deepEqual(
      await Promise.all(["models", "workers", "blocks", "memberships", "events_behind"].map(figure)),
      [1, 2, 3, 6, 0],
    );
    assert.equal(await figure("bytes"), cluster.index.stats().bytes);
    assert.equal(await figure("evicted_blocks_total"), 0);
    cluster.feed.removeWorker(ID);
    cluster.feed.removeWorker("00000000000000b2");
    assert.equal(await figure("models"), 0);
    assert.doesNotMatch(await cluster.render(), /^dynamo_kvindexer_(?!models)\w+\{/m);
    await cluster.close();
  });

  it("events that the plane lost, the last one included, are restored by themselves and the loss is visible", async () => {
    let losing = false;
    const cluster = await setUp({ drop: () => losing, feed: { checkDelayMs: 60_000 } });
    const worker = await cluster.startWorker();
    worker.join();
    await until(() => cluster.feed.health(cluster.index).recoveringCount === 0, "the join");
    losing = true;
    for (let i = 0; i < 20; i++) worker.kv.onKvEvents([storedEvent([i, i + 1])]);
    // The plane's own replay is lost too; its deadline of 2 s ends in a gap, and that in a query.
    await until(() => cluster.overlap([19, 20]) === 2, "the restore", 8_000);
    for (let i = 0; i < 20; i++) assert.equal(cluster.overlap([i, i + 1]), 2);
    assert.equal(await cluster.counter(/^dynamo_router_kv_events_lost_total/), 20);
    assert.ok((await cluster.counter(/kv_restores_total\{kind="incremental",outcome="ok"\}/)) >= 1);
    assert.equal(cluster.logged.filter((line) => line.includes("are missing")).length, 1);
    await cluster.close();
  });

  it("an event that came before the subscription's link was up is found missing by the check after the join", async () => {
    let losing = false;
    const cluster = await setUp({ drop: () => losing, feed: { checkDelayMs: 50 } });
    const worker = await cluster.startWorker();
    worker.join();
    await until(() => cluster.feed.health(cluster.index).recoveringCount === 0, "the join");
    losing = true;
    worker.kv.onKvEvents([storedEvent([1, 2])]);
    await until(() => cluster.overlap([1, 2]) === 2, "the check", 1_000);
    await cluster.close();
  });

  it("a worker that cannot be asked is asked again until it can, with one log line", async () => {
    const cluster = await setUp();
    const worker = await cluster.startWorker();
    worker.kv.onKvEvents([storedEvent([1, 2])]);
    worker.withdraw();
    worker.join();
    await until(() => cluster.logged.length > 0, "the failure to be logged");
    assert.equal(cluster.overlap([1, 2]), 0);
    assert.equal(cluster.feed.health(cluster.index).recoveringCount, 1);
    for (const { name, handler } of worker.kv.endpoints(1)) worker.server.serve(`${PREFIX}.${name}`, handler);
    await until(() => cluster.overlap([1, 2]) === 2, "the restore");
    assert.equal(cluster.logged.filter((line) => line.includes("trying again")).length, 1);
    assert.ok((await cluster.counter(/kv_restores_total\{kind="full",outcome="failed"\}/)) >= 1);
    await cluster.close();
  });

  it("a query that is never answered ends with its deadline and is asked again", async () => {
    const cluster = await setUp({ feed: { queryTimeoutMs: 50 } });
    const worker = await cluster.startWorker();
    worker.kv.onKvEvents([storedEvent([5])]);
    worker.withdraw();
    const stop = worker.server.serve(`${PREFIX}.${kvQueryEndpoint(0)}`, () => ({ onCancel: () => undefined }));
    worker.join();
    await until(() => cluster.logged.length > 0, "the deadline");
    stop();
    for (const { name, handler } of worker.kv.endpoints(1)) worker.server.serve(`${PREFIX}.${name}`, handler);
    await until(() => cluster.overlap([5]) === 1, "the restore");
    await cluster.close();
  });

  it("hostile messages are dropped, counted and logged once; the worker's good ones still count", async () => {
    const cluster = await setUp();
    const worker = await cluster.startWorker();
    worker.join();
    await until(() => cluster.feed.health(cluster.index).recoveringCount === 0, "the join");
    worker.publisher.publish(Buffer.from("what is this"));
    worker.publisher.publish(Buffer.alloc(0));
    worker.publisher.publish(Buffer.alloc(1_000_000, 0xff));
    worker.kv.onKvEvents([storedEvent([1], 9)]);
    worker.kv.onKvEvents([storedEvent([1, 2, 3])]);
    await until(() => cluster.overlap([1, 2, 3]) === 3, "the good event");
    assert.equal(await cluster.counter(/kv_events_dropped_total\{reason="malformed"\}/), 4);
    assert.equal(cluster.logged.filter((line) => line.includes("dropped")).length, 1);
    await cluster.close();
  });

  it("an answer of another kind than asked for is a failed query, not an exception", async () => {
    const cluster = await setUp();
    const worker = await cluster.startWorker();
    worker.withdraw();
    let calls = 0;
    const stop = worker.server.serve(`${PREFIX}.${kvQueryEndpoint(0)}`, (stream) => {
      calls++;
      stream.write(calls % 2 === 0 ? Buffer.alloc(300_000, 0xee) : Buffer.from([1, 99, 0]));
      stream.write(Buffer.from("one more"));
      stream.end();
      return { onCancel: () => undefined };
    });
    worker.join();
    await until(() => calls >= 3, "three attempts");
    stop();
    worker.kv.onKvEvents([storedEvent([4])]);
    for (const { name, handler } of worker.kv.endpoints(1)) worker.server.serve(`${PREFIX}.${name}`, handler);
    await until(() => cluster.overlap([4]) === 1, "the restore");
    await cluster.close();
  });

  it("ranks are told apart, and a worker that leaves takes all of its blocks along and nobody else's", async () => {
    const cluster = await setUp();
    const other = "1111111111111111";
    const [one, two] = [await cluster.startWorker(ID, 2), await cluster.startWorker(other)];
    one.join();
    two.join();
    one.kv.onKvEvents([storedEvent([1, 2]), storedEvent([1, 2, 3], 1)]);
    two.kv.onKvEvents([storedEvent([1])]);
    await until(() => cluster.overlap([1, 2, 3], ID, 1) === 3 && cluster.overlap([1], other) === 1, "all events");
    assert.equal(cluster.overlap([1, 2, 3], ID, 0), 2);
    assert.equal(cluster.feed.health(cluster.index).rankCount, 3);
    cluster.feed.removeWorker(ID);
    assert.equal(cluster.overlap([1, 2, 3], ID, 0), 0);
    assert.equal(cluster.overlap([1, 2, 3], ID, 1), 0);
    assert.equal(cluster.overlap([1], other), 1);
    assert.equal(cluster.feed.health(cluster.index).rankCount, 1);
    one.kv.onKvEvents([storedEvent([9])]);
    two.kv.onKvEvents([storedEvent([9])]);
    await until(() => cluster.overlap([9], other) === 1, "the other one's event");
    assert.equal(cluster.overlap([9], ID, 0), 0);
    await cluster.close();
  });

  it("a worker that restarts with the same id loses what it had, whether it comes at the same address or another", async () => {
    const cluster = await setUp();
    const first = await cluster.startWorker();
    first.join();
    first.kv.onKvEvents([storedEvent([1, 2, 3])]);
    await until(() => cluster.overlap([1, 2, 3]) === 3, "the first life");
    first.withdraw();
    await first.publisher.close();
    const second = await cluster.startWorker();
    second.kv.onKvEvents([storedEvent([4])]);
    cluster.feed.removeMoved(ID, second.server.address);
    second.join();
    await until(() => cluster.overlap([4]) === 1, "the second life");
    assert.equal(cluster.overlap([1, 2, 3]), 0);
    // The third life, in the same place: only the publisher's end and its events tell of it.
    second.withdraw();
    await second.publisher.close();
    const third = await cluster.startWorker();
    for (const { name, handler } of third.kv.endpoints(1)) second.server.serve(`${PREFIX}.${name}`, handler);
    third.kv.onKvEvents([storedEvent([5, 6])]);
    await until(() => cluster.overlap([5, 6]) === 2, "the third life");
    await until(() => cluster.overlap([4]) === 0, "the second life to be forgotten");
    assert.equal(cluster.feed.cursor(ID)!.epoch, third.kv.epoch);
    await cluster.close();
  });

  it("a hundred workers that join at once are restored a few at a time", async () => {
    const cluster = await setUp({ feed: { maxQueries: 4 } });
    const ids = Array.from({ length: 100 }, (_, i) => (i + 1).toString(16).padStart(16, "0"));
    let [running, most] = [0, 0];
    for (const id of ids) {
      const worker = await cluster.startWorker(id);
      worker.kv.onKvEvents([storedEvent([1, 2])]);
      worker.withdraw();
      const [{ handler }] = worker.kv.endpoints(1) as [ReturnType<typeof worker.kv.endpoints>[number]];
      worker.server.serve(`${PREFIX}.${kvQueryEndpoint(0)}`, (stream, payload) => {
        most = Math.max(most, ++running);
        const copy = Buffer.from(payload);
        setImmediate(() => {
          running--;
          handler(stream, copy);
        });
        return { onCancel: () => undefined };
      });
      worker.join();
    }
    await until(() => ids.every((id) => cluster.overlap([1, 2], id) === 2), "all of them");
    assert.ok(most <= 4, `${most} at once`);
    assert.equal(cluster.feed.health(cluster.index).recoveringCount, 0);
    await cluster.close();
  });

  it("after close nothing is asked, applied or left", async () => {
    const cluster = await setUp();
    const worker = await cluster.startWorker();
    worker.join();
    await cluster.feed.close();
    worker.kv.onKvEvents([storedEvent([1])]);
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(cluster.overlap([1]), 0);
    worker.join();
    assert.equal(cluster.feed.cursor(ID), undefined);
    await cluster.close();
  });
});
