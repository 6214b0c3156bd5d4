import assert from "node:assert/strict";
import { test } from "node:test";
import { DynamoError } from "../errors/index.ts";
import { Metrics } from "../observability/index.ts";
import { ManualClock, SeededRandom } from "../std/index.ts";
import { INHIBITION_MS, ROUTING_POLICIES, Router, type RouterMode } from "./index.ts";

function aRouter(mode: RouterMode = "least-loaded"): { router: Router; clock: ManualClock; metrics: Metrics } {
  const clock = new ManualClock();
  const metrics = new Metrics();
  const router = new Router({
    model: "m",
    policy: ROUTING_POLICIES[mode],
    clock,
    random: new SeededRandom(3),
    metrics,
  });
  return { router, clock, metrics };
}

const request = { tokenIds: Uint32Array.of(1, 2, 3) };

test("router: without workers it says so", () => {
  const { router } = aRouter();
  assert.throws(
    () => router.route(request),
    (error) => error instanceof DynamoError && error.reason === "no-workers",
  );
});

test("router: bookings spread a burst before any load report arrives, and release gives them back once", () => {
  const { router } = aRouter();
  router.addWorker("a", "memory://a");
  router.addWorker("b", "memory://b");
  const decisions = Array.from({ length: 10 }, () => router.route(request));
  assert.deepEqual(
    router.workers.map((worker) => worker.activeRequests),
    [5, 5],
  );
  for (const decision of decisions) {
    decision.release();
    decision.release();
  }
  assert.deepEqual(
    router.workers.map((worker) => worker.activeRequests),
    [0, 0],
  );
});

test("router: an inhibited worker is left out until its time is over", () => {
  const { router, clock } = aRouter("round-robin");
  router.addWorker("a", "memory://a");
  router.addWorker("b", "memory://b");
  router.inhibit("a");
  assert.deepEqual(
    [1, 2, 3].map(() => router.route(request).instanceId),
    ["b", "b", "b"],
  );
  clock.advance(INHIBITION_MS);
  assert.ok([1, 2].map(() => router.route(request).instanceId).includes("a"));
});

test("router: when every worker is inhibited one is tried all the same", () => {
  const { router } = aRouter();
  router.addWorker("a", "memory://a");
  router.inhibit("a");
  assert.equal(router.route(request).instanceId, "a");
});

test("router: workers already tried are not chosen again, not even when the others are inhibited", () => {
  const { router } = aRouter();
  router.addWorker("a", "memory://a");
  router.addWorker("b", "memory://b");
  router.inhibit("b");
  assert.equal(router.route({ ...request, excluded: new Set(["a"]) }).instanceId, "b");
  assert.throws(() => router.route({ ...request, excluded: new Set(["a", "b"]) }), /no worker that serves m/);
});

test("router: a removed worker gets nothing, and releasing its booking later harms nobody", () => {
  const { router } = aRouter();
  router.addWorker("a", "memory://a");
  const decision = router.route(request);
  router.removeWorker("a");
  router.addWorker("b", "memory://b");
  assert.equal(router.route(request).instanceId, "b");
  decision.release();
  assert.deepEqual(
    router.workers.map((worker) => worker.activeRequests),
    [1],
  );
});

test("router: a worker that comes back under a new address starts with a clean count", () => {
  const { router } = aRouter();
  router.addWorker("a", "memory://1");
  router.route(request);
  router.addWorker("a", "memory://2");
  assert.equal(router.route(request).address, "memory://2");
  assert.equal(router.workers[0]!.activeRequests, 1);
});

test("router: a worker that just failed is not counted as available until its mark expires, unless all did", () => {
  const { router, clock } = aRouter();
  for (const id of ["a", "b", "c"]) router.addWorker(id, `host:${id}`);
  assert.equal(router.availableCount, 3);
  router.inhibit("a");
  clock.advance(1_000);
  router.inhibit("b");
  assert.equal(router.availableCount, 1);
  router.inhibit("c");
  assert.equal(router.availableCount, 3, "one of them must be tried");
  clock.advance(INHIBITION_MS - 1_000);
  assert.equal(router.availableCount, 1, "the first mark has expired");
  clock.advance(1_000);
  assert.equal(router.availableCount, 3);
});
