import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import type { ModelCard } from "../protocol/index.ts";
import { electFleet, fleetConflict, type FleetMember } from "./fleet.ts";

const CARD: ModelCard = {
  version: 1,
  name: "m",
  engine: "vllm",
  engineVersion: "0.29.0",
  contextLength: 2_048,
  blockSizeTokens: 16,
  totalBlocks: 100,
  maxSequences: 8,
  maxBatchedTokens: 512,
  dataParallelSize: 1,
  vocabularySize: 259,
  tokenizerSha256: "aa".repeat(32),
  tokenizerBytes: 10,
  types: ["chat", "completions"],
  created: 100,
  role: "agg",
  blockBytes: 0,
  modelFingerprint: "",
};

const member = (instanceId: string, more: Partial<ModelCard> = {}): FleetMember => ({
  instanceId,
  card: { ...CARD, ...more },
});

/** The same rules, one question after the other. */
function naiveFleet(members: readonly FleetMember[]): { leader: string; left: string[] } {
  const same = (a: FleetMember, b: FleetMember): boolean =>
    a.card.tokenizerSha256 === b.card.tokenizerSha256 && a.card.vocabularySize === b.card.vocabularySize && a.card.blockSizeTokens === b.card.blockSizeTokens;
  const isOlder = (a: FleetMember, b: FleetMember): boolean =>
    a.card.created < b.card.created || (a.card.created === b.card.created && a.instanceId < b.instanceId);
  const oldest = (some: readonly FleetMember[]): FleetMember => some.find((one) => some.every((other) => one === other || isOlder(one, other)))!;
  const kindOf = (one: FleetMember): FleetMember[] => members.filter((other) => same(one, other));
  const most = Math.max(...members.map((one) => kindOf(one).length));
  const leader = oldest(members.filter((one) => kindOf(one).length === most));
  const left = members.filter((one) => !same(one, leader) || one.card.contextLength < leader.card.contextLength);
  return { leader: leader.instanceId, left: left.map(({ instanceId }) => instanceId).toSorted() };
} // prettier-ignore

describe("fleet", () => {
  test("engines, versions, longer contexts, exact and estimated events serve together", () => {
    const others: Partial<ModelCard>[] = [
      { engine: "llama-server", engineVersion: "b11549", kvEvents: "estimated" },
      { engine: "openai", tokens: "estimated" },
      { engineVersion: "0.22.1" },
      { contextLength: 4_096, totalBlocks: 7, maxSequences: 1, answerForms: true },
    ];
    for (const more of others) assert.equal(fleetConflict(CARD, { ...CARD, ...more }), undefined);
  });

  test("what would mean something else is left out, with the fix", () => {
    for (const [more, why] of [
      [{ tokenizerSha256: "bb".repeat(32) }, /tokenizer or chat template \(SHA-256 bbbbbbbbbbbb\).*aaaaaaaaaaaa.*--custom-jinja-template, or another --model-name/],
      [{ vocabularySize: 300 }, /vocabulary has 300 tokens.*259/],
      [{ blockSizeTokens: 32 }, /KV blocks have 32 tokens.*--kv-cache-block-size=16/],
      [{ contextLength: 512 }, /context of 512 tokens is shorter than the model's 2048.*--context-length=2048/],
    ] as const) {
      assert.match(fleetConflict(CARD, { ...CARD, ...more })!, why);
    }
  }); // prettier-ignore

  test("a split pool is of one engine, version and model: others beside it are left out", () => {
    const split = { ...CARD, role: "prefill", blockBytes: 64, modelFingerprint: "x" } as const;
    assert.equal(fleetConflict(split, { ...split, role: "decode" }), undefined);
    assert.match(fleetConflict(split, { ...split, role: "decode", engineVersion: "0.28" })!, /engine version/);
    assert.match(fleetConflict(split, { ...CARD, engine: "llama-server" })!, /the llama-server engine cannot export KV blocks/);
  }); // prettier-ignore

  test("most win; of as many, those with the oldest; the same from any order, and as the naive way says", () => {
    const arbitrary = fc.uniqueArray(
      fc.record({
        instanceId: fc.stringMatching(/^[0-9a-f]{4}$/),
        card: fc.record({ tokenizerSha256: fc.constantFrom("a", "b"), blockSizeTokens: fc.constantFrom(16, 32), contextLength: fc.constantFrom(512, 1_024), created: fc.nat(5) }),
      }),
      { selector: ({ instanceId }) => instanceId, minLength: 1, maxLength: 12 },
    ); // prettier-ignore
    fc.assert(
      fc.property(arbitrary, fc.nat(), (parts, rotation) => {
        const members = parts.map(({ instanceId, card }) => member(instanceId, card));
        const at = rotation % members.length;
        const rotated = [...members.slice(at), ...members.slice(0, at)].toReversed();
        const wanted = naiveFleet(members);
        for (const some of [members, rotated]) {
          const { leader, problems } = electFleet(some);
          assert.equal(some.find(({ card }) => card === leader)!.instanceId, wanted.leader);
          assert.deepEqual([...problems.keys()].toSorted(), wanted.left);
        }
      }),
    );
  });
});
