import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { EMPTY_LOAD } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import { DEFAULT_ROUTER_CONFIG } from "../config.ts";
import { ROUTING_POLICIES, findPolicy, registerPolicy } from "./index.ts";
import { aCandidate, aSnapshot, policyBattery, type CandidateLoad } from "./policy.battery.ts";

const FOUR = [1, 2, 3, 4].map((id) => aCandidate({ instanceId: String(id).padStart(16, "0") }));

for (const policy of Object.values(ROUTING_POLICIES)) {
  policyBattery(policy, policy.name === "direct" ? { shares: "the caller decides" } : {});
}

test("round-robin: takes each worker in turn", () => {
  const candidates = FOUR.slice(0, 3);
  const chosen = [0, 1, 2, 3].map(
    (turn) => ROUTING_POLICIES["round-robin"].choose(aSnapshot(candidates, { turn })).index,
  );
  assert.deepEqual(chosen, [0, 1, 2, 0]);
});

test("least-loaded: counts its own requests before the worker reports them, and those of other routers after", () => {
  const busyHere = aCandidate({ instanceId: "a", activeRequests: 3 });
  const busyElsewhere = aCandidate({
    instanceId: "b",
    reportedLoad: { ...EMPTY_LOAD, runningRequests: 4, waitingRequests: 1 },
  });
  const idle = aCandidate({ instanceId: "c", activeRequests: 1 });
  assert.equal(ROUTING_POLICIES["least-loaded"].choose(aSnapshot([busyHere, busyElsewhere, idle])).index, 2);
});

test("power-of-two: never takes the most loaded of three, and takes the least loaded twice out of three times", () => {
  const candidates = [5, 9, 1].map((activeRequests, id) => aCandidate({ instanceId: String(id), activeRequests }));
  const random = new SeededRandom(7);
  const counts = [0, 0, 0];
  for (let i = 0; i < 3_000; i++)
    counts[ROUTING_POLICIES["power-of-two"].choose(aSnapshot(candidates, { random })).index]!++;
  assert.equal(counts[1], 0);
  assert.ok(Math.abs(counts[2]! - 2_000) < 150, `least loaded taken ${counts[2]} times of 3000`);
});

describe("kv", () => {
  const choose = (loads: readonly CandidateLoad[], seed = 1, temperature = 0): number =>
    ROUTING_POLICIES.kv.choose(
      aSnapshot(FOUR.slice(0, loads.length), {
        loads,
        random: new SeededRandom(seed),
        settings: { ...DEFAULT_ROUTER_CONFIG, temperature },
      }),
    ).index;

  test("takes the lowest cost: the reference's example chooses worker 2", () => {
    const loads = [
      { device: 2, decodeBlocks: 10 },
      { device: 5, decodeBlocks: 5 },
      { device: 8, decodeBlocks: 9 },
    ];
    assert.equal(choose(loads), 1);
  });

  test("a longer prefix wins at equal load, and a lower load at equal prefix", () => {
    assert.equal(choose([{ device: 3 }, { device: 4 }, { device: 0 }]), 1);
    assert.equal(
      choose([
        { device: 4, decodeBlocks: 9 },
        { device: 4, decodeBlocks: 8 },
      ]),
      1,
    );
    assert.equal(
      choose([
        { device: 4, prefillTokens: 32 },
        { device: 4, prefillTokens: 16 },
      ]),
      1,
    );
  });

  test("ties are drawn uniformly among the tied only", () => {
    const random = new SeededRandom(3);
    const counts = [0, 0, 0, 0];
    for (let i = 0; i < 3_000; i++) {
      const loads = [{ device: 5 }, { device: 5 }, { device: 1 }, { device: 5 }];
      counts[ROUTING_POLICIES.kv.choose(aSnapshot(FOUR, { loads, random })).index]!++;
    }
    assert.equal(counts[2], 0);
    for (const index of [0, 1, 3]) assert.ok(Math.abs(counts[index]! - 1_000) < 120, counts.join(", "));
  });

  test("with a temperature choices follow exp(-normalised cost / T), as computed by hand", () => {
    const counts = [0, 0, 0];
    // Costs 10, 5, 0 above the minimum: normalised 1, 0.5, 0.
    const loads = [{ device: 0 }, { device: 5 }, { device: 10 }];
    const snapshot = (seed: number): number => choose(loads, seed, 0.5);
    for (let seed = 0; seed < 6_000; seed++) counts[snapshot(seed)]!++;
    const weights = [Math.exp(-2), Math.exp(-1), 1];
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    counts.forEach((count, i) => {
      const expected = (6_000 * weights[i]!) / total;
      assert.ok(Math.abs(count - expected) < 5 * Math.sqrt(expected), `${i}: ${count}, expected ${expected}`);
    });
  });

  test("a worker at the bound on imbalance is passed over, however much it has cached", () => {
    const hot = aCandidate({ instanceId: "a", activeRequests: 16 });
    const idle = [1, 2, 3].map((id) => aCandidate({ instanceId: `b${id}` }));
    const loads = [{ device: 10 }];
    const choice = ROUTING_POLICIES.kv.choose(aSnapshot([hot, ...idle], { loads }));
    assert.notEqual(choice.index, 0);
    assert.match(choice.reason, /bound on imbalance/);
    const unbounded = aSnapshot([hot, ...idle], { loads, settings: { ...DEFAULT_ROUTER_CONFIG, maxImbalance: 0 } });
    assert.equal(ROUTING_POLICIES.kv.choose(unbounded).index, 0);
  });
});

describe("stay-until-saturated", () => {
  const policy = ROUTING_POLICIES["stay-until-saturated"];
  const loads = [{ device: 9, decodeBlocks: 500 }, { device: 0 }];
  const two = FOUR.slice(0, 2);

  test("keeps to the longest prefix where the cost would already leave it", () => {
    assert.equal(ROUTING_POLICIES.kv.choose(aSnapshot(two, { loads })).index, 1);
    assert.equal(policy.choose(aSnapshot(two, { loads })).index, 0);
  });

  test("leaves it when its sequences, its batch or its blocks are full", () => {
    const capacity = { maxSequences: 4, maxBatchedTokens: 1_024, totalBlocks: 1_000 };
    const worker = (activeRequests: number) => aCandidate({ activeRequests, capacity });
    const off = { ...DEFAULT_ROUTER_CONFIG, maxImbalance: 0 };
    const at = (first: number, load: CandidateLoad): number =>
      policy.choose(aSnapshot([worker(first), worker(0)], { loads: [{ device: 9, ...load }, {}], settings: off }))
        .index;
    assert.equal(at(3, { prefillTokens: 1_023, decodeBlocks: 899 }), 0);
    assert.equal(at(4, {}), 1);
    assert.equal(at(0, { prefillTokens: 1_024 }), 1);
    assert.equal(at(0, { decodeBlocks: 900 }), 1);
  });
});

test("policies: one of a user's own is found by its name, and cannot take the name of one of ours", () => {
  const last = { name: "last", choose: () => ({ index: 0, reason: "mine" }) };
  assert.equal(findPolicy("my-policy"), undefined);
  registerPolicy("my-policy", last);
  assert.equal(findPolicy("my-policy"), last);
  assert.throws(() => registerPolicy("kv", last), RangeError);
  assert.equal(findPolicy("kv"), ROUTING_POLICIES.kv);
  assert.equal(findPolicy("constructor"), undefined);
});
