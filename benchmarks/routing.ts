import { Metrics } from "../src/observability/index.ts";
import type { KvStored } from "../src/protocol/index.ts";
import {
  FlatKvIndex,
  NaiveKvIndex,
  OverlapScores,
  ROUTING_POLICIES,
  Router,
  type RoutingDecision,
} from "../src/router/index.ts";
import { NaiveActiveSequences, type NaiveBooking } from "../src/router/scheduling/naive-active-sequences.ts";
import { SeededRandom, systemClock } from "../src/std/index.ts";
import { blockHashSeed, hashBlocks } from "../src/tokens/index.ts";
import { paired } from "./harness.ts";

/**
 * One routing decision in kv mode, from token ids to a booked worker and its release: hashing, lookup, load, cost, choice,
 * record. Prompts of 1,024 tokens in blocks of 16: a shared half of 32 blocks, one of 64 documents, and a tail of its own.
 * Two requests per worker are in flight all the time. Beside it a plain version over Maps and objects, in the same run.
 */
const BLOCK = 16;
const PROMPT_TOKENS = 1_024;
const DOCUMENTS = 64;
const SHARED_BLOCKS = 32;
const SEED = blockHashSeed();

function documentTokens(document: number): Uint32Array {
  return Uint32Array.from({ length: SHARED_BLOCKS * BLOCK }, (_, i) => (document * 7_919 + i * 31) % 49_152);
}

function prompts(count: number): Uint32Array[] {
  const random = new SeededRandom(5);
  return Array.from({ length: count }, (_, i) => {
    const tokens = Uint32Array.from({ length: PROMPT_TOKENS }, () => random.nextU32() % 49_152);
    tokens.set(documentTokens(i % DOCUMENTS));
    return tokens;
  });
}

/** Each document is cached on a few workers, whole or in part. */
function fill(apply: (worker: number, event: KvStored) => void, workers: number): void {
  for (let document = 0; document < DOCUMENTS; document++) {
    const { sequenceHashes, localHashes } = hashBlocks(documentTokens(document), BLOCK, SEED);
    for (let copy = 0; copy < Math.min(4, workers); copy++) {
      const blocks = SHARED_BLOCKS >> copy;
      apply((document * 13 + copy * 7) % workers, {
        type: "stored",
        dpRank: 0,
        tier: "device",
        parentHash: undefined,
        startBlock: 0,
        sequenceHashes: sequenceHashes.slice(0, 2 * blocks),
        localHashes: localHashes.slice(0, 2 * blocks),
      });
    }
  }
}

const idOf = (worker: number): string => worker.toString(16).padStart(16, "0");

function routerRound(workers: number, requests: readonly Uint32Array[]): () => number {
  const index = new FlatKvIndex();
  const router = new Router({
    model: "m",
    policy: ROUTING_POLICIES.kv,
    clock: systemClock,
    random: new SeededRandom(1),
    metrics: new Metrics(),
    blockSizeTokens: BLOCK,
    index,
  });
  const capacity = { maxSequences: 256, maxBatchedTokens: 8_192, totalBlocks: 100_000 };
  for (let worker = 0; worker < workers; worker++) router.addWorker(idOf(worker), `memory://${worker}`, { capacity });
  fill((worker, event) => index.apply(index.rankOf(idOf(worker), 0), event), workers);
  const inFlight: RoutingDecision[] = [];
  let next = 0;
  const one = (): void => {
    if (inFlight.length >= 2 * workers) inFlight.shift()!.release();
    const decision = router.route({ requestId: "r", tokenIds: requests[next++ % requests.length]! });
    decision.firstToken(0);
    inFlight.push(decision);
  };
  for (let i = 0; i < 2 * workers; i++) one();
  return () => {
    const startMs = performance.now();
    for (let i = 0; i < requests.length; i++) one();
    return ((performance.now() - startMs) * 1_000) / requests.length;
  };
}

function naiveRound(workers: number, requests: readonly Uint32Array[]): () => number {
  const index = new NaiveKvIndex();
  const loads = new NaiveActiveSequences(BLOCK);
  for (let worker = 0; worker < workers; worker++) index.rankOf(idOf(worker), 0);
  fill((worker, event) => index.apply(index.rankOf(idOf(worker), 0), event), workers);
  const inFlight: NaiveBooking[] = [];
  const scores = new OverlapScores();
  let next = 0;
  const one = (): void => {
    if (inFlight.length >= 2 * workers) loads.bookings.delete(inFlight.shift()!);
    const tokenIds = requests[next++ % requests.length]!;
    const { sequenceHashes, blockCount } = hashBlocks(tokenIds, BLOCK, SEED);
    index.findMatches(sequenceHashes, blockCount, scores);
    let best = { worker: 0, cost: Infinity };
    for (let worker = 0; worker < workers; worker++) {
      const overlap = scores.device[worker]!;
      const prefill = Math.max(0, (loads.prefillTokens(worker) + tokenIds.length) / BLOCK - overlap);
      const blocks = loads.decodeBlocks(worker) + blockCount - loads.shared(worker, sequenceHashes, blockCount);
      if (prefill + blocks < best.cost) best = { worker, cost: prefill + blocks };
    }
    const prefillTokens = tokenIds.length - scores.device[best.worker]! * BLOCK;
    const booking = loads.add(best.worker, { sequenceHashes, blockCount, prefillTokens, expectedOutputTokens: 0 });
    booking.isPrefilled = true;
    inFlight.push(booking);
  };
  for (let i = 0; i < Math.min(8, 2 * workers); i++) one();
  return () => {
    const startMs = performance.now();
    for (let i = 0; i < requests.length; i++) one();
    return ((performance.now() - startMs) * 1_000) / requests.length;
  };
}

/** The naive one looks at every booking for every worker: fewer requests per round, or it takes minutes. */
const NAIVE_REQUESTS: Readonly<Record<number, number>> = { 4: 64, 100: 4, 1_000: 1 };

export async function run(): Promise<void> {
  console.log(
    `one kv decision, ${PROMPT_TOKENS} tokens in blocks of ${BLOCK}, 2 requests per worker in flight, us (median of rounds)`,
  );
  for (const workers of [4, 100, 1_000]) {
    const ours = routerRound(workers, prompts(512));
    for (let warm = 0; warm < 4; warm++) ours();
    const naive = naiveRound(workers, prompts(NAIVE_REQUESTS[workers]!));
    const { medianA, medianB } = await paired(ours, naive, { rounds: 5 });
    const perWorker = workers === 1_000 ? ` (${((medianA * 1_000) / workers).toFixed(0)} ns per worker)` : "";
    console.log(
      `  ${String(workers).padStart(5)} workers: router ${medianA.toFixed(1)}${perWorker}, naive ${medianB.toFixed(0)}, ${(medianB / medianA).toFixed(0)} times`,
    );
  }
}

if (import.meta.main) await run();
