import type { KvEvent, KvStored, StorageTier } from "../../protocol/index.ts";

/** Which block: the hashes as (lo, hi) halves of tokens/, the parent's both 0 for the first block of a sequence. */
export interface BlockIdentity {
  readonly lo: number;
  readonly hi: number;
  readonly parentLo: number;
  readonly parentHi: number;
  /** Hash of its own tokens alone: what routers look up. */
  readonly localLo: number;
  readonly localHi: number;
  /** Index in its sequence. */
  readonly depth: number;
}

/** The 53 bits of a hash that a number holds: a key of maps whose mistakes cost speed, not correctness. */
export function keyOf(lo: number, hi: number): number {
  return lo + (hi & 0x1f_ffff) * 2 ** 32;
}

export function* blocksOf(event: KvStored): Generator<BlockIdentity> {
  const { sequenceHashes, localHashes, parentHash, startBlock } = event;
  let [parentLo, parentHi] = parentHash ?? [0, 0];
  for (let i = 0; i < sequenceHashes.length; i += 2) {
    const lo = sequenceHashes[i]!;
    const hi = sequenceHashes[i + 1]!;
    const depth = startBlock + i / 2;
    yield { lo, hi, parentLo, parentHi, localLo: localHashes[i]!, localHi: localHashes[i + 1]!, depth };
    parentLo = lo;
    parentHi = hi;
  }
}

/** Events that tell of these blocks in this order, one for each stretch in which every block follows the one before it. */
export function storedEvents(blocks: readonly BlockIdentity[], tier: StorageTier): KvEvent[] {
  const events: KvEvent[] = [];
  for (let from = 0; from < blocks.length;) {
    let to = from + 1;
    while (to < blocks.length && follows(blocks[to]!, blocks[to - 1]!) && to - from < MAX_BLOCKS_PER_EVENT) to++;
    const first = blocks[from]!;
    const stretch = blocks.slice(from, to);
    events.push({
      type: "stored",
      dpRank: 0,
      tier,
      parentHash: first.depth === 0 ? undefined : [first.parentLo, first.parentHi],
      startBlock: first.depth,
      sequenceHashes: Uint32Array.from(stretch.flatMap(({ lo, hi }) => [lo, hi])),
      localHashes: Uint32Array.from(stretch.flatMap(({ localLo, localHi }) => [localLo, localHi])),
    });
    from = to;
  }
  return events;
}

/** Small enough for one message of the event plane. */
const MAX_BLOCKS_PER_EVENT = 128;

export function follows(block: BlockIdentity, before: BlockIdentity): boolean {
  return block.parentLo === before.lo && block.parentHi === before.hi && block.depth === before.depth + 1;
}

/**
 * Chain after chain, parents first. What has a parent that is not among the blocks is left out, unless that parent is
 * known: by default none is.
 */
export function inChains(
  blocks: readonly BlockIdentity[],
  isKnown: (lo: number, hi: number) => boolean = () => false,
): BlockIdentity[] {
  const children = new Map<number, BlockIdentity[]>();
  const stack: BlockIdentity[] = [];
  const among = new Set(blocks.map(({ lo, hi }) => keyOf(lo, hi)));
  for (const block of blocks) {
    const { parentLo, parentHi } = block;
    if (block.depth === 0 || (!among.has(keyOf(parentLo, parentHi)) && isKnown(parentLo, parentHi))) {
      stack.push(block);
      continue;
    }
    const key = keyOf(block.parentLo, block.parentHi);
    const siblings = children.get(key);
    if (siblings === undefined) children.set(key, [block]);
    else siblings.push(block);
  }
  const ordered: BlockIdentity[] = [];
  for (let block = stack.pop(); block !== undefined; block = stack.pop()) {
    ordered.push(block);
    const key = keyOf(block.lo, block.hi);
    stack.push(...(children.get(key) ?? []));
    // A block is visited once, whatever a damaged entry claims.
    children.delete(key);
  }
  return ordered;
}
