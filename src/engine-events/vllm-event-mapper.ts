import type { KvEvent, KvStored, StorageTier } from "../protocol/index.ts";
import { blockHashSeed, hashBlocks, tryHashFromHex, xxh3_64, type HashPair } from "../tokens/index.ts";
import type { KvGroup, VllmBatch, VllmEvent, VllmRemoved, VllmStored } from "./vllm-events.ts";

/**
 * Turns one engine rank's events into ours: hashes are computed from the token ids by the public recipe, and the engine's
 * own hashes are only names, kept in a map from their first stored event to the removal of the last copy. So engines whose
 * hashes nobody can reproduce are indexed as exactly as our own.
 *
 * Left out and counted, after what production relays do: other KV groups of hybrid models, remote blocks, unknown media,
 * another block size, placeholders of unknown blocks, chains whose parent is not known, and whatever contradicts itself.
 * Copies are told one by one, stored and removed: whoever applies the events counts them (the worker's publisher does).
 * Bounded by `maxBlocks`. One object per rank; start a new one when the engine's sequence goes back.
 */
export interface VllmEventMapperOptions {
  /** Of the model; an event with another one is left out. */
  readonly blockSizeTokens: number;
  /** @default 1,048,576 */
  readonly maxBlocks?: number;
}

export type LeftOut =
  | "other-group"
  | "remote"
  | "unknown-medium"
  | "block-size"
  | "unknown-parent"
  | "unknown-block"
  | "contradiction"
  | "no-room"
  | "unknown-event";

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
const TIER_OF_MEDIUM: Readonly<Record<string, StorageTier>> = {
  GPU: "device",
  DEVICE: "device",
  CPU: "host",
  CPU_PINNED: "host",
  CPU_TIER1: "host",
  CPU_TIER2: "disk",
  DISK: "disk",
  NVME: "disk",
  FS: "disk",
  STORAGE: "disk",
  EXTERNAL: "external",
  NETWORK: "external",
  REMOTE: "external",
  SHARED: "external",
  OBJ: "external",
};
/** Groups whose blocks mean a whole prefix. */
const WHOLE_PREFIX = new Set(["full_attention", "mla_attention"]);
const SALT_PREFIX = "dynamo-cache-salt:";
const DIGEST = /^[0-9a-fA-F]{64}$/;
const NO_SEED: HashPair = [0, 0];
const DEFAULT_MAX_BLOCKS = 1 << 20;
const utf8 = new TextEncoder();

export class VllmEventMapper {
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
    const tier = event.medium === undefined ? "device" : TIER_OF_MEDIUM[event.medium.toUpperCase()];
    const problem = groupProblem(event.group) ?? (tier === undefined ? "unknown-medium" : undefined);
    if (problem !== undefined || tier === undefined) return problem;
    if (event.type === "removed") return this.#remove(event, tier, dpRank, out);
    if (event.hashes.length === 0) return undefined;
    if (event.tokenIds.length === 0) return this.#storePlaceholders(event, tier, dpRank, out);
    return this.#store(event, tier, dpRank, out);
  }

  #store(event: VllmStored, tier: StorageTier, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    const { hashes, tokenIds, isPaired } = event;
    if (event.blockSize !== this.#blockSizeTokens) return "block-size";
    if (tokenIds.length - (isPaired ? 1 : 0) !== hashes.length * this.#blockSizeTokens) return "contradiction";
    if (new Set(hashes).size < hashes.length) return "contradiction";
    if (event.parent !== undefined && hashes.includes(event.parent)) return "contradiction";
    const parent = event.parent === undefined ? undefined : this.#blocks.get(event.parent);
    if (event.parent !== undefined && parent === undefined) return "unknown-parent";
    if (this.#blocks.size + hashes.length > this.#maxBlocks) return "no-room";
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
    for (const name of hashes) {
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
    for (const name of hashes) {
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

function groupProblem({ index, kind, locality }: KvGroup): LeftOut | undefined {
  if (locality !== undefined && locality !== "LOCAL") return "remote";
  if (kind !== undefined) return WHOLE_PREFIX.has(kind) ? undefined : "other-group";
  return index === undefined || index === 0 ? undefined : "other-group";
}

function saltOf(keys: VllmStored["extraKeys"][number]): string | undefined {
  const salted = keys?.find(({ text, isTuple }) => !isTuple && text.startsWith(SALT_PREFIX));
  return salted?.text.slice(SALT_PREFIX.length);
}

/** Hashes of the multimodal objects in a block: bare digests that are not the LoRA's name, and ids in tuples. */
function multimodalOf(keys: VllmStored["extraKeys"][number], loraName: string | undefined): HashPair[] | undefined {
  const hashes = (keys ?? []).flatMap(({ text, isTuple }) => {
    const isDigest = DIGEST.test(text);
    if (!isTuple && (!isDigest || text === loraName)) return [];
    return [isDigest ? tryHashFromHex(text.slice(0, 16))! : xxh3_64(utf8.encode(text), NO_SEED)];
  });
  return hashes.length === 0 ? undefined : hashes;
}

function pairAt(hashes: Uint32Array, block: number): HashPair {
  return [hashes[2 * block]!, hashes[2 * block + 1]!];
}
