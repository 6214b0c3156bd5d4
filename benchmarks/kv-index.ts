import { execFileSync } from "node:child_process";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { KvEvent } from "../src/protocol/index.ts";
import { FlatKvIndex, NaiveKvIndex, OverlapScores, type KvIndex } from "../src/router/indexer/index.ts";
import { SeededRandom } from "../src/std/index.ts";
import { DYNAMO_PYTHON, machineLine, median, table } from "./harness.ts";

/**
 * The KV index under a router's load, after the method of Dynamo's indexer benchmark (open loop, drain counted): requests
 * of a trace go to workers that keep an LRU cache each; what they store and evict becomes events; then queries and events
 * are replayed alone, at fixed times, queries before writes. A block operation is one block hash of a query, a stored or
 * a removed event.
 *
 *   applied    events only, as fast as they go: block operations per second of the writer's CPU time
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

type Chain = Uint32Array;
type Query = { readonly kind: "query"; readonly chain: Chain; readonly blocks: number };
type Operation =
  Query | { readonly kind: "event"; readonly rank: number; readonly event: KvEvent; readonly blocks: number };

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
    const first = BLOCKS_PER_ID * held;
    operations.push({ kind: "event", rank, event: storedEvent(chain, first), blocks: chain.length / 2 - first });
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

/** Events only, all of them at once. Returns millions of block operations per second of this thread's CPU time. */
function appliedRate(index: KvIndex, operations: readonly Operation[]): number {
  const events = operations.filter((operation) => operation.kind === "event");
  const before = process.threadCpuUsage();
  for (const operation of events) perform(index, operation);
  const { user, system } = process.threadCpuUsage(before);
  return blocksOf(events) / (user + system);
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

/** First all events, then queries; dynamo-radix-tree.py puts the same on the real Dynamo's tree. */
function sharedChains(random: SeededRandom): Operation[] {
  const chains = Array.from({ length: 200 }, (_, i) =>
    Uint32Array.from({ length: 200 }, (_unused, j) => scramble(i * 200 + j)),
  );
  const operations: Operation[] = [];
  for (let rank = 0; rank < 128; rank++) {
    // 20 different ones: the first of a shuffle.
    for (let i = 0; i < 20; i++) {
      const other = i + Math.floor(random.nextFloat() * (chains.length - i));
      [chains[i], chains[other]] = [chains[other]!, chains[i]!];
      operations.push({ kind: "event", rank, event: storedEvent(chains[i]!, 0), blocks: 100 });
    }
  }
  for (let i = 0; i < 3_000; i++) operations.push({ kind: "query", chain: chains[i % chains.length]!, blocks: 100 });
  return operations;
}

/** What a worker tells that has computed the chain from block `first` on. */
function storedEvent(chain: Chain, first: number): KvEvent {
  return {
    type: "stored",
    dpRank: 0,
    tier: "device",
    parentHash: first === 0 ? undefined : [chain[2 * first - 2]!, chain[2 * first - 1]!],
    startBlock: first,
    sequenceHashes: chain.subarray(2 * first),
    localHashes: chain.subarray(2 * first),
  };
}

setFlagsFromString("--expose-gc");
const collectGarbage = runInNewContext("gc") as () => void;

function heapBytes(): number {
  collectGarbage();
  const { heapUsed, arrayBuffers } = process.memoryUsage();
  return heapUsed + arrayBuffers;
}

/** What the index says of itself, or else how much the heap grew. In a function of its own: nothing older stays reachable. */
function memoryOf(create: () => KvIndex, { operations, workers }: Load): { memberships: number; bytes: number } {
  const beforeBytes = heapBytes();
  const index = indexWithRanks(create, workers);
  for (const operation of operations) if (operation.kind === "event") perform(index, operation);
  const heapGrowth = heapBytes() - beforeBytes;
  // Asked last, so that the index is still there when the heap is weighed.
  const { memberships, bytes } = index.stats();
  return { memberships, bytes: bytes === 0 ? heapGrowth : bytes };
}

/** How often the flat index is measured; the naive one once, over its part of the load. */
const ROUNDS = 5;

function measure(name: string, create: () => KvIndex, rounds: number, load: Load) {
  const { operations, workers, lookups } = load;
  const applied: number[] = [];
  const overload: number[] = [];
  const held = memoryOf(create, load);
  for (let round = 0; round < rounds; round++) {
    applied.push(appliedRate(indexWithRanks(create, workers), operations));
    const index = indexWithRanks(create, workers);
    overload.push(openLoop(index, operations, 5 * TARGET_OPS_PER_SECOND).mopsPerSecond);
  }
  const keptUp: ReturnType<typeof openLoop>[] = [];
  const repeated: number[][] = [];
  for (let round = 0; round < rounds; round++) {
    const index = indexWithRanks(create, workers);
    keptUp.push(openLoop(index, operations, TARGET_OPS_PER_SECOND / 2));
    repeated.push(repeatedLookups(index, lookups, rounds === 1 ? LOOKUP_SAMPLES / 20 : LOOKUP_SAMPLES));
  }
  const inLoadUs = (q: number) => median(keptUp.map((round) => quantile(round.lookupUs, q)));
  const repeatedUs = (q: number) => median(repeated.map((round) => quantile(round, q)));
  return {
    index: name,
    "applied M/CPU-s": median(applied),
    "overload M/s": median(overload),
    "keeps up": `${keptUp.filter((round) => round.keptUp).length} of ${rounds}`,
    "lookup p50 us": inLoadUs(0.5),
    "p99 us": inLoadUs(0.99),
    "repeated p50": repeatedUs(0.5),
    p99: repeatedUs(0.99),
    memberships: held.memberships,
    "bytes each": held.bytes / Math.max(1, held.memberships),
  };
}

function repeatedLookups(index: KvIndex, lookups: readonly Query[], count: number): number[] {
  const us: number[] = [];
  for (let i = 0; i < count; i++) {
    const query = lookups[(i * 7919) % lookups.length]!;
    const beforeMs = performance.now();
    perform(index, query);
    us.push((performance.now() - beforeMs) * 1e3);
  }
  return us;
}

interface Load {
  readonly title: string;
  readonly workers: number;
  readonly operations: readonly Operation[];
  /** For lookups one after the other: 100 to 200 blocks each. */
  readonly lookups: readonly Query[];
}

function loadOf(title: string, workers: number, operations: readonly Operation[]): Load {
  const isMeasured = (operation: Operation) =>
    operation.kind === "query" && operation.blocks >= 100 && operation.blocks <= 200;
  return { title, workers, operations, lookups: operations.filter((operation) => isMeasured(operation)) as Query[] };
}

/** The naive index gets the head of a long load: it is slow, and a smaller index is to its advantage. */
const NAIVE_BLOCK_OPERATIONS = 600_000;

function headOf({ title, workers, operations }: Load): Load {
  let blocks = 0;
  const end = operations.findIndex((operation) => (blocks += operation.blocks) > NAIVE_BLOCK_OPERATIONS);
  return loadOf(title, workers, end === -1 ? operations : operations.slice(0, end));
}

/** The real thing under the first load, where `race` has installed it. */
function printDynamosTree(): void {
  if (!existsSync(DYNAMO_PYTHON)) {
    console.log("Dynamo 1.4.2's radix tree: not measured, `npm run bench -- race` installs it\n");
    return;
  }
  const text = execFileSync(DYNAMO_PYTHON, [join(import.meta.dirname, "dynamo-radix-tree.py")], { encoding: "utf8" });
  const { millionPerCpuSecond, p50Us, p99Us, memberships, bytesEach } = JSON.parse(text) as Record<string, number>;
  const row = {
    index: "Dynamo 1.4.2's radix tree, through its Python binding",
    "applied M/CPU-s": millionPerCpuSecond!,
    "repeated p50": p50Us!,
    p99: p99Us!,
    memberships: memberships!,
    "bytes each": bytesEach!,
  };
  console.log(`${table([row], 1)}\n`);
}

export async function run(): Promise<void> {
  const random = new SeededRandom(42);
  const { name, requests } = loadRequests(random);
  const loads = [loadOf("128 workers with 20 of 200 chains of 100 blocks each", 128, sharedChains(random))];
  for (const workers of WORKERS) {
    loads.push(
      loadOf(
        `${name}, ${requests.length} requests, ${workers} workers`,
        workers,
        operationsOf(requests, workers, random),
      ),
    );
  }
  console.log(machineLine());
  for (const load of loads) {
    console.log(`${load.title}: ${load.operations.length} operations, ${blocksOf(load.operations)} block operations`);
    const head = headOf(load);
    const rows = [
      measure("flat", () => new FlatKvIndex({ random }), ROUNDS, load),
      measure(`naive (first ${blocksOf(head.operations)})`, () => new NaiveKvIndex(), 1, head),
    ];
    console.log(`${table(rows, 1)}\n`);
    if (load === loads[0]) printDynamosTree();
  }
  await Promise.resolve();
}

if (import.meta.main) await run();
