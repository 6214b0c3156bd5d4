import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { KvEvent } from "../src/protocol/index.ts";
import { FlatKvIndex, NaiveKvIndex, OverlapScores, type KvIndex } from "../src/router/indexer/index.ts";
import { SeededRandom } from "../src/std/index.ts";
import { machineLine, median, table } from "./harness.ts";

/**
 * The KV index under a router's load, after the method of Dynamo's indexer benchmark (open loop, drain counted): requests
 * of a trace go to workers that keep an LRU cache each; what they store and evict becomes events; then queries and events
 * are replayed alone, at fixed times, queries before writes. A block operation is one block hash of a query, a stored or
 * a removed event.
 *
 *   applied    events only, as fast as they go: block operations per second of the writer
 *   overload   all operations offered at 5 times what the target asks; done = when the last one has been applied
 *   keep up    offered at half the target: time of each lookup, queue not included
 *
 * The trace is Mooncake's conversation trace (DYN_TRACES names its folder) or, without it, a synthetic one with shared
 * prefixes. One trace id is 512 tokens: `BLOCKS_PER_ID` blocks. Targets: 3 M block operations per second and core, a lookup
 * of 100 to 200 blocks in 3 us (p50) and 10 us (p99), 40 bytes per membership.
 */
const TRACE_FILE = "mooncake_fast25_conversation_trace.jsonl";
/** Blocks of 64 tokens, so that the trace's median prompt (6,909 tokens) is a lookup of 108 blocks. */
const BLOCKS_PER_ID = 8;
const WORKERS = [16, 128] as const;
/** Blocks one worker holds, as Dynamo's benchmark has it. */
const WORKER_BLOCKS = 16_384;
const TARGET_OPS_PER_SECOND = 3e6;
const LOOKUP_SAMPLES = 20_000;
const ROUNDS = 5;

type Chain = Uint32Array;
type Operation =
  | { readonly kind: "query"; readonly chain: Chain; readonly blocks: number }
  | { readonly kind: "event"; readonly rank: number; readonly event: KvEvent; readonly blocks: number };

function loadRequests(random: SeededRandom): { name: string; requests: number[][] } {
  const folder = process.env["DYN_TRACES"] ?? join(import.meta.dirname, "../../shared/traces");
  const path = join(folder, TRACE_FILE);
  if (!existsSync(path)) return { name: "synthetic, shared prefixes", requests: syntheticRequests(random) };
  const rows = readFileSync(path, "utf8").trim().split("\n");
  return {
    name: "Mooncake conversation",
    requests: rows.map((row) => (JSON.parse(row) as { hash_ids: number[] }).hash_ids),
  };
}

/** Conversations of several turns behind 50 system prompts, about as long as the trace's. */
function syntheticRequests(random: SeededRandom): number[][] {
  const open: number[][] = [];
  let nextId = 50_000;
  return Array.from({ length: 12_000 }, () => {
    const at = Math.floor(random.nextFloat() * 800);
    const history = open[at] ?? [Math.floor(random.nextFloat() * 50)];
    const turn = Array.from({ length: 1 + Math.floor(random.nextFloat() * 24) }, () => nextId++);
    const request = [...history, ...turn];
    open[at] = request.length > 120 ? [Math.floor(random.nextFloat() * 50)] : request;
    return request;
  });
}

/** Hashes as they come out of a hash: uniform. An id of the trace names a whole prefix, so it gives its blocks' hashes. */
function chainOf(ids: readonly number[]): Chain {
  const chain = new Uint32Array(2 * BLOCKS_PER_ID * ids.length);
  ids.forEach((id, at) => {
    for (let i = 0; i < 2 * BLOCKS_PER_ID; i++)
      chain[at * 2 * BLOCKS_PER_ID + i] = scramble(id * 2 * BLOCKS_PER_ID + i);
  });
  return chain;
}

function scramble(value: number): number {
  let z = Math.imul(value ^ (value >>> 16), 0x21f0aaad);
  z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
  return (z ^ (z >>> 15)) >>> 0;
}

/** One worker's cache by trace ids, least recently used leaf first (a Map keeps the order of use, tails before heads). */
class WorkerCache {
  readonly #ids = new Map<number, Chain>();

  /** Returns how many leading ids were there, and what had to go for the rest: chains of one id each. */
  use(ids: readonly number[], chain: Chain): { held: number; evicted: Chain[] } {
    let held = 0;
    while (held < ids.length && this.#ids.has(ids[held]!)) held++;
    for (let i = ids.length - 1; i >= 0; i--) {
      this.#ids.delete(ids[i]!);
      this.#ids.set(ids[i]!, chain.subarray(2 * BLOCKS_PER_ID * i, 2 * BLOCKS_PER_ID * (i + 1)));
    }
    const evicted: Chain[] = [];
    for (const [id, blocks] of this.#ids) {
      if (this.#ids.size * BLOCKS_PER_ID <= WORKER_BLOCKS) break;
      this.#ids.delete(id);
      evicted.push(blocks);
    }
    return { held, evicted };
  }

  overlap(ids: readonly number[]): number {
    let held = 0;
    while (held < ids.length && this.#ids.has(ids[held]!)) held++;
    return held;
  }
}

/** The trace as operations: each request asks, goes to a worker (mostly the one with most of it), and changes its cache. */
function operationsOf(requests: readonly number[][], workers: number, random: SeededRandom): Operation[] {
  const caches = Array.from({ length: workers }, () => new WorkerCache());
  const operations: Operation[] = [];
  for (const ids of requests) {
    const chain = chainOf(ids);
    operations.push({ kind: "query", chain, blocks: chain.length / 2 });
    const rank = random.nextFloat() < 0.2 ? Math.floor(random.nextFloat() * workers) : bestOf(caches, ids, random);
    const { held, evicted } = caches[rank]!.use(ids, chain);
    for (const blocks of evicted) {
      const event: KvEvent = { type: "removed", dpRank: 0, tier: "device", sequenceHashes: blocks };
      operations.push({ kind: "event", rank, event, blocks: BLOCKS_PER_ID });
    }
    if (held === ids.length) continue;
    const first = 2 * BLOCKS_PER_ID * held;
    const event: KvEvent = {
      type: "stored",
      dpRank: 0,
      tier: "device",
      parentHash: first === 0 ? undefined : [chain[first - 2]!, chain[first - 1]!],
      startBlock: first / 2,
      sequenceHashes: chain.subarray(first),
      localHashes: chain.subarray(first),
    };
    operations.push({ kind: "event", rank, event, blocks: event.sequenceHashes.length / 2 });
  }
  return operations;
}

function bestOf(caches: readonly WorkerCache[], ids: readonly number[], random: SeededRandom): number {
  const offset = Math.floor(random.nextFloat() * caches.length);
  let best = offset;
  let most = 0;
  for (let i = 0; i < caches.length; i++) {
    const at = (offset + i) % caches.length;
    const overlap = caches[at]!.overlap(ids);
    if (overlap > most) [best, most] = [at, overlap];
  }
  return best;
}

function indexWithRanks(create: () => KvIndex, workers: number): KvIndex {
  const index = create();
  for (let worker = 0; worker < workers; worker++) index.rankOf(`worker-${worker}`, 0);
  return index;
}

const scores = new OverlapScores();

function perform(index: KvIndex, operation: Operation): void {
  if (operation.kind === "query") index.findMatches(operation.chain, operation.blocks, scores);
  else index.apply(operation.rank, operation.event);
}

/** Events only, all of them at once. Returns millions of block operations per second. */
function appliedRate(index: KvIndex, operations: readonly Operation[]): number {
  const events = operations.filter((operation) => operation.kind === "event");
  const startMs = performance.now();
  for (const operation of events) perform(index, operation);
  return blocksOf(events) / (performance.now() - startMs) / 1e3;
}

/** Everything at its time, `opsPerSecond` block operations offered; late operations are not skipped. */
function openLoop(index: KvIndex, operations: readonly Operation[], opsPerSecond: number) {
  const lookupUs: number[] = [];
  const startMs = performance.now();
  let offered = 0;
  for (const operation of operations) {
    const dueMs = startMs + (offered / opsPerSecond) * 1e3;
    while (performance.now() < dueMs);
    const beforeMs = performance.now();
    perform(index, operation);
    if (operation.kind === "query" && operation.blocks >= 100 && operation.blocks <= 200) {
      lookupUs.push((performance.now() - beforeMs) * 1e3);
    }
    offered += operation.blocks;
  }
  const takenMs = performance.now() - startMs;
  return { mopsPerSecond: offered / takenMs / 1e3, keptUp: takenMs <= (offered / opsPerSecond) * 1.1e3, lookupUs };
}

function blocksOf(operations: readonly Operation[]): number {
  return operations.reduce((sum, operation) => sum + operation.blocks, 0);
}

function quantile(values: readonly number[], q: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN;
}

/** The load of Dynamo's own figure (54 / 80 us, 45 bytes, 1.3 M/s): 200 chains of 100 blocks, 20 of them on each of 128 workers. */
function sharedChains(random: SeededRandom): Operation[] {
  const chains = Array.from({ length: 200 }, (_, i) =>
    Uint32Array.from({ length: 200 }, (_unused, j) => scramble(i * 200 + j)),
  );
  return Array.from({ length: 128 * 20 }, (_, i) => {
    const chain = chains[Math.floor(random.nextFloat() * chains.length)]!;
    const event: KvEvent = {
      type: "stored",
      dpRank: 0,
      tier: "device",
      parentHash: undefined,
      startBlock: 0,
      sequenceHashes: chain,
      localHashes: chain,
    };
    return { kind: "event", rank: Math.floor(i / 20), event, blocks: 100 };
  });
}

function heapBytes(): number {
  globalThis.gc?.();
  const { heapUsed, arrayBuffers } = process.memoryUsage();
  return heapUsed + arrayBuffers;
}

function measure(
  name: string,
  create: () => KvIndex,
  operations: readonly Operation[],
  workers: number,
  queries: readonly Operation[],
) {
  const rounds = create() instanceof NaiveKvIndex ? 1 : ROUNDS;
  const applied: number[] = [];
  for (let round = 0; round < rounds; round++) applied.push(appliedRate(indexWithRanks(create, workers), operations));
  const beforeBytes = heapBytes();
  const index = indexWithRanks(create, workers);
  const overload = openLoop(index, operations, 5 * TARGET_OPS_PER_SECOND);
  const { memberships, bytes } = index.stats();
  const memory = bytes === 0 ? heapBytes() - beforeBytes : bytes;
  const keepUp = openLoop(indexWithRanks(create, workers), operations, TARGET_OPS_PER_SECOND / 2);
  const warmUs: number[] = [];
  const count = rounds === 1 ? LOOKUP_SAMPLES / 20 : LOOKUP_SAMPLES;
  for (let i = 0; i < count; i++) {
    const query = queries[(i * 7919) % queries.length]!;
    const beforeMs = performance.now();
    perform(index, query);
    warmUs.push((performance.now() - beforeMs) * 1e3);
  }
  const lookups = keepUp.lookupUs.length > 0 ? keepUp.lookupUs : warmUs;
  return {
    index: name,
    "applied M/s": median(applied),
    "overload M/s": overload.mopsPerSecond,
    "keeps up": keepUp.keptUp ? "yes" : "no",
    "lookup p50 us": quantile(lookups, 0.5),
    "p99 us": quantile(lookups, 0.99),
    "repeated p50": quantile(warmUs, 0.5),
    "repeated p99": quantile(warmUs, 0.99),
    memberships,
    "bytes each": memory / Math.max(1, memberships),
  };
}

export async function run(): Promise<void> {
  const random = new SeededRandom(42);
  const { name, requests } = loadRequests(random);
  const loads: { title: string; workers: number; operations: Operation[] }[] = [
    {
      title: "128 workers with 20 of 200 chains of 100 blocks each (the load of Dynamo's own figure)",
      workers: 128,
      operations: sharedChains(random),
    },
  ];
  for (const workers of WORKERS) {
    const operations = operationsOf(requests, workers, random);
    loads.push({ title: `${name}, ${requests.length} requests, ${workers} workers`, workers, operations });
  }
  for (const { title, workers, operations } of loads) {
    const queries = operations.filter(
      (operation) => operation.kind === "query" && operation.blocks >= 100 && operation.blocks <= 200,
    );
    const lookups: Operation[] =
      queries.length > 0
        ? queries
        : operations.flatMap((operation) =>
            operation.kind === "event" && operation.event.type === "stored"
              ? [{ kind: "query" as const, chain: operation.event.sequenceHashes, blocks: operation.blocks }]
              : [],
          );
    console.log(`${title}: ${operations.length} operations, ${blocksOf(operations)} block operations`);
    const rows = [
      measure("flat", () => new FlatKvIndex({ random }), operations, workers, lookups),
      measure("naive", () => new NaiveKvIndex(), operations, workers, lookups),
    ];
    console.log(`${table(rows, 1)}\n`);
  }
  console.log(machineLine());
  await Promise.resolve();
}

if (import.meta.main) await run();
