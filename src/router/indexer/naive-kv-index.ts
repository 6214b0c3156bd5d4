import type { KvEvent, KvRemoved, KvStored, StorageTier } from "../../protocol/index.ts";
import type { ApplyStatus, KvIndex, KvIndexStats, OverlapScores } from "./base.ts";
import { RankTable } from "./rank-table.ts";

/**
 * The KV index in the plainest form: a map of blocks, each with a set of "tier rank" texts. The flat index's oracle in
 * tests and its baseline in the benchmark. Without a byte budget, so it never evicts.
 */
interface Block {
  readonly key: string;
  readonly hash: readonly [number, number];
  readonly localHash: readonly [number, number];
  readonly parent: Block | undefined;
  readonly children: Set<Block>;
  /** `${tier} ${rank}` */
  readonly owners: Set<string>;
}

const TIERS: readonly StorageTier[] = ["device", "host", "disk", "external"];

export class NaiveKvIndex implements KvIndex {
  readonly #ranks = new RankTable();
  readonly #blocks = new Map<string, Block>();

  get rankCount(): number {
    return this.#ranks.rankCount;
  }

  rankOf(instanceId: string, dpRank: number): number {
    return this.#ranks.numberOf(instanceId, dpRank);
  }

  apply(rank: number, event: KvEvent): ApplyStatus {
    if (this.#ranks.ownerOf(rank) === undefined) return "invalid-block";
    if (event.type === "cleared") {
      this.clearRank(rank);
      return "ok";
    }
    if (!TIERS.includes(event.tier) || event.sequenceHashes.length % 2 !== 0) return "invalid-block";
    return event.type === "stored" ? this.#store(rank, event) : this.#remove(rank, event);
  }

  #store(rank: number, { tier, parentHash, sequenceHashes, localHashes }: KvStored): ApplyStatus {
    if (localHashes.length !== sequenceHashes.length) return "invalid-block";
    let parent = parentHash === undefined ? undefined : this.#blocks.get(keyOf(parentHash[0], parentHash[1]));
    if (parentHash !== undefined && parent === undefined) return "parent-block-not-found";
    for (let i = 0; i < sequenceHashes.length; i += 2) {
      const hash = [sequenceHashes[i]!, sequenceHashes[i + 1]!] as const;
      const key = keyOf(hash[0], hash[1]);
      let block = this.#blocks.get(key);
      if (block === undefined) {
        const localHash = [localHashes[i]!, localHashes[i + 1]!] as const;
        block = { key, hash, localHash, parent, children: new Set(), owners: new Set() };
        this.#blocks.set(key, block);
        parent?.children.add(block);
      } else if (block.parent !== parent) {
        return "invalid-block";
      }
      block.owners.add(`${tier} ${rank}`);
      parent = block;
    }
    return "ok";
  }

  #remove(rank: number, { tier, sequenceHashes }: KvRemoved): ApplyStatus {
    let status: ApplyStatus = "ok";
    for (let i = 0; i < sequenceHashes.length; i += 2) {
      const block = this.#blocks.get(keyOf(sequenceHashes[i]!, sequenceHashes[i + 1]!));
      if (block?.owners.delete(`${tier} ${rank}`) === true) this.#forgetIfUnused(block);
      else status = "block-not-found";
    }
    return status;
  }

  /** A block stays while somebody holds it or anything behind it is known. */
  #forgetIfUnused(first: Block): void {
    for (let block: Block | undefined = first; block !== undefined; block = block.parent) {
      if (block.owners.size > 0 || block.children.size > 0) return;
      this.#blocks.delete(block.key);
      block.parent?.children.delete(block);
    }
  }

  clearRank(rank: number): void {
    for (const block of this.#blocks.values()) {
      for (const tier of TIERS) block.owners.delete(`${tier} ${rank}`);
      this.#forgetIfUnused(block);
    }
  }

  removeWorker(instanceId: string): void {
    for (const rank of this.#ranks.ranksOf(instanceId)) this.clearRank(rank);
    this.#ranks.remove(instanceId);
  }

  findMatches(sequenceHashes: Uint32Array, blockCount: number, into: OverlapScores): void {
    into.reset(this.rankCount);
    const chain = Array.from({ length: blockCount }, (_, i) =>
      this.#blocks.get(keyOf(sequenceHashes[2 * i]!, sequenceHashes[2 * i + 1]!)),
    );
    for (let rank = 0; rank < this.rankCount; rank++) {
      const isIn = (at: number, ...tiers: StorageTier[]) =>
        tiers.some((tier) => chain[at]?.owners.has(`${tier} ${rank}`));
      let at = 0;
      while (isIn(at, "device")) at++;
      into.device[rank] = at;
      while (isIn(at, "host")) at++;
      into.host[rank] = at - into.device[rank]!;
      while (isIn(at, "disk")) at++;
      into.disk[rank] = at - into.device[rank]! - into.host[rank]!;
      const beforeShared = at;
      while (isIn(at, "disk", "external")) at++;
      into.shared[rank] = at - beforeShared;
    }
  }

  stats(): KvIndexStats {
    const sizes = [...this.#blocks.values()].map((block) => block.owners.size);
    return {
      ranks: this.rankCount,
      blocks: sizes.filter((size) => size > 0).length,
      memberships: sizes.reduce((sum, size) => sum + size, 0),
      bytes: 0,
      evictedBlocks: 0,
    };
  }

  dump(rank: number): KvEvent[] {
    const owner = this.#ranks.ownerOf(rank);
    if (owner === undefined) return [];
    return [...this.#blocks.values()]
      .map((block) => ({ block, startBlock: depthOf(block) }))
      .toSorted((a, b) => a.startBlock - b.startBlock)
      .flatMap(({ block, startBlock }) =>
        TIERS.filter((tier) => block.owners.has(`${tier} ${rank}`)).map((tier) => ({
          type: "stored" as const,
          dpRank: owner.dpRank,
          tier,
          parentHash: block.parent?.hash,
          startBlock,
          sequenceHashes: Uint32Array.from(block.hash),
          localHashes: Uint32Array.from(block.localHash),
        })),
      );
  }
}

function keyOf(lo: number, hi: number): string {
  return `${lo >>> 0} ${hi >>> 0}`;
}

function depthOf(block: Block): number {
  let depth = 0;
  for (let parent = block.parent; parent !== undefined; parent = parent.parent) depth++;
  return depth;
}
