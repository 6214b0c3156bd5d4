import assert from "node:assert/strict";
import { test } from "node:test";
import type { EngineInfo } from "../engines/index.ts";
import type { ModelCard, WorkerRole } from "../protocol/index.ts";
import { registerCard } from "../runtime/component/index.ts";
import { MemoryDiscovery, MemoryStore } from "../runtime/discovery/index.ts";
import { systemClock } from "../std/index.ts";
import { checkRole, sequencesThatFit } from "./check-pair.ts";

const INFO = {
  engine: "llama",
  engineVersion: "1",
  contextLength: 2_048,
  blockSizeTokens: 16,
  totalBlocks: 512,
  maxSequences: 8,
  maxBatchedTokens: 512,
  dataParallelSize: 1,
  vocabularySize: 100,
} as const;
const ENGINE: EngineInfo = { ...INFO, blockBytes: 368_640 };

const CARD: ModelCard = {
  ...INFO,
  version: 1,
  name: "m",
  tokenizerSha256: "aa".repeat(32),
  tokenizerBytes: 1,
  types: ["completions"],
  created: 1,
  role: "prefill",
  blockBytes: ENGINE.blockBytes,
  modelFingerprint: "0123456789abcdef",
};

/** A worker of `role` starts beside `others`. */
async function starts(
  role: WorkerRole,
  others: readonly Partial<ModelCard>[],
  own: Partial<ModelCard> = {},
): Promise<void> {
  const discovery = new MemoryDiscovery({ store: new MemoryStore(), clock: systemClock });
  const lease = await discovery.openLease();
  try {
    for (const [i, other] of others.entries()) {
      const ref = {
        namespace: "n",
        component: "backend",
        endpoint: "generate",
        instanceId: String(i).padStart(16, "0"),
      };
      await registerCard(lease, ref, { ...CARD, ...other });
    }
    const card = { ...CARD, ...own, role };
    await checkRole(role, card, { ...ENGINE, blockBytes: card.blockBytes }, discovery, "n");
  } finally {
    await lease.close();
    await discovery.close();
  }
}

function refused(starting: Promise<void>, message: RegExp): Promise<void> {
  return assert.rejects(starting, (error: { reason: string; publicMessage: string }) => {
    assert.equal(error.reason, "invalid-config");
    assert.match(error.publicMessage, message);
    return true;
  });
}

test("known-bad pairs: each is refused at start, whichever side comes later, with what differs and both values", async () => {
  const pairs: readonly [Partial<ModelCard>, RegExp][] = [
    [{ blockSizeTokens: 32 }, /KV block size in tokens is 32, that of the model's (prefill|decode) worker is 16/],
    [{ blockBytes: 737_280 }, /KV block in bytes, which follows from data type and layout, is 737280, .* is 368640/],
    [
      { modelFingerprint: "fedcba9876543210" },
      /model file \(fingerprint\) is fedcba9876543210, .* is 0123456789abcdef/,
    ],
    [{ tokenizerSha256: "bb".repeat(32) }, /tokenizer \(SHA-256\) is (bb){32}, .* is (aa){32}/],
    [{ engine: "other" }, /engine is other, .* is llama/],
    [{ engineVersion: "2" }, /engine version is 2, .* is 1/],
    [{ blockBytes: 0 }, /engine cannot export/],
  ];
  for (const [own, message] of pairs) {
    await refused(starts("decode", [{ role: "prefill" }], own), message);
    await refused(starts("prefill", [{ role: "decode" }], own), message);
  }
  await refused(starts("prefill", [{ role: "decode", blockBytes: 0 }]), /the llama engine cannot export KV blocks/);
});

test("known-bad pairs: too little KV memory for decode says how many sequences fit, whichever side comes later", async () => {
  const small = { contextLength: 1_024, totalBlocks: 192 };
  await refused(
    starts("decode", [{ role: "prefill" }], small),
    /its KV memory of 3072 tokens holds 1 sequences of the 2048 tokens that the model's prefill worker takes/,
  );
  await refused(
    starts("prefill", [{ role: "decode", ...small }]),
    /decode worker's KV memory of 3072 tokens holds 1 sequences of the 2048 tokens that this one takes/,
  );
  await starts("decode", [{ role: "prefill", ...small }]);
  await starts("prefill", [{ role: "decode" }], small);
  assert.equal(sequencesThatFit(ENGINE), 4);
});

test("known-bad pairs: who has no part in handoffs, and other models, are nobody's pair", async () => {
  const unlike = { blockSizeTokens: 32, blockBytes: 0, engine: "other" };
  await starts("agg", [{ role: "prefill" }, { role: "decode" }], unlike);
  await starts("decode", [{ role: "agg", ...unlike }]);
  await starts("decode", [{ role: "prefill", name: "another", ...unlike }]);
  await starts("decode", [{ role: "prefill" }, { role: "decode" }]);
});
