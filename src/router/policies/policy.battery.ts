import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { EMPTY_LOAD } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import type { RoutingPolicy, WorkerCandidate } from "./base.ts";

export function aCandidate(overrides: Partial<WorkerCandidate> = {}): WorkerCandidate {
  return { instanceId: "0000000000000001", address: "memory://1", activeRequests: 0, reportedLoad: EMPTY_LOAD, ...overrides };
}

/** What every routing policy must keep, whatever it prefers. */
export function policyBattery(policy: RoutingPolicy): void {
  test(`${policy.name}: chooses one of the candidates, whatever their number and load`, () => {
    const candidate = fc.record({ activeRequests: fc.nat(1_000), running: fc.nat(1_000), waiting: fc.nat(1_000) });
    fc.assert(
      fc.property(fc.array(candidate, { minLength: 1, maxLength: 50 }), fc.nat(0x3fffffff), fc.nat(), (loads, turn, seed) => {
        const candidates = loads.map((load, index) =>
          aCandidate({
            instanceId: index.toString(16).padStart(16, "0"),
            activeRequests: load.activeRequests,
            reportedLoad: { ...EMPTY_LOAD, runningRequests: load.running, waitingRequests: load.waiting },
          }),
        );
        const before = JSON.stringify(candidates);
        const choice = policy.choose({ candidates, turn, random: new SeededRandom(seed) });
        assert.ok(Number.isInteger(choice.index) && choice.index >= 0 && choice.index < candidates.length);
        assert.notEqual(choice.reason, "");
        assert.equal(JSON.stringify(candidates), before, "a policy must not change its snapshot");
      }),
    );
  });

  test(`${policy.name}: the same snapshot and seed give the same choice`, () => {
    const candidates = [1, 2, 3, 4].map((id) => aCandidate({ instanceId: String(id).padStart(16, "0") }));
    const first = policy.choose({ candidates, turn: 7, random: new SeededRandom(5) });
    const second = policy.choose({ candidates, turn: 7, random: new SeededRandom(5) });
    assert.deepEqual(first, second);
  });

  test(`${policy.name}: equal workers all get their share`, () => {
    const candidates = [1, 2, 3, 4].map((id) => aCandidate({ instanceId: String(id).padStart(16, "0") }));
    const random = new SeededRandom(11);
    const counts = [0, 0, 0, 0];
    for (let turn = 0; turn < 4_000; turn++) counts[policy.choose({ candidates, turn, random }).index]!++;
    for (const count of counts) assert.ok(count > 800 && count < 1_200, `uneven shares: ${counts.join(", ")}`);
  });
}
