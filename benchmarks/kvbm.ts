import { BlockPool, EVICTION_NAMES, type EvictionName } from "../src/kvbm/index.ts";
import { NaiveBlockPool } from "../src/kvbm/naive-block-pool.ts";
import { SeededRandom } from "../src/std/index.ts";
import { median, table } from "./harness.ts";

/**
 * State changes of the block manager: a pool of 65,536 blocks that is always full, chains of 32 blocks that are matched,
 * stored where they miss, and released; 4,096 chains, the popular ones more often. One state change = one allocate,
 * stage, register, retain, release or eviction of one block. The naive twin runs the same on a pool of 512 blocks.
 */
const CHAIN = 32;
const ROUNDS = 5;

interface Chain {
  readonly hashes: Uint32Array;
  readonly names: readonly string[];
}

function chains(count: number): Chain[] {
  const random = new SeededRandom(3);
  return Array.from({ length: count }, () => {
    const hashes = Uint32Array.from({ length: 2 * CHAIN }, () => random.nextU32());
    return { hashes, names: Array.from({ length: CHAIN }, (_, i) => `${hashes[2 * i]}:${hashes[2 * i + 1]}`) };
  });
}

/** The popular first: the square of a uniform number. */
const pickFrom = <T>(list: readonly T[], random: SeededRandom): T =>
  list[Math.floor(random.nextFloat() ** 2 * list.length)]!;

/** Nanoseconds per state change. */
function measure(eviction: EvictionName, blockCount: number, list: readonly Chain[], requests: number): number {
  const pool = new BlockPool({ blockCount, eviction });
  const random = new SeededRandom(9);
  const blocks = new Int32Array(CHAIN);
  let changes = 0;
  const before = pool.counters;
  const cpu = process.cpuUsage();
  for (let i = 0; i < requests; i++) {
    const { hashes } = pickFrom(list, random);
    const held = pool.matchPrefix(hashes, CHAIN, blocks);
    if (!pool.allocate(CHAIN - held, blocks, held)) throw new Error("the pool has room for one chain");
    for (let at = held; at < CHAIN; at++) {
      const parent = 2 * at - 2;
      const lo = at === 0 ? 0 : hashes[parent]!;
      pool.stage(blocks[at]!, hashes[2 * at]!, hashes[2 * at + 1]!, lo, at === 0 ? 0 : hashes[parent + 1]!);
      blocks[at] = pool.register(blocks[at]!);
    }
    pool.releaseAll(blocks, CHAIN);
    changes += held + 3 * (CHAIN - held) + CHAIN;
    if (i % 64 === 0) pool.takeEvicted();
  }
  const { user, system } = process.cpuUsage(cpu);
  return ((user + system) * 1_000) / (changes + before.evictions);
}

function measureNaive(eviction: EvictionName, blockCount: number, list: readonly Chain[], requests: number): number {
  const pool = new NaiveBlockPool(blockCount, eviction);
  const random = new SeededRandom(9);
  let changes = 0;
  const cpu = process.cpuUsage();
  for (let i = 0; i < requests; i++) {
    const { names } = pickFrom(list, random);
    const blocks = pool.matchPrefix(names);
    const held = blocks.length;
    const fresh = pool.allocate(CHAIN - held)!;
    fresh.forEach((block, at) => {
      pool.stage(block, names[held + at]!, held + at === 0 ? "0:0" : names[held + at - 1]!);
      blocks.push(pool.register(block));
    });
    for (const block of blocks.toReversed()) pool.release(block);
    changes += held + 3 * (CHAIN - held) + CHAIN;
  }
  const { user, system } = process.cpuUsage(cpu);
  return ((user + system) * 1_000) / (changes + pool.evicted.length);
}

export function run(): void {
  console.log("one state change of a block, ns of CPU, median of the rounds\n");
  const big = chains(4_096);
  const small = chains(32);
  const rows = EVICTION_NAMES.map((eviction) => {
    measure(eviction, 65_536, big, 5_000);
    const ours = median(Array.from({ length: ROUNDS }, () => measure(eviction, 65_536, big, 20_000)));
    const naive = median(Array.from({ length: ROUNDS }, () => measureNaive(eviction, 512, small, 100)));
    return { eviction, "65,536 blocks": ours, "naive, 512 blocks": naive, ratio: naive / ours, aim: 100 };
  });
  console.log(table(rows, 0));
}

if (import.meta.main) run();
