import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { EMPTY_LOAD } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import { CandidateColumns, computeCosts } from "../scheduling/cost.ts";
import { DEFAULT_ROUTER_CONFIG } from "../config.ts";
import type { RoutingPolicy, RoutingSnapshot, WorkerCandidate } from "./base.ts";

export function aCandidate(overrides: Partial<WorkerCandidate> = {}): WorkerCandidate {
  return {
    instanceId: "0000000000000001",
    address: "memory://1",
    dpRank: 0,
    activeRequests: 0,
    reportedLoad: EMPTY_LOAD,
    capacity: { maxSequences: 64, maxBatchedTokens: 8_192, totalBlocks: 10_000 },
    ...overrides,
  };
}

/** The columns of one candidate; what is not given is 0. */
export interface CandidateLoad {
  readonly device?: number;
  readonly host?: number;
  readonly disk?: number;
  readonly prefillTokens?: number;
  readonly decodeBlocks?: number;
}

/** A snapshot with its costs computed: 10 prompt blocks of 16 tokens unless told otherwise. */
export function aSnapshot(
  candidates: readonly WorkerCandidate[],
  overrides: Partial<RoutingSnapshot> & { readonly loads?: readonly CandidateLoad[] } = {},
): RoutingSnapshot {
  const { loads = [], ...rest } = overrides;
  const prompt = overrides.prompt ?? { tokens: 160, blocks: 10, blockSizeTokens: 16 };
  const columns = new CandidateColumns();
  columns.resize(candidates.length);
  candidates.forEach((candidate, i) => {
    columns.device[i] = loads[i]?.device ?? 0;
    columns.host[i] = loads[i]?.host ?? 0;
    columns.disk[i] = loads[i]?.disk ?? 0;
    columns.shared[i] = 0;
    columns.prefillTokens[i] = loads[i]?.prefillTokens ?? 0;
    columns.decodeBlocks[i] = loads[i]?.decodeBlocks ?? 0;
    columns.activeRequests[i] = candidate.activeRequests;
    columns.multiplier[i] = 1;
  });
  computeCosts(columns, prompt, DEFAULT_ROUTER_CONFIG);
  return {
    candidates,
    columns,
    prompt,
    settings: DEFAULT_ROUTER_CONFIG,
    turn: 0,
    random: new SeededRandom(1),
    ...rest,
  };
}

/** What every routing policy must keep, whatever it prefers. `skip` names a rule and the reason why it cannot hold. */
export function policyBattery(policy: RoutingPolicy, skip: { readonly shares?: string } = {}): void {
  test(`${policy.name}: chooses one of the candidates, whatever their number, overlap and load`, () => {
    const candidate = fc.record({
      activeRequests: fc.nat(1_000),
      running: fc.nat(1_000),
      waiting: fc.nat(1_000),
      maxSequences: fc.constantFrom(0, 1, 8, 256),
      device: fc.nat(10),
      host: fc.nat(10),
      prefillTokens: fc.nat(100_000),
      decodeBlocks: fc.nat(20_000),
    });
    const settings = fc.record({
      temperature: fc.constantFrom(0, 0.5, 100),
      maxImbalance: fc.constantFrom(0, 0.5, 1, 2),
    });
    fc.assert(
      fc.property(
        fc.array(candidate, { minLength: 1, maxLength: 50 }),
        settings,
        fc.nat(0x3fffffff),
        fc.nat(),
        (loads, policySettings, turn, seed) => {
          const candidates = loads.map((load, index) =>
            aCandidate({
              instanceId: index.toString(16).padStart(16, "0"),
              activeRequests: load.activeRequests,
              reportedLoad: { ...EMPTY_LOAD, runningRequests: load.running, waitingRequests: load.waiting },
              capacity: { maxSequences: load.maxSequences, maxBatchedTokens: 8_192, totalBlocks: 10_000 },
            }),
          );
          const snapshot = aSnapshot(candidates, {
            loads,
            settings: policySettings,
            turn,
            random: new SeededRandom(seed),
          });
          const before = JSON.stringify([candidates, snapshot.columns]);
          const choice = policy.choose(snapshot);
          assert.ok(Number.isInteger(choice.index) && choice.index >= 0 && choice.index < candidates.length);
          assert.notEqual(choice.reason, "");
          assert.equal(JSON.stringify([candidates, snapshot.columns]), before, "a policy must not change its snapshot");
        },
      ),
    );
  });

  test(`${policy.name}: the same snapshot and seed give the same choice`, () => {
    const candidates = [1, 2, 3, 4].map((id) => aCandidate({ instanceId: String(id).padStart(16, "0") }));
    const first = policy.choose(aSnapshot(candidates, { turn: 7, random: new SeededRandom(5) }));
    const second = policy.choose(aSnapshot(candidates, { turn: 7, random: new SeededRandom(5) }));
    assert.deepEqual(first, second);
  });

  test(`${policy.name}: equal workers all get their share`, { skip: skip.shares ?? false }, () => {
    const candidates = [1, 2, 3, 4].map((id) => aCandidate({ instanceId: String(id).padStart(16, "0") }));
    const random = new SeededRandom(11);
    const counts = [0, 0, 0, 0];
    for (let turn = 0; turn < 4_000; turn++) counts[policy.choose(aSnapshot(candidates, { turn, random })).index]!++;
    for (const count of counts) assert.ok(count > 800 && count < 1_200, `uneven shares: ${counts.join(", ")}`);
  });
}
