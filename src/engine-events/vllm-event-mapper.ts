import { EventBlocks, NO_BLOCK } from "./event-blocks.ts";
import type { KvEvent, StorageTier } from "../protocol/index.ts";
import { blockHashSeed, hashBlocks, tryHashFromHex, xxh3_64, type HashPair } from "../tokens/index.ts";
import type { KvGroup, VllmBatch, VllmEvent, VllmRemoved, VllmStored } from "./vllm-events.ts";

/**
 * Turns one engine rank's events into ours: hashes are computed from the token ids by the public recipe, and the engine's
 * own hashes are only names, kept in a table from their first stored event to the removal of the last copy. So engines whose
 * hashes nobody can reproduce are indexed as exactly as our own.
 *
 * Left out and counted, after what production relays do: other KV groups of hybrid models, remote blocks, unknown media,
 * another block size, placeholders of unknown blocks, chains whose parent is not known, and whatever contradicts itself.
 * Copies are told one by one, stored and removed: whoever applies the events counts them (the worker's publisher does).
 * Engines tell evictions one block at a time; those that follow each other become one event of ours.
 *
 * Bounded by `maxBlocks`. One object per rank; start a new one when the engine's sequence goes back. A hot path:
 * `npm run bench -- event-ingest`; `NaiveVllmEventMapper` is the plain version and oracle.
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
/** Removals that become one event: well under what one may have on the wire. */
const MAX_REMOVED = 4_096;
const utf8 = new TextEncoder();

export class VllmEventMapper {
  readonly #blockSizeTokens: number;
  readonly #maxBlocks: number;
  #blocks: EventBlocks;
  readonly leftOut = new Map<LeftOut, number>();
  /** Removals that were not told yet, all of one tier: lo and hi by turns. */
  readonly #removed = new Uint32Array(2 * MAX_REMOVED);
  #removedCount = 0;
  #removedTier = 0;

  constructor({ blockSizeTokens, maxBlocks = DEFAULT_MAX_BLOCKS }: VllmEventMapperOptions) {
    this.#blockSizeTokens = blockSizeTokens;
    this.#maxBlocks = maxBlocks;
    this.#blocks = new EventBlocks();
  }

  /** Blocks known by the engine's hashes. */
  get blockCount(): number {
    return this.#blocks.count;
  }

  map({ dpRank, events }: VllmBatch): KvEvent[] {
    const out: KvEvent[] = [];
    for (const event of events) {
      const problem = this.#mapOne(event, dpRank, out);
      if (problem !== undefined) this.leftOut.set(problem, (this.leftOut.get(problem) ?? 0) + 1);
    }
    this.#tellRemoved(dpRank, out);
    return out;
  }

  #mapOne(event: VllmEvent, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    if (event.type === "unknown") return "unknown-event";
    if (event.type === "cleared") {
      this.#tellRemoved(dpRank, out);
      this.#blocks = new EventBlocks();
      out.push({ type: "cleared", dpRank });
      return undefined;
    }
    const tier = tierOf(event.medium);
    const problem = groupProblem(event.group) ?? (tier === undefined ? "unknown-medium" : undefined);
    if (problem !== undefined || tier === undefined) return problem;
    if (event.type === "removed") return this.#remove(event, TIERS.indexOf(tier), dpRank, out);
    if (event.hashes.length === 0) return undefined;
    this.#tellRemoved(dpRank, out);
    if (event.tokenIds.length === 0) return this.#storePlaceholders(event, tier, dpRank, out);
    return this.#store(event, tier, dpRank, out);
  }

  #store(event: VllmStored, tier: StorageTier, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    const { hashes: names, tokenIds, isPaired, parent: parentName } = event;
    const blocks = this.#blocks;
    const count = names.length / 2;
    if (event.blockSize !== this.#blockSizeTokens) return "block-size";
    if (tokenIds.length - (isPaired ? 1 : 0) !== count * this.#blockSizeTokens) return "contradiction";
    if (parentName !== undefined && hasPair(names, parentName)) return "contradiction";
    const parent = parentName === undefined ? NO_BLOCK : blocks.find(parentName[0], parentName[1]);
    if (parentName !== undefined && parent === NO_BLOCK) return "unknown-parent";
    if (blocks.count + count > this.#maxBlocks) return "no-room";
    const found = blocks.enter(names);
    if (found === undefined) return "contradiction";
    const namespace = parent !== NO_BLOCK ? blocks.namespaces[parent]! : (event.cacheSalt ?? saltOf(event.extraKeys[0]) ?? "");
    const { sequenceHashes, localHashes } = this.#hash(event, namespace, parent);
    const parentHash = parent === NO_BLOCK ? undefined : blocks.hashOf(parent);
    const startBlock = parent === NO_BLOCK ? 0 : blocks.depths[parent]! + 1;
    this.#tellRenamed(found, sequenceHashes, dpRank, out);
    blocks.fill({ entries: found, sequenceHashes, localHashes, parentHash, startBlock, namespace, tierIndex: TIERS.indexOf(tier) });
    out.push({ type: "stored", dpRank, tier, parentHash, startBlock, sequenceHashes, localHashes });
    return undefined;
  } // prettier-ignore

  #hash({ tokenIds, isPaired, loraName, extraKeys }: VllmStored, cacheNamespace: string, parent: number) {
    const seed = cacheNamespace === "" && loraName === undefined ? PLAIN_SEED : blockHashSeed({ loraName: loraName ?? "", cacheNamespace }); // prettier-ignore
    const multimodalHashes = extraKeys.map((keys) => multimodalOf(keys, loraName));
    return hashBlocks(tokenIds, this.#blockSizeTokens, seed, {
      ...(parent === NO_BLOCK ? {} : { parent: this.#blocks.hashOf(parent) }),
      ...(isPaired ? { eagle: true } : {}),
      ...(multimodalHashes.some((one) => one !== undefined) ? { multimodalHashes } : {}),
    });
  }

  /** A name that the engine gives to other content than before: the old block cannot be named any more, so it is gone. */
  #tellRenamed(entries: Int32Array, sequenceHashes: Uint32Array, dpRank: number, out: KvEvent[]): void {
    const blocks = this.#blocks;
    for (let i = 0; i < entries.length; i++) {
      const entry = entries[i]!;
      if (!blocks.isUsed(entry) || blocks.hasHash(entry, sequenceHashes[2 * i]!, sequenceHashes[2 * i + 1]!)) continue;
      for (const [index, tier] of TIERS.entries()) {
        for (let left = blocks.copies[4 * entry + index]!; left > 0; left--) {
          out.push({ type: "removed", dpRank, tier, sequenceHashes: Uint32Array.from(blocks.hashOf(entry)) });
        }
      }
      blocks.dropCopies(entry);
    }
  }

  /** An offload tier that names blocks without saying their tokens: those we know are now there too. */
  #storePlaceholders({ hashes }: VllmStored, tier: StorageTier, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    const blocks = this.#blocks;
    let problem: LeftOut | undefined;
    for (let i = 0; i < hashes.length; i += 2) {
      const entry = blocks.find(hashes[i]!, hashes[i + 1]!);
      if (entry === NO_BLOCK) {
        problem = "unknown-block";
        continue;
      }
      blocks.copies[4 * entry + TIERS.indexOf(tier)]!++;
      out.push({
        type: "stored",
        dpRank,
        tier,
        parentHash: blocks.parentHashOf(entry),
        startBlock: blocks.depths[entry]!,
        sequenceHashes: Uint32Array.from(blocks.hashOf(entry)),
        localHashes: Uint32Array.from(blocks.localHashOf(entry)),
      });
    }
    return problem;
  }

  #remove({ hashes }: VllmRemoved, tierIndex: number, dpRank: number, out: KvEvent[]): LeftOut | undefined {
    const blocks = this.#blocks;
    let problem: LeftOut | undefined;
    for (let i = 0; i < hashes.length; i += 2) {
      const entry = blocks.find(hashes[i]!, hashes[i + 1]!);
      if (entry === NO_BLOCK || blocks.copies[4 * entry + tierIndex] === 0) {
        problem = "unknown-block";
        continue;
      }
      if (this.#removedTier !== tierIndex || this.#removedCount === MAX_REMOVED) this.#tellRemoved(dpRank, out);
      this.#removedTier = tierIndex;
      blocks.copyHash(entry, this.#removed, 2 * this.#removedCount++);
      blocks.removeCopy(entry, tierIndex);
    }
    return problem;
  }

  #tellRemoved(dpRank: number, out: KvEvent[]): void {
    if (this.#removedCount === 0) return;
    const sequenceHashes = this.#removed.slice(0, 2 * this.#removedCount);
    out.push({ type: "removed", dpRank, tier: TIERS[this.#removedTier]!, sequenceHashes });
    this.#removedCount = 0;
  }
}

const PLAIN_SEED = blockHashSeed();

function hasPair(pairs: readonly number[], [lo, hi]: HashPair): boolean {
  for (let i = 0; i < pairs.length; i += 2) if (pairs[i] === lo && pairs[i + 1] === hi) return true;
  return false;
}

/** Where a medium's blocks are; an event without one is of the device. */
export function tierOf(medium: string | undefined): StorageTier | undefined {
  if (medium === undefined || medium === "GPU") return "device";
  return TIER_OF_MEDIUM[medium.toUpperCase()];
}

export function groupProblem({ index, kind, locality }: KvGroup): LeftOut | undefined {
  if (locality !== undefined && locality !== "LOCAL") return "remote";
  if (kind !== undefined) return WHOLE_PREFIX.has(kind) ? undefined : "other-group";
  return index === undefined || index === 0 ? undefined : "other-group";
}

export function saltOf(keys: VllmStored["extraKeys"][number]): string | undefined {
  const salted = keys?.find(({ text, isTuple }) => !isTuple && text.startsWith(SALT_PREFIX));
  return salted?.text.slice(SALT_PREFIX.length);
}

/** Hashes of the multimodal objects in a block: bare digests that are not the LoRA's name, and ids in tuples. */
export function multimodalOf(keys: VllmStored["extraKeys"][number], loraName: string | undefined): HashPair[] | undefined {
  const hashes = (keys ?? []).flatMap(({ text, isTuple }) => {
    const isDigest = DIGEST.test(text);
    if (!isTuple && (!isDigest || text === loraName)) return [];
    return [isDigest ? tryHashFromHex(text.slice(0, 16))! : xxh3_64(utf8.encode(text), NO_SEED)];
  });
  return hashes.length === 0 ? undefined : hashes;
} // prettier-ignore
