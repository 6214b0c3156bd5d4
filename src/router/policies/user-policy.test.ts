import assert from "node:assert/strict";
import { test } from "node:test";
import type { RoutingPolicy } from "./base.ts";
import { aCandidate, aSnapshot, policyBattery } from "./policy.battery.ts";
import { userPolicy } from "./user-policy.ts";

const mostCached: RoutingPolicy = {
  name: "most-cached",
  usesOverlap: true,
  choose({ candidates, columns }) {
    let best = 0;
    for (let i = 1; i < candidates.length; i++) if (columns.device[i]! > columns.device[best]!) best = i;
    return { index: best, reason: `${columns.device[best]} blocks` };
  },
};

policyBattery(userPolicy(mostCached), { shares: "it looks at overlap alone" });

test("a user's policy: what has not the form of one is refused with what was expected", () => {
  const wrong: readonly [unknown, RegExp][] = [
    [undefined, /expected an object .* got undefined/],
    [null, /got null/],
    [() => 1, /got function/],
    [{ choose: () => ({ index: 0 }) }, /name: expected .* got nothing/],
    [{ name: "Mine!", choose: () => ({ index: 0 }) }, /name: expected .* got "Mine!"/],
    [{ name: "mine" }, /choose: expected a function, got undefined/],
    [{ ...mostCached, usesOverlap: 1 }, /usesOverlap: expected true or false, got number/],
    [
      { name: "mine", choose: () => ({ index: 1, reason: "" }) },
      /with 1 candidates: .*index: expected .* 0 to 0, got 1/,
    ],
    [{ name: "mine", choose: () => undefined }, /got undefined/],
    [{ name: "mine", choose: async () => ({ index: 0 }) }, /got undefined/],
    [{ name: "mine", choose: () => { throw new Error("no idea"); } }, /it threw Error: no idea/], // prettier-ignore
  ];
  for (const [exported, message] of wrong) {
    assert.throws(() => userPolicy(exported), { reason: "invalid-config", message });
  }
});

test("a user's policy: one that fails later fails that decision, and says who", () => {
  let isBroken = false;
  const policy = userPolicy({ name: "mine", choose: () => ({ index: isBroken ? Number.NaN : 0, reason: "first" }) });
  const snapshot = aSnapshot([aCandidate(), aCandidate()]);
  assert.deepEqual(policy.choose(snapshot), { index: 0, reason: "first" });
  isBroken = true;
  assert.throws(() => policy.choose(snapshot), { reason: "internal", diagnostic: /policy mine: index: .* got NaN/ });
});
