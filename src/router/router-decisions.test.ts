import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { Metrics } from "../observability/index.ts";
import { EMPTY_LOAD, type KvStored } from "../protocol/index.ts";
import { ManualClock, SeededRandom } from "../std/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import {
  INHIBITION_MS,
  NaiveKvIndex,
  ROUTING_POLICIES,
  Router,
  type BookingEvent,
  type RouteRequest,
  type RouterConfig,
  type RouterMode,
  type RoutingDecision,
  type WaitingRoute,
} from "./index.ts";

const BLOCK = 4;
const CAPACITY = { maxSequences: 64, maxBatchedTokens: 100, totalBlocks: 1_000 };

interface Setup {
  readonly mode?: RouterMode;
  readonly config?: Partial<RouterConfig>;
  readonly workers?: readonly string[];
  readonly withIndex?: boolean;
}

function aRouter({ mode = "kv", config = {}, workers = ["a", "b", "c"], withIndex = true }: Setup = {}) {
  const clock = new ManualClock();
  const index = new NaiveKvIndex();
  const router = new Router({
    model: "m",
    policy: ROUTING_POLICIES[mode],
    clock,
    random: new SeededRandom(3),
    metrics: new Metrics(),
    blockSizeTokens: BLOCK,
    config,
    ...(withIndex ? { index } : {}),
  });
  for (const id of workers) router.addWorker(id, `memory://${id}`, { capacity: CAPACITY });
  return { router, clock, index };
}

/** A prompt of `path.length` blocks and `rest` tokens more. */
function aPrompt(path: readonly number[], rest = 1): Uint32Array {
  return Uint32Array.from([
    ...path.flatMap((step) => Array.from({ length: BLOCK }, () => step)),
    ...Array.from({ length: rest }, () => 999),
  ]);
}

function stored(path: readonly number[], tier: KvStored["tier"] = "device"): KvStored {
  const { localHashes, sequenceHashes } = hashBlocks(aPrompt(path, 0), BLOCK, blockHashSeed());
  return { type: "stored", dpRank: 0, tier, parentHash: undefined, startBlock: 0, sequenceHashes, localHashes };
}

function placed(result: RoutingDecision | WaitingRoute): RoutingDecision {
  assert.ok("instanceId" in result, "it waits");
  return result;
}

function waits(result: RoutingDecision | WaitingRoute): WaitingRoute {
  assert.ok("decision" in result, "it was placed");
  return result;
}

const isReason = (reason: string) => (error: unknown) => error instanceof DynamoError && error.reason === reason;

const big = (mark: number): RouteRequest => ({ tokenIds: aPrompt([mark, mark, mark, mark, mark, mark]) });

describe("router: kv", () => {
  test("goes where the prefix is, charges only what is not cached, and the explanation says both", () => {
    const { router, index } = aRouter();
    index.apply(index.rankOf("b", 0), stored([1, 2, 3]));
    const decision = router.route({ requestId: "r1", tokenIds: aPrompt([1, 2, 3, 4], 2) });
    assert.equal(decision.instanceId, "b");
    assert.equal(decision.overlapBlocks, 3);
    const [explained] = router.explain("r1");
    assert.deepEqual(
      explained?.candidates.map((candidate) => candidate.overlap_blocks.device),
      [0, 3, 0],
    );
    assert.deepEqual(explained?.predicted, { cached_blocks: 3, cached_tokens: 12 });
    const next = router.preview({ tokenIds: aPrompt([9]) });
    assert.equal(next.candidates[1]?.load.prefill_tokens, 18 - 12);
    decision.firstToken(12);
    decision.addTokens(3);
    assert.equal(router.preview({ tokenIds: aPrompt([9]) }).candidates[1]?.load.prefill_tokens, 0);
    decision.release({ outcome: "finished" });
    const { actual } = router.explain("r1")[0]!;
    assert.deepEqual([actual?.cached_blocks, actual?.output_tokens, actual?.outcome], [3, 3, "finished"]);
  });

  test("counts blocks in host memory and on disk at their weights", () => {
    const { router, index } = aRouter({ workers: ["a", "b"] });
    index.apply(index.rankOf("a", 0), stored([1, 2, 3, 4], "disk"));
    index.apply(index.rankOf("b", 0), stored([1, 2, 3, 4], "host"));
    const { worker, candidates } = router.preview({ tokenIds: aPrompt([1, 2, 3, 4]) });
    assert.equal(worker.instance_id, "b");
    assert.deepEqual([candidates[0]?.cost.credit, candidates[1]?.cost.credit], [1, 3]);
  });

  test("a namespace of its own shares nothing", () => {
    const { router, index } = aRouter();
    index.apply(index.rankOf("b", 0), stored([1, 2, 3]));
    assert.equal(router.route({ tokenIds: aPrompt([1, 2, 3]), cacheNamespace: "tenant" }).overlapBlocks, 0);
  });

  test("preview books nothing and repeats itself", () => {
    const { router } = aRouter({ workers: ["a"] });
    const request = { tokenIds: aPrompt([1, 2]) };
    router.preview(request);
    assert.deepEqual(router.preview(request).candidates[0]?.load, {
      active_requests: 0,
      prefill_tokens: 0,
      decode_blocks: 2,
    });
    assert.equal(router.workers[0]!.activeRequests, 0);
  });

  test("says in the explanation when it knew too little", () => {
    const none = aRouter({ withIndex: false });
    assert.match(none.router.preview({ tokenIds: aPrompt([1]) }).degradations[0]!, /no index/);
    const { router, index } = aRouter();
    assert.match(router.preview({ tokenIds: aPrompt([1]) }).degradations[0]!, /index empty/);
    index.apply(index.rankOf("a", 0), stored([7]));
    assert.deepEqual(router.preview({ tokenIds: aPrompt([1]) }).degradations, []);
    router.indexHealth = { degradation: "kv: recovering" };
    assert.deepEqual(router.preview({ tokenIds: aPrompt([1]) }).degradations, ["kv: recovering"]);
  });

  test("a worker that left is forgotten by the index, and its name starts anew", () => {
    const { router, index } = aRouter();
    index.apply(index.rankOf("b", 0), stored([1, 2, 3]));
    router.removeWorker("b");
    router.addWorker("b", "memory://b2", { capacity: CAPACITY });
    assert.equal(router.route({ tokenIds: aPrompt([1, 2, 3]) }).overlapBlocks, 0);
  });

  test("data-parallel ranks are candidates of their own", () => {
    const { router, index } = aRouter({ workers: [] });
    router.addWorker("a", "memory://a", { dataParallelSize: 2, capacity: CAPACITY });
    index.apply(index.rankOf("a", 1), { ...stored([1, 2]), dpRank: 1 });
    const decision = router.route({ tokenIds: aPrompt([1, 2]) });
    assert.deepEqual([decision.instanceId, decision.dpRank, decision.candidateCount], ["a", 1, 2]);
    assert.equal(router.workers.length, 1);
  });

  test("a hot prefix does not bury one worker while others idle: any number of short requests over one long prefix", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 12 }),
        fc.integer({ min: 1, max: 300 }),
        fc.boolean(),
        (count, requests, prefilled) => {
          const ids = Array.from({ length: count }, (_, i) => String(i).padStart(2, "0"));
          const { router, index } = aRouter({ workers: ids });
          const hot = Array.from({ length: 200 }, (_, i) => i);
          index.apply(index.rankOf("00", 0), stored(hot));
          for (let i = 0; i < requests; i++) {
            const decision = router.route({ tokenIds: aPrompt([...hot, 1_000 + i]) });
            if (prefilled) decision.firstToken(0);
          }
          const active = router.workers.map((worker) => worker.activeRequests);
          const mean = requests / count;
          assert.ok(Math.max(...active) <= Math.max(16, 2 * mean) + 1, `${active.join(" ")}`);
          assert.equal(
            active.reduce((sum, one) => sum + one),
            requests,
          );
        },
      ),
      { numRuns: 30 },
    );
  });
});

describe("router: without events", () => {
  test("own decisions count as cached for their time to live", () => {
    const { router, clock } = aRouter({ config: { kvEvents: false, ttlMs: 1_000 } });
    const first = router.route({ tokenIds: aPrompt([1, 2, 3]) });
    first.release();
    const second = router.route({ tokenIds: aPrompt([1, 2, 3]) });
    assert.deepEqual([second.instanceId, second.overlapBlocks], [first.instanceId, 3]);
    second.release();
    clock.advance(1_000);
    assert.equal(router.route({ tokenIds: aPrompt([1, 2, 3]) }).overlapBlocks, 0);
  });

  test("beside events the larger of both counts, and takes from the tiers behind it", () => {
    const { router, index } = aRouter({ workers: ["a"], config: { predictedTtlMs: 1_000 } });
    index.apply(index.rankOf("a", 0), stored([1, 2]));
    index.apply(index.rankOf("a", 0), { ...stored([1, 2, 3, 4]), tier: "host" });
    const overlap = () => router.preview({ tokenIds: aPrompt([1, 2, 3, 4]) }).candidates[0]?.overlap_blocks;
    assert.deepEqual(overlap(), { device: 2, host: 2, disk: 0, shared: 0 });
    router.route({ tokenIds: aPrompt([1, 2, 3]) }).release();
    assert.deepEqual(overlap(), { device: 3, host: 1, disk: 0, shared: 0 });
  });
});

describe("router: tiers", () => {
  test("a worker that finds the prompt in the shared store goes before one that has nothing, after one with a disk", () => {
    const { router, index } = aRouter({ workers: ["a", "b", "c"] });
    index.apply(index.rankOf("b", 0), { ...stored([1, 2, 3]), tier: "external" });
    const request = { tokenIds: aPrompt([1, 2, 3, 4]) };
    const one = router.preview(request);
    assert.equal(one.worker.instance_id, "b");
    const chosen = one.candidates.find((candidate) => candidate.chosen)!;
    assert.deepEqual(chosen.overlap_blocks, { device: 0, host: 0, disk: 0, shared: 3 });
    assert.equal(chosen.cost.credit, 0.3);
    assert.equal(one.predicted.cached_blocks, 3);
    index.apply(index.rankOf("c", 0), { ...stored([1, 2, 3]), tier: "disk" });
    assert.equal(router.preview(request).worker.instance_id, "c");
  });
});

describe("router: eligibility", () => {
  test("a pinned request goes to its worker or nowhere", () => {
    const { router } = aRouter();
    assert.equal(router.route({ tokenIds: aPrompt([1]), pinned: { instanceId: "c" } }).instanceId, "c");
    assert.throws(() => router.route({ tokenIds: aPrompt([1]), pinned: { instanceId: "x" } }), isReason("no-workers"));
    assert.throws(
      () => router.route({ tokenIds: aPrompt([1]), pinned: { instanceId: "c" }, excluded: new Set(["c"]) }),
      isReason("no-workers"),
    );
  });

  test("direct mode needs a name, and refuses requests without one", () => {
    const { router } = aRouter({ mode: "direct" });
    assert.throws(() => router.route({ tokenIds: aPrompt([1]) }), isReason("invalid-field"));
    assert.equal(router.route({ tokenIds: aPrompt([1]), pinned: { instanceId: "b" } }).instanceId, "b");
  });

  test("a busy worker gets nothing new, and only when all are busy is a request refused, with 529's reason", () => {
    const { router } = aRouter({ workers: ["a", "b"], config: { busyThresholds: { activePrefillTokens: 10 } } });
    const first = router.route({ tokenIds: aPrompt([1, 2, 3]) });
    const second = router.route({ tokenIds: aPrompt([4, 5, 6]) });
    assert.notEqual(first.instanceId, second.instanceId);
    assert.throws(() => router.route({ tokenIds: aPrompt([7]) }), isReason("worker-full"));
    first.firstToken(0);
    assert.equal(router.route({ tokenIds: aPrompt([7]) }).instanceId, first.instanceId);
    router.busyThresholds = {};
    router.route({ tokenIds: aPrompt([8]) });
  });

  test("what a worker reports makes it busy too, and a rank that is free keeps its worker in", () => {
    const { router } = aRouter({ workers: [], config: { busyThresholds: { activeDecodeBlocks: 0.5 } } });
    router.addWorker("a", "memory://a", { capacity: CAPACITY });
    router.updateLoad("a", { ...EMPTY_LOAD, activeBlocks: 501 });
    assert.throws(() => router.route({ tokenIds: aPrompt([1]) }), isReason("worker-full"));
    router.addWorker("b", "memory://b", { dataParallelSize: 2, capacity: { ...CAPACITY, totalBlocks: 4 } });
    const first = router.route({ tokenIds: aPrompt([1, 2, 3]) });
    const second = router.route({ tokenIds: aPrompt([1, 2, 3]) });
    assert.deepEqual(
      [first.dpRank, second.dpRank].toSorted((a, b) => a - b),
      [0, 1],
    );
    assert.throws(() => router.route({ tokenIds: aPrompt([1]) }), isReason("worker-full"));
  });

  test("required taints filter, preferred ones weigh", () => {
    const { router } = aRouter({ workers: [] });
    router.addWorker("a", "memory://a", { taints: ["zone-1"] });
    router.addWorker("b", "memory://b", { taints: ["zone-2"] });
    const tokenIds = aPrompt([1]);
    assert.equal(router.route({ tokenIds, requiredTaints: ["zone-2"] }).instanceId, "b");
    assert.throws(() => router.route({ tokenIds, requiredTaints: ["zone-3"] }), isReason("no-workers"));
    for (let i = 0; i < 5; i++) {
      const preferred = router.preview({ tokenIds, preferredTaints: [{ taint: "zone-1", weight: 1 }] });
      assert.equal(preferred.worker.instance_id, "a");
    }
  });

  test("what was left out, and why, is in the explanation", () => {
    const { router, clock } = aRouter();
    router.inhibit("a");
    const { left_out: leftOut } = router.preview({ tokenIds: aPrompt([1]), excluded: new Set(["b"]) });
    assert.deepEqual(leftOut, { already_tried: 1, not_allowed: 0, inhibited: 1, busy: 0 });
    clock.advance(INHIBITION_MS);
    assert.equal(router.preview({ tokenIds: aPrompt([1]) }).left_out.inhibited, 0);
  });
});

describe("router: queue", () => {
  const config = { queueThreshold: 0.2 };

  test("waits while every worker's backlog is above the threshold, and goes on at the first token, synchronously until then", async () => {
    const { router } = aRouter({ workers: ["a", "b"], config });
    const running = [placed(router.routeWhenReady(big(1))), placed(router.routeWhenReady(big(2)))];
    const waiting = waits(router.routeWhenReady(big(3)));
    const behind = waits(router.routeWhenReady({ ...big(4), strictPriority: 1 }));
    running[1]!.firstToken(0);
    const decision = await behind.decision;
    assert.equal(decision.instanceId, running[1]!.instanceId);
    running[0]!.release();
    assert.equal((await waiting.decision).instanceId, running[0]!.instanceId);
    assert.equal(router.route(big(5)).queuedMs, 0);
  });

  test("a cancelled one leaves, a deadline is kept, and a new worker takes the next", async () => {
    const { router, clock } = aRouter({ workers: ["a"], config });
    placed(router.routeWhenReady(big(1)));
    const cancelled = waits(router.routeWhenReady(big(2)));
    const late = waits(router.routeWhenReady({ ...big(3), deadlineMs: 1_000 }));
    const next = waits(router.routeWhenReady(big(4)));
    cancelled.cancel(new DynamoError("client-gone", "gone"));
    await assert.rejects(cancelled.decision, isReason("client-gone"));
    clock.advance(1_100);
    await assert.rejects(late.decision, isReason("request-deadline"));
    router.addWorker("b", "memory://b", { capacity: CAPACITY });
    const decision = await next.decision;
    assert.equal(decision.instanceId, "b");
    assert.equal(decision.queuedMs, 1_100);
  });

  test("full is 529's reason, losing the last worker ends the wait, and closing refuses the rest", async () => {
    const { router, clock } = aRouter({ workers: ["a"], config: { ...config, queueLimit: 1 } });
    placed(router.routeWhenReady(big(1)));
    const waiting = waits(router.routeWhenReady(big(2)));
    assert.throws(() => router.routeWhenReady(big(3)), isReason("too-many-requests"));
    router.removeWorker("a");
    clock.advance(1_000);
    await assert.rejects(waiting.decision, isReason("no-workers"));
    router.addWorker("a", "memory://a", { capacity: CAPACITY });
    placed(router.routeWhenReady(big(1)));
    const last = waits(router.routeWhenReady(big(2)));
    router.close(new DynamoError("draining", "bye"));
    await assert.rejects(last.decision, isReason("draining"));
  });
});

describe("router: requests that need room", () => {
  const room = (n: number, blocks = 4): RouteRequest => ({
    tokenIds: aPrompt(Array.from({ length: blocks }, () => n)),
    overrides: { assumeKvReuse: false },
    needsRoom: true,
  });

  test("go where there is a place and KV memory, wait in order while there is none, and get what comes free", async () => {
    const { router } = aRouter({ workers: [] });
    router.addWorker("a", "memory://a", { capacity: { ...CAPACITY, totalBlocks: 10 } });
    router.addWorker("b", "memory://b", { capacity: { ...CAPACITY, maxSequences: 1 } });
    const onB = placed(router.routeWhenReady({ ...room(1), allowed: new Set(["b"]) }));
    const onA = [placed(router.routeWhenReady(room(2))), placed(router.routeWhenReady(room(3)))];
    assert.deepEqual(
      onA.map(({ instanceId }) => instanceId),
      ["a", "a"],
    );
    const large = waits(router.routeWhenReady(room(4, 9)));
    const small = waits(router.routeWhenReady(room(5, 1)));
    // Neither does somebody without such a need wait, nor does the small one pass the large one by.
    assert.ok("instanceId" in router.routeWhenReady({ tokenIds: aPrompt([6]), allowed: new Set(["b"]) }));
    onA[0]!.release();
    onB.release();
    assert.equal(router.workers.find(({ instanceId }) => instanceId === "a")!.activeRequests, 1);
    onA[1]!.release();
    assert.equal((await large.decision).instanceId, "a");
    (await large.decision).release();
    assert.equal((await small.decision).instanceId, "a");
  });

  test("what a worker reports of itself counts, and one that is larger than every worker does not wait for ever", async () => {
    const { router } = aRouter({ workers: [] });
    router.addWorker("a", "memory://a", { capacity: { ...CAPACITY, totalBlocks: 10 } });
    router.updateLoad("a", { ...EMPTY_LOAD, activeBlocks: 8 });
    assert.equal(router.outlook(room(1)).hasRoom, false);
    const waiting = waits(router.routeWhenReady(room(1)));
    router.updateLoad("a", { ...EMPTY_LOAD, activeBlocks: 2 });
    assert.equal((await waiting.decision).instanceId, "a");
    assert.equal(placed(router.routeWhenReady(room(2, 11))).instanceId, "a");
  });

  test("leave the queue with a cancel, at their deadline, with the last worker and with the router", async () => {
    const { router, clock } = aRouter({ workers: [], config: { queueLimit: 3 } });
    router.addWorker("a", "memory://a", { capacity: { ...CAPACITY, maxSequences: 1 } });
    placed(router.routeWhenReady(room(1)));
    const cancelled = waits(router.routeWhenReady(room(2)));
    const late = waits(router.routeWhenReady({ ...room(3), deadlineMs: 1_000 }));
    const orphan = waits(router.routeWhenReady(room(4)));
    assert.throws(() => router.routeWhenReady(room(5)), isReason("too-many-requests"));
    cancelled.cancel(new DynamoError("worker-full", "for too long"));
    await assert.rejects(cancelled.decision, isReason("worker-full"));
    clock.advance(1_100);
    await assert.rejects(late.decision, isReason("request-deadline"));
    router.removeWorker("a");
    clock.advance(1_000);
    await assert.rejects(orphan.decision, isReason("no-workers"));
    router.addWorker("a", "memory://a", { capacity: { ...CAPACITY, maxSequences: 1 } });
    placed(router.routeWhenReady(room(1)));
    const last = waits(router.routeWhenReady(room(2)));
    router.close(new DynamoError("draining", "bye"));
    await assert.rejects(last.decision, isReason("draining"));
    assert.equal(clock.pendingTimerCount, 0);
  });
});

describe("router: a worker that registers anew", () => {
  const config = { queueThreshold: 0.2 };

  test("those in the queue go to it when it is back within a second", async () => {
    const { router, clock } = aRouter({ workers: ["a"], config });
    placed(router.routeWhenReady(big(1)));
    const first = waits(router.routeWhenReady(big(2)));
    const pinned = waits(router.routeWhenReady({ ...big(3), pinned: { instanceId: "a" } }));
    router.removeWorker("a");
    router.updateLoad("a", EMPTY_LOAD);
    router.addWorker("a", "memory://a", { capacity: CAPACITY });
    assert.equal((await first.decision).instanceId, "a");
    router.removeWorker("a");
    clock.advance(400);
    router.addWorker("a", "memory://a", { capacity: CAPACITY });
    assert.equal((await pinned.decision).instanceId, "a");
    clock.advance(10_000);
    assert.equal(clock.pendingTimerCount, 0);
  });

  test("new ones are told at once, and who is pinned to a worker that stays away is told after a second", async () => {
    const { router, clock } = aRouter({ workers: ["a", "b"], config });
    placed(router.routeWhenReady(big(1)));
    placed(router.routeWhenReady(big(2)));
    const pinned = waits(router.routeWhenReady({ ...big(3), pinned: { instanceId: "a" } }));
    router.removeWorker("a");
    assert.throws(() => router.routeWhenReady({ ...big(4), pinned: { instanceId: "a" } }), isReason("no-workers"));
    clock.advance(1_000);
    await assert.rejects(pinned.decision, isReason("no-workers"));
    assert.equal(clock.pendingTimerCount, 0);
  });
});

describe("router: sessions", () => {
  const config = { sessionAffinityTtlMs: 1_000 };

  test("a session stays where its first request got an answer, also when another worker costs less", () => {
    const { router, clock } = aRouter({ config });
    const request = { tokenIds: aPrompt([1]), sessionId: "s" };
    const first = router.route(request);
    first.firstToken(0);
    router.route({ tokenIds: aPrompt([9, 9, 9]), pinned: { instanceId: first.instanceId } });
    const second = router.route({ ...request, requestId: "second" });
    assert.equal(second.instanceId, first.instanceId);
    assert.match(second.reason, /session/);
    second.release();
    first.release();
    clock.advance(1_000);
    assert.notEqual(router.route(request).instanceId, first.instanceId);
  });

  test("when its worker is gone or failed it, the session moves and the explanation says so", () => {
    const { router } = aRouter({ config });
    const request = { tokenIds: aPrompt([1]), sessionId: "s" };
    const first = router.route(request);
    first.firstToken(0);
    const moved = router.route({ ...request, requestId: "moved", excluded: new Set([first.instanceId]) });
    assert.notEqual(moved.instanceId, first.instanceId);
    assert.match(router.explain("moved")[0]!.degradations.join(), /session: /);
    moved.firstToken(0);
    assert.equal(router.route(request).instanceId, moved.instanceId);
    router.removeWorker(moved.instanceId);
    assert.notEqual(router.route(request).instanceId, moved.instanceId);
  });
});

describe("router: replicas", () => {
  test("what another router books counts here until it frees it, or is gone", () => {
    const { router: mine } = aRouter({ workers: ["a", "b"] });
    const { router: theirs } = aRouter({ workers: ["a", "b"] });
    const events: BookingEvent[] = [];
    theirs.onBooking = (event) => {
      events.push(event);
      assert.equal(mine.applyRemoteBooking("theirs", event), "applied");
    };
    const load = (router: Router) =>
      router.preview({ tokenIds: aPrompt([1, 2]) }).candidates.map((candidate) => candidate.load);
    const decisions = [1, 2, 3].map((mark) => theirs.route({ requestId: `r${mark}`, tokenIds: aPrompt([1, mark]) }));
    assert.deepEqual(load(mine), load(theirs));
    assert.deepEqual(theirs.liveBookings(), events);
    decisions[0]!.firstToken(0);
    decisions[1]!.release();
    assert.deepEqual(load(mine), load(theirs));
    mine.dropRemoteRouter("theirs");
    assert.deepEqual(
      load(mine).map((one) => one.active_requests),
      [0, 0],
    );
    assert.equal(mine.applyRemoteBooking("theirs", { type: "free", requestId: "r1" }), "unknown-request");
  });

  test("a session that another router bound stays with its worker here, for its time to live", () => {
    const config = { sessionAffinityTtlMs: 1_000 };
    const { router: mine, clock } = aRouter({ workers: ["a", "b", "c"], mode: "random", config });
    const { router: theirs } = aRouter({ workers: ["a", "b", "c"], mode: "random", config });
    theirs.onBooking = (event) => void mine.applyRemoteBooking("theirs", event);
    const request = { tokenIds: aPrompt([1]), sessionId: "s" };
    const decision = theirs.route({ ...request, requestId: "first" });
    decision.firstToken(0);
    const here = (): string => mine.preview(request).reason;
    for (let i = 0; i < 8; i++) {
      assert.equal(mine.preview(request).worker.instance_id, decision.instanceId);
      assert.equal(here(), "the session's worker");
    }
    decision.release();
    clock.advance(999);
    assert.equal(here(), "the session's worker");
    clock.advance(1);
    assert.notEqual(here(), "the session's worker");
  });

  test("what another router decided counts as cached here, while it routes by decisions", () => {
    const config = { kvEvents: false, ttlMs: 1_000 };
    const { router: mine, clock } = aRouter({ workers: ["a", "b"], config });
    const { router: theirs } = aRouter({ workers: ["a", "b"], config });
    theirs.onBooking = (event) => void mine.applyRemoteBooking("theirs", event);
    const request = { tokenIds: aPrompt([1, 2, 3]) };
    const decision = theirs.route({ ...request, requestId: "first" });
    decision.release();
    const overlaps = (): Record<string, number> =>
      Object.fromEntries(mine.preview(request).candidates.map((one) => [one.instance_id, one.overlap_blocks.device]));
    const other = decision.instanceId === "a" ? "b" : "a";
    assert.deepEqual(overlaps(), { [decision.instanceId]: 3, [other]: 0 });
    clock.advance(1_000);
    assert.deepEqual(overlaps(), { a: 0, b: 0 });
  });
});
