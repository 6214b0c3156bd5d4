import assert from "node:assert/strict";
import { test } from "node:test";
import { Metrics, silentLogger } from "../../observability/index.ts";
import { ReplicaSync, type SyncedRouter } from "../../router/index.ts";
import { systemClock } from "../../std/index.ts";
import { BookingBus } from "./booking-bus.ts";

type Event = Parameters<SyncedRouter["applyRemoteBooking"]>[1];

class FakeRouter implements SyncedRouter {
  onBooking: SyncedRouter["onBooking"] = undefined;
  readonly heard: string[] = [];
  readonly waiting: { count: number; resolve: () => void }[] = [];

  applyRemoteBooking(_routerId: string, event: Event): string {
    this.#hear(`${event.type} ${event.requestId}`);
    return "applied";
  }

  dropRemoteRouter(): void {
    this.#hear("dropped");
  }

  #hear(text: string): void {
    this.heard.push(text);
    for (const { count, resolve } of this.waiting) if (this.heard.length >= count) resolve();
  }

  /** Resolves when it heard that many things. */
  hears(count: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    if (this.heard.length >= count) resolve();
    this.waiting.push({ count, resolve });
    return promise;
  }
}

test(
  "booking bus: routers of two threads hear each other's bookings in order, not their own, and a leave",
  { timeout: 10_000 },
  async () => {
    const name = `test-${process.pid}`;
    const members = [new BookingBus(name), new BookingBus(name)].map((bus) => ({
      bus,
      router: new FakeRouter(),
      sync: new ReplicaSync({ events: bus, clock: systemClock, logger: silentLogger, metrics: new Metrics() }),
    }));
    const [a, b] = members as [(typeof members)[0], (typeof members)[0]];
    for (const { sync, router } of members) {
      await sync.start();
      sync.attach("model", router);
    }
    const add = (requestId: string): Event => ({
      type: "add",
      requestId,
      instanceId: "0000000000000001",
      dpRank: 0,
      sequenceHashes: undefined,
      blockCount: 3,
      prefillTokens: 40,
      expectedOutputTokens: 0,
    });
    a.router.onBooking!(add("one"));
    a.router.onBooking!({ type: "prefill-completed", requestId: "one" });
    a.router.onBooking!({ type: "free", requestId: "one" });
    // A snapshot, once asked for, drops first what was known; what is told is the same.
    const told = (): string[] => b.router.heard.filter((text) => text !== "dropped");
    while (told().length < 3) await b.router.hears(b.router.heard.length + 1);
    assert.deepEqual(told().slice(0, 3), ["add one", "prefill-completed one", "free one"]);
    assert.deepEqual(
      a.router.heard.filter((text) => text !== "dropped"),
      [],
    );
    const before = b.router.heard.length;
    await a.sync.close();
    await b.router.hears(before + 1);
    assert.equal(b.router.heard.at(-1), "dropped");
    await b.sync.close();
    for (const { bus } of members) await bus.close();
    await assert.rejects(a.bus.publish("x"), { reason: "event-plane-unavailable" });
  },
);
