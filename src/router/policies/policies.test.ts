import assert from "node:assert/strict";
import { test } from "node:test";
import { EMPTY_LOAD } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import { ROUTING_POLICIES } from "./index.ts";
import { aCandidate, policyBattery } from "./policy.battery.ts";

for (const policy of Object.values(ROUTING_POLICIES)) policyBattery(policy);

test("round-robin: takes each worker in turn", () => {
  const candidates = [1, 2, 3].map((id) => aCandidate({ instanceId: String(id) }));
  const chosen = [0, 1, 2, 3].map(
    (turn) => ROUTING_POLICIES["round-robin"].choose({ candidates, turn, random: new SeededRandom(1) }).index,
  );
  assert.deepEqual(chosen, [0, 1, 2, 0]);
});

test("least-loaded: counts its own requests before the worker reports them, and those of other routers after", () => {
  const busyHere = aCandidate({ instanceId: "a", activeRequests: 3 });
  const busyElsewhere = aCandidate({ instanceId: "b", reportedLoad: { ...EMPTY_LOAD, runningRequests: 4, waitingRequests: 1 } });
  const idle = aCandidate({ instanceId: "c", activeRequests: 1 });
  const choice = ROUTING_POLICIES["least-loaded"].choose({
    candidates: [busyHere, busyElsewhere, idle],
    turn: 0,
    random: new SeededRandom(1),
  });
  assert.equal(choice.index, 2);
});
