import type { KvEvent, KvStored, StorageTier } from "../protocol/index.ts";
import { blockHashSeed, hashBlocks, type HashPair } from "../tokens/index.ts";
import {
  groupProblem,
  multimodalOf,
  saltOf,
  tierOf,
  type LeftOut,
  type VllmEventMapperOptions,
} from "./vllm-event-mapper.ts";
import type { VllmBatch, VllmEvent, VllmRemoved, VllmStored } from "./vllm-events.ts";

/**
 * The plain version of `VllmEventMapper`: objects in a map, one event out for each event in. Oracle of the other one in the
 * tests and baseline of the benchmark; what is done and why is said there.
 */
interface Block {
  readonly hash: HashPair;
  readonly localHash: HashPair;
  readonly parent: Block | undefined;
  readonly depth: number;
  /** Cache namespace of the chain: only its first block carries it. */
  readonly namespace: string;
  /** Copies by tier. */
  readonly copies: [number, number, number, number];
}

const TIERS: readonly StorageTier[] = ["device", "host", "disk", "external"];
const DEFAULT_MAX_BLOCKS = 1 << 20;

export class NaiveVllmEventMapper {
  readonly #blockSizeTokens: number;
  readonly #maxBlocks: number;
  readonly #blocks = new Map<string, Block>();
  readonly leftOut = new Map<LeftOut, number>();

  constructor({ blockSizeTokens, maxBlocks = DEFAULT_MAX_BLOCKS }: VllmEventMapperOptions) {
    this.#blockSizeTokens = blockSizeTokens;
    this.#maxBlocks = maxBlocks;
  }

  /** Blocks known by the engine's hashes. */
  get blockCount(): number {
    return this.#blocks.size;
  }

  map({ dpRank, events }: VllmBatch): KvEvent[] {
    const out: KvEvent[] = [];
    for (const event of events) {
      const problem = this.#mapOne(event, dpRank, out);
      if (problem !== undefined) this.leftOut.set(problem, (this.leftOut.get(problem) ?? 0) + 1);
    }
    return out;
  }

  #mapOne(event: VllmEvent, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    if (event.type === "unknown") return "unknown-event";
    if (event.type === "cleared") {
      this.#blocks.clear();
      out.push({ type: "cleared", dpRank });
      return undefined;
    }
    const tier = tierOf(event.medium);
    const problem = groupProblem(event.group) ?? (tier === undefined ? "unknown-medium" : undefined);
    if (problem !== undefined || tier === undefined) return problem;
    if (event.type === "removed") return this.#remove(event, tier, dpRank, out);
    if (event.hashes.length === 0) return undefined;
    if (event.tokenIds.length === 0) return this.#storePlaceholders(event, tier, dpRank, out);
    return this.#store(event, tier, dpRank, out);
  }

  #store(event: VllmStored, tier: StorageTier, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    const { tokenIds, isPaired } = event;
    const hashes = namesOf(event.hashes);
    const parentName = event.parent === undefined ? undefined : nameOf(event.parent);
    if (event.blockSize !== this.#blockSizeTokens) return "block-size";
    if (tokenIds.length - (isPaired ? 1 : 0) !== hashes.length * this.#blockSizeTokens) return "contradiction";
    if (parentName !== undefined && hashes.includes(parentName)) return "contradiction";
    const parent = parentName === undefined ? undefined : this.#blocks.get(parentName);
    if (parentName !== undefined && parent === undefined) return "unknown-parent";
    if (this.#blocks.size + hashes.length > this.#maxBlocks) return "no-room";
    if (new Set(hashes).size < hashes.length) return "contradiction";
    const namespace = parent?.namespace ?? event.cacheSalt ?? saltOf(event.extraKeys[0]) ?? "";
    const seed = blockHashSeed({ loraName: event.loraName ?? "", cacheNamespace: namespace });
    const multimodalHashes = event.extraKeys.map((keys) => multimodalOf(keys, event.loraName));
    const hashed = hashBlocks(tokenIds, this.#blockSizeTokens, seed, {
      ...(parent === undefined ? {} : { parent: parent.hash }),
      ...(isPaired ? { eagle: true } : {}),
      ...(multimodalHashes.some((one) => one !== undefined) ? { multimodalHashes } : {}),
    });
    const first = parent === undefined ? 0 : parent.depth + 1;
    let last = parent;
    this.#forgetRenamed(hashes, hashed.sequenceHashes, dpRank, out);
    for (const [i, name] of hashes.entries())
      last = this.#note(name, pairAt(hashed.sequenceHashes, i), pairAt(hashed.localHashes, i), last, namespace, tier);
    out.push({
      type: "stored",
      dpRank,
      tier,
      parentHash: parent?.hash,
      startBlock: first,
      sequenceHashes: hashed.sequenceHashes,
      localHashes: hashed.localHashes,
    });
    return undefined;
  }

  /** A name that the engine gives to other content than before: the old block cannot be named any more, so it is gone. */
  #forgetRenamed(names: readonly string[], sequenceHashes: Uint32Array, dpRank: number, out: KvEvent[]): void {
    for (const [i, name] of names.entries()) {
      const block = this.#blocks.get(name);
      const [lo, hi] = pairAt(sequenceHashes, i);
      if (block === undefined || (block.hash[0] === lo && block.hash[1] === hi)) continue;
      this.#blocks.delete(name);
      for (const [index, tier] of TIERS.entries()) {
        for (let left = block.copies[index]!; left > 0; left--) {
          out.push({ type: "removed", dpRank, tier, sequenceHashes: Uint32Array.from(block.hash) });
        }
      }
    }
  }

  #note(
    name: string,
    hash: HashPair,
    localHash: HashPair,
    parent: Block | undefined,
    namespace: string,
    tier: StorageTier,
  ): Block {
    let block = this.#blocks.get(name);
    if (block === undefined) {
      block = {
        hash,
        localHash,
        parent,
        depth: parent === undefined ? 0 : parent.depth + 1,
        namespace,
        copies: [0, 0, 0, 0],
      };
      this.#blocks.set(name, block);
    }
    const index = TIERS.indexOf(tier);
    block.copies[index] = block.copies[index]! + 1;
    return block;
  }

  /** An offload tier that names blocks without saying their tokens: those we know are now there too. */
  #storePlaceholders({ hashes }: VllmStored, tier: StorageTier, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    const index = TIERS.indexOf(tier);
    let problem: LeftOut | undefined;
    for (const name of namesOf(hashes)) {
      const block = this.#blocks.get(name);
      if (block === undefined) {
        problem = "unknown-block";
        continue;
      }
      block.copies[index] = block.copies[index]! + 1;
      const stored: KvStored = {
        type: "stored",
        dpRank,
        tier,
        parentHash: block.parent?.hash,
        startBlock: block.depth,
        sequenceHashes: Uint32Array.from(block.hash),
        localHashes: Uint32Array.from(block.localHash),
      };
      out.push(stored);
    }
    return problem;
  }

  #remove({ hashes }: VllmRemoved, tier: StorageTier, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    const index = TIERS.indexOf(tier);
    const removed: number[] = [];
    let problem: LeftOut | undefined;
    for (const name of namesOf(hashes)) {
      const block = this.#blocks.get(name);
      if (block === undefined || block.copies[index] === 0) {
        problem = "unknown-block";
        continue;
      }
      block.copies[index] = block.copies[index]! - 1;
      removed.push(block.hash[0], block.hash[1]);
      if (block.copies.every((copies) => copies === 0)) this.#blocks.delete(name);
    }
    if (removed.length > 0) out.push({ type: "removed", dpRank, tier, sequenceHashes: Uint32Array.from(removed) });
    return problem;
  }
}

/** The engine's hashes as keys. */
function namesOf(hashes: readonly number[]): string[] {
  return Array.from({ length: hashes.length / 2 }, (_, i) => nameOf([hashes[2 * i]!, hashes[2 * i + 1]!]));
}

function nameOf([lo, hi]: HashPair): string {
  return `${hi.toString(16)}:${lo.toString(16)}`;
}

function pairAt(hashes: Uint32Array, block: number): HashPair {
  return [hashes[2 * block]!, hashes[2 * block + 1]!];
}
