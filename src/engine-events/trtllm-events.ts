import { DynamoError } from "../errors/index.ts";
import { xxh3_64, type HashPair } from "../tokens/index.ts";
import type { VllmEvent, VllmStored } from "./vllm-events.ts";

/**
 * KV events as `trtllm-serve` gives them on `POST /kv_cache_events`: a JSON list, each with a number that counts up, taken
 * out of the server's buffer by being asked for. Made into events of vLLM's form, which `vllm-event-mapper.ts` makes ours:
 *
 *     created {num_blocks_per_cache_level}            the cache begins, empty
 *     stored  {parent_hash, blocks: [{block_hash, tokens: [{token_id, token_extra_id}], cache_level}]}
 *     removed {block_hashes}
 *     updated {block_hash, cache_level: {old_value, new_value}}   between GPU (0) and host memory (1)
 *
 * A server with several attention windows tells of each; the largest one's blocks mean whole prefixes. Blocks that are not
 * full, and what comes behind one with something else than tokens in it, are left out.
 */
export interface TrtllmEvent {
  readonly id: number;
  readonly windowSize: number;
  readonly rank: number;
  readonly event:
    | { readonly type: "created"; readonly blocksByLevel: readonly number[] }
    | { readonly type: "stored"; readonly parent: string | undefined; readonly blocks: readonly TrtllmBlock[] }
    | { readonly type: "removed"; readonly hashes: readonly string[] }
    | { readonly type: "updated"; readonly hash: string; readonly from: number; readonly to: number }
    | { readonly type: "unknown" };
}

export interface TrtllmBlock {
  readonly hash: string;
  readonly tokenIds: readonly number[];
  readonly isText: boolean;
  readonly level: number;
}

interface RawEvent {
  readonly event_id: number;
  readonly window_size?: number;
  readonly attention_dp_rank?: number | null;
  readonly data: RawData;
}

interface RawData {
  readonly type: string;
  readonly num_blocks_per_cache_level?: readonly number[];
  readonly parent_hash?: RawHash | null;
  readonly blocks?: readonly RawBlock[];
  readonly block_hashes?: readonly RawHash[];
  readonly block_hash?: RawHash;
  readonly cache_level?: { readonly old_value: number; readonly new_value: number } | null;
}

interface RawBlock {
  readonly block_hash: RawHash;
  readonly tokens?: readonly { readonly token_id: number; readonly token_extra_id?: number }[];
  readonly cache_level?: number;
}

/** 64 bits as a number, of which JavaScript keeps 53: those beyond come as the text they were. Later versions: text. */
type RawHash = number | string;

/** Throws `malformed-frame`. */
export function decodeTrtllmEvents(text: string): TrtllmEvent[] {
  try {
    const raw = JSON.parse(text, exactNumber) as RawEvent[];
    if (!Array.isArray(raw)) throw new Error("no list");
    return raw.map(({ event_id: id, window_size: windowSize = 0, attention_dp_rank: rank, data }) => {
      if (!Number.isSafeInteger(id)) throw new Error(`event_id ${id}`);
      return { id, windowSize, rank: rank ?? 0, event: eventOf(data) };
    });
  } catch (cause) {
    throw new DynamoError("malformed-frame", "engine KV events could not be decoded", { diagnostic: String(cause), cause });
  }
} // prettier-ignore

function exactNumber(_key: string, value: unknown, context?: { readonly source?: string }): unknown {
  return typeof value === "number" && !Number.isSafeInteger(value) ? (context?.source ?? value) : value;
}

function eventOf(data: RawData): TrtllmEvent["event"] {
  switch (data.type) {
    case "created":
      return { type: "created", blocksByLevel: data.num_blocks_per_cache_level ?? [] };
    case "stored":
      return { type: "stored", parent: parentOf(data.parent_hash), blocks: (data.blocks ?? []).map(blockOf) };
    case "removed":
      return { type: "removed", hashes: (data.block_hashes ?? []).map(String) };
    case "updated": {
      const level = data.cache_level;
      if (level === undefined || level === null) return { type: "unknown" };
      return { type: "updated", hash: String(data.block_hash), from: level.old_value, to: level.new_value };
    }
    default:
      return { type: "unknown" };
  }
}

function parentOf(hash: RawHash | null | undefined): string | undefined {
  return hash === undefined || hash === null ? undefined : String(hash);
}

function blockOf({ block_hash: hash, tokens = [], cache_level: level = 0 }: RawBlock): TrtllmBlock {
  return {
    hash: String(hash),
    tokenIds: tokens.map(({ token_id: id }) => id),
    isText: tokens.every(({ token_extra_id: extra = 0 }) => extra === 0),
    level,
  };
}

const GROUP = { index: undefined, kind: undefined, locality: undefined };
const MEDIA = ["GPU", "CPU"];

const EMPTY: VllmStored = {
  type: "stored",
  hashes: [],
  parent: undefined,
  tokenIds: new Uint32Array(0),
  isPaired: false,
  blockSize: 0,
  loraName: undefined,
  cacheSalt: undefined,
  extraKeys: [],
  medium: undefined,
  group: GROUP,
};

/** One cache's events in vLLM's form, for the mapper. Remembers what was moved down: a removal does not say from where. */
export class TrtllmEventAdapter {
  readonly #blockSizeTokens: number;
  readonly #lower = new Map<string, number>();

  constructor(blockSizeTokens: number) {
    this.#blockSizeTokens = blockSizeTokens;
  }

  adapt(event: TrtllmEvent["event"]): VllmEvent[] {
    switch (event.type) {
      case "created":
        this.#lower.clear();
        return [{ type: "cleared" }];
      case "stored":
        return this.#stored(event.parent, event.blocks);
      case "removed":
        return this.#removed(event.hashes);
      case "updated":
        this.#note(event.hash, event.to);
        return [
          { ...EMPTY, hashes: pairOf(event.hash), medium: mediumOf(event.to) },
          { type: "removed", hashes: pairOf(event.hash), medium: mediumOf(event.from), group: GROUP },
        ];
      case "unknown":
        return [event];
    }
  }

  #stored(parent: string | undefined, blocks: readonly TrtllmBlock[]): VllmEvent[] {
    const blockSize = this.#blockSizeTokens;
    const events: VllmEvent[] = [];
    let before = parent;
    for (const { hash, tokenIds, isText, level } of blocks) {
      if (!isText || tokenIds.length !== blockSize) break;
      this.#note(hash, level);
      const medium = mediumOf(level);
      events.push({
        ...EMPTY,
        hashes: pairOf(hash),
        parent: before === undefined ? undefined : pairOf(before),
        tokenIds: Uint32Array.from(tokenIds),
        blockSize,
        medium,
      });
      before = hash;
    }
    return events;
  }

  #removed(hashes: readonly string[]): VllmEvent[] {
    return hashes.map((hash) => {
      const level = this.#lower.get(hash) ?? 0;
      this.#lower.delete(hash);
      return { type: "removed", hashes: pairOf(hash), medium: mediumOf(level), group: GROUP };
    });
  }

  #note(hash: string, level: number): void {
    if (level === 0) this.#lower.delete(hash);
    else this.#lower.set(hash, level);
  }
}

/** The number's 64 bits; of a name that is no number, a hash. */
function pairOf(hash: string): HashPair {
  if (!/^-?\d+$/.test(hash)) return xxh3_64(Buffer.from(hash), NO_SEED);
  const bits = BigInt.asUintN(64, BigInt(hash));
  return [Number(bits & 0xffffffffn), Number(bits >> 32n)];
}

const NO_SEED: HashPair = [0, 0];

function mediumOf(level: number): string {
  return MEDIA[level] ?? "DISK";
}
