import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { Metrics, silentLogger } from "../../observability/index.ts";
import { ACTIVE_SEQUENCES_TOPIC, type ActiveSequenceEvent } from "../../protocol/index.ts";
import { MemoryEventBus, MemoryEventPlane } from "../../runtime/event-plane/index.ts";
import { ManualClock } from "../../std/index.ts";
import { ReplicaSync, type SyncedRouter } from "./replica-sync.ts";

const byRequest = (a: readonly [string, number], b: readonly [string, number]): number => (a[0] < b[0] ? -1 : 1);
const WORKER = "00c0ffee00c0ffee";

/** A router that keeps what the others told it: `router request` -> prefill tokens. */
class FakeRouter implements SyncedRouter {
  onBooking: ((event: ActiveSequenceEvent) => void) | undefined = undefined;
  readonly remote = new Map<string, Map<string, number>>();
  /** Own requests. */
  readonly own = new Map<string, number>();

  applyRemoteBooking(routerId: string, event: ActiveSequenceEvent): string {
    let bookings = this.remote.get(routerId);
    if (bookings === undefined) this.remote.set(routerId, (bookings = new Map()));
    if (event.type === "add") bookings.set(event.requestId, event.prefillTokens);
    else if (!bookings.has(event.requestId)) return "unknown-request";
    else if (event.type === "free") bookings.delete(event.requestId);
    else bookings.set(event.requestId, 0);
    return "applied";
  }

  dropRemoteRouter(routerId: string): void {
    this.remote.delete(routerId);
  }

  add(requestId: string, prefillTokens = 100): void {
    this.own.set(requestId, prefillTokens);
    this.onBooking?.({
      type: "add",
      requestId,
      instanceId: WORKER,
      dpRank: 0,
      sequenceHashes: Uint32Array.of(1, 2),
      blockCount: 1,
      prefillTokens,
      expectedOutputTokens: 0,
    });
  }

  prefillDone(requestId: string): void {
    if (!this.own.has(requestId)) return;
    this.own.set(requestId, 0);
    this.onBooking?.({ type: "prefill-completed", requestId });
  }

  free(requestId: string): void {
    if (this.own.delete(requestId)) this.onBooking?.({ type: "free", requestId });
  }

  of(routerId: string): [string, number][] {
    return [...(this.remote.get(routerId) ?? [])].toSorted(byRequest);
  }
}

class Cluster {
  readonly clock = new ManualClock();
  losing = false;
  readonly bus = new MemoryEventBus({ drop: (kind) => this.losing && kind !== "beacon" });
  readonly scheduled: (() => void)[] = [];
  readonly opened: { sync: ReplicaSync; plane: MemoryEventPlane }[] = [];
  readonly metrics = new Metrics();

  async join(routerId: string): Promise<{ router: FakeRouter; sync: ReplicaSync; plane: MemoryEventPlane }> {
    const { clock, bus, metrics } = this;
    const plane = new MemoryEventPlane({ bus, clock, schedule: (run) => this.scheduled.push(run) });
    const sync = new ReplicaSync({ events: plane, clock, logger: silentLogger, metrics, routerId });
    const router = new FakeRouter();
    await sync.start();
    sync.attach("m", router);
    this.opened.push({ sync, plane });
    return { router, sync, plane };
  }

  /** Lets everything that is under way arrive, timers and the plane's deadlines included. */
  settle(ms = 10_000): void {
    for (let passed = 0; passed < ms; passed += 50) {
      this.clock.advance(50);
      while (this.scheduled.length > 0) this.scheduled.shift()!();
    }
  }

  async close(): Promise<void> {
    for (const { sync, plane } of this.opened) {
      await sync.close();
      await plane.close();
    }
  }
}

const [A, B, C] = ["aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb", "cccccccccccccccc"] as const;

describe("replica sync", () => {
  it("tells bookings, prefills and ends in batches of a millisecond, and never applies its own", async () => {
    const cluster = new Cluster();
    const [a, b] = [await cluster.join(A), await cluster.join(B)];
    cluster.settle(2_000);
    let messages = 0;
    await b.plane.subscribe(ACTIVE_SEQUENCES_TOPIC, { onEvent: () => void messages++, onGap: () => undefined });
    cluster.settle(100);
    for (let i = 0; i < 20; i++) a.router.add(`r${i}`);
    a.router.prefillDone("r3");
    a.router.free("r4");
    assert.deepEqual(b.router.of(A), []);
    cluster.settle(50);
    assert.equal(messages, 1);
    assert.deepEqual(b.router.of(A), [...a.router.own].toSorted(byRequest));
    assert.deepEqual([a.router.of(A), a.router.of(B), b.router.of(B)], [[], [], []]);
    for (let i = 0; i < 300; i++) a.router.add(`s${i}`);
    cluster.settle(50);
    assert.equal(messages, 3, "256 and the rest");
    assert.deepEqual(b.router.of(A), [...a.router.own].toSorted(byRequest));
    await cluster.close();
    assert.equal(cluster.clock.pendingTimerCount, 0);
  });

  it("a router that comes late is told what is on the workers already, without what is over", async () => {
    const cluster = new Cluster();
    const a = await cluster.join(A);
    for (let i = 0; i < 600; i++) a.router.add(`r${i}`);
    for (let i = 0; i < 600; i += 2) a.router.free(`r${i}`);
    a.router.prefillDone("r1");
    cluster.settle(500);
    const b = await cluster.join(B);
    cluster.settle(2_000);
    assert.deepEqual(b.router.of(A), [...a.router.own].toSorted(byRequest));
    assert.deepEqual(b.sync.peers, [{ routerId: A, isWhole: true }]);
    await cluster.close();
  });

  it("a router that leaves takes its bookings along", async () => {
    const cluster = new Cluster();
    const [a, b] = [await cluster.join(A), await cluster.join(B)];
    a.router.add("r");
    cluster.settle(500);
    assert.equal(b.router.of(A).length, 1);
    await a.sync.close();
    cluster.settle(500);
    assert.deepEqual([...b.router.remote.keys()], []);
    assert.deepEqual(b.sync.peers, []);
    await cluster.close();
  });

  it("samples of one request count one by one", async () => {
    const cluster = new Cluster();
    const [a, b] = [await cluster.join(A), await cluster.join(B)];
    cluster.settle(2_000);
    for (let i = 0; i < 3; i++) a.router.add("same");
    cluster.settle(50);
    assert.equal(b.router.of(A).length, 3);
    for (let left = 2; left >= 0; left--) {
      a.router.onBooking!({ type: "free", requestId: "same" });
      cluster.settle(50);
      assert.equal(b.router.of(A).length, left);
    }
    await cluster.close();
  });

  it("hostile messages and models nobody serves are counted and change nothing", async () => {
    const cluster = new Cluster();
    const b = await cluster.join(B);
    const foreign = await b.plane.publish(ACTIVE_SEQUENCES_TOPIC, { publisherId: C });
    foreign.publish(Buffer.from("nonsense"));
    foreign.publish(Buffer.alloc(100_000, 0xff));
    cluster.settle(500);
    const text = await cluster.metrics.render();
    assert.match(text, /replica_sync_events_total\{direction="received",outcome="malformed"\} 2/);
    assert.equal(b.router.remote.size, 0);
    const a = await cluster.join(A);
    a.sync.attach("other", new FakeRouter());
    cluster.settle(500);
    assert.equal(b.router.of(A).length, 0);
    await cluster.close();
  });

  it("three routers that book at random over a plane that loses for a while end with the same view", async () => {
    const step = fc.oneof(
      {
        weight: 6,
        arbitrary: fc.record({
          do: fc.constantFrom("add" as const, "done" as const, "free" as const),
          who: fc.nat(2),
          id: fc.nat(6),
        }),
      },
      { weight: 2, arbitrary: fc.record({ do: fc.constant("pass" as const), who: fc.nat(2), id: fc.nat(60) }) },
      {
        weight: 1,
        arbitrary: fc.record({ do: fc.constantFrom("lose" as const, "heal" as const), who: fc.nat(2), id: fc.nat(6) }),
      },
    );
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 50 }), async (steps) => {
        const cluster = new Cluster();
        const routers = [await cluster.join(A), await cluster.join(B), await cluster.join(C)];
        for (const { do: action, who, id } of steps) {
          const { router } = routers[who]!;
          if (action === "add" && !router.own.has(`r${id}`)) router.add(`r${id}`);
          else if (action === "done") router.prefillDone(`r${id}`);
          else if (action === "free") router.free(`r${id}`);
          else if (action === "lose") cluster.losing = true;
          else if (action === "heal") cluster.losing = false;
          else cluster.settle(id);
        }
        cluster.losing = false;
        cluster.settle(15_000);
        for (const { router } of routers) {
          for (const [at, other] of [A, B, C].entries()) {
            const expected = routers[at]!.router === router ? [] : [...routers[at]!.router.own].toSorted(byRequest);
            assert.deepEqual(router.of(other), expected);
          }
        }
        await cluster.close();
        assert.equal(cluster.clock.pendingTimerCount, 0);
      }),
      { numRuns: 60 },
    );
  });
});
