import type { KvStored, StorageTier } from "../../protocol/index.ts";
import { RECORD_HI, RECORD_LO, RECORD_SET, RECORD_WORDS } from "./flat-kv-memory.ts";
import { EMPTY_SET, memberOf, type RankSetPool } from "./rank-set-pool.ts";
import type { RecordLinks } from "./record-links.ts";

/**
 * All blocks of one rank as stored events, parents before children, one event per unbroken stretch of a chain in one
 * tier. Applied to an empty index they give the rank's blocks again, except those behind a hole (a block that the rank
 * holds in no tier): their parent is unknown there, and nobody can use them before it is stored again.
 *
 * Not a hot path: a worker answers a router that starts with it.
 */
export interface DumpSource {
  readonly records: Uint32Array;
  readonly links: RecordLinks;
  readonly recordCount: number;
  readonly pool: RankSetPool;
}

const TIERS: readonly StorageTier[] = ["device", "host", "disk", "external"];
/** Blocks of one event: keeps encoded events well under the frame limits of the planes. */
const MAX_EVENT_BLOCKS = 4_096;

export function dumpRank(dpRank: number, rank: number, source: DumpSource): KvStored[] {
  const held = heldRecords(rank, source);
  const { starts, childrenOf } = asForest(held, source);
  const events: KvStored[] = [];
  // A start behind a hole comes after the chain it hangs from: that one starts at a smaller depth.
  for (const start of starts.toSorted((a, b) => a.depth - b.depth)) {
    const open = [start];
    for (let next = open.pop(); next !== undefined; next = open.pop()) {
      const chain = [next.record];
      for (let record = next.record; ;) {
        const [first, ...others] = childrenOf.get(record) ?? [];
        const depth = next.depth + chain.length;
        for (const other of others) open.push({ record: other, depth });
        if (first === undefined) break;
        chain.push(first);
        record = first;
      }
      events.push(...eventsOfChain(chain, next.depth, dpRank, rank, source));
    }
  }
  return events;
}

function heldRecords(rank: number, { records, recordCount, pool }: DumpSource): Set<number> {
  const held = new Set<number>();
  for (let record = 1; record < recordCount; record++) {
    const set = records[record * RECORD_WORDS + RECORD_SET]!;
    if (set !== EMPTY_SET && pool.hasRank(set, rank)) held.add(record);
  }
  return held;
}

interface Start {
  readonly record: number;
  /** Index of the block in its sequence. */
  readonly depth: number;
}

function asForest(held: ReadonlySet<number>, source: DumpSource) {
  const starts: Start[] = [];
  const childrenOf = new Map<number, number[]>();
  for (const record of held) {
    const parent = source.links.parentOf(record);
    if (!held.has(parent)) {
      starts.push({ record, depth: depthOf(record, source) });
      continue;
    }
    const siblings = childrenOf.get(parent);
    if (siblings === undefined) childrenOf.set(parent, [record]);
    else siblings.push(record);
  }
  return { starts, childrenOf };
}

function depthOf(record: number, source: DumpSource): number {
  let depth = 0;
  for (let at = source.links.parentOf(record); at !== 0; at = source.links.parentOf(at)) depth++;
  return depth;
}

/** Stretches of the chain per tier, by where they start: so a block's parent has been told before the block. */
function eventsOfChain(
  chain: readonly number[],
  depth: number,
  dpRank: number,
  rank: number,
  source: DumpSource,
): KvStored[] {
  const { records, pool } = source;
  const stretches: { tier: StorageTier; first: number; end: number }[] = [];
  TIERS.forEach((tier, plane) => {
    const isIn = (record: number) => pool.has(records[record * RECORD_WORDS + RECORD_SET]!, memberOf(plane, rank));
    for (let first = 0; first < chain.length; first++) {
      if (!isIn(chain[first]!)) continue;
      let end = first + 1;
      while (end < chain.length && end - first < MAX_EVENT_BLOCKS && isIn(chain[end]!)) end++;
      stretches.push({ tier, first, end });
      first = end - 1;
    }
  });
  return stretches
    .toSorted((a, b) => a.first - b.first)
    .map(({ tier, first, end }) => eventOf(chain.slice(first, end), depth + first, tier, dpRank, source));
}

function eventOf(
  blocks: readonly number[],
  startBlock: number,
  tier: StorageTier,
  dpRank: number,
  source: DumpSource,
): KvStored {
  const { records, links } = source;
  const sequenceHashes = new Uint32Array(2 * blocks.length);
  const localHashes = new Uint32Array(2 * blocks.length);
  blocks.forEach((record, i) => {
    sequenceHashes[2 * i] = records[record * RECORD_WORDS + RECORD_LO]!;
    sequenceHashes[2 * i + 1] = records[record * RECORD_WORDS + RECORD_HI]!;
    localHashes[2 * i] = links.localLoOf(record);
    localHashes[2 * i + 1] = links.localHiOf(record);
  });
  const parent = links.parentOf(blocks[0]!) * RECORD_WORDS;
  const parentHash = parent === 0 ? undefined : ([records[parent + RECORD_LO]!, records[parent + RECORD_HI]!] as const);
  return { type: "stored", dpRank, tier, parentHash, startBlock, sequenceHashes, localHashes };
}
