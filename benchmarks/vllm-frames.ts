import { SeededRandom } from "../src/std/index.ts";

/**
 * KV events as one vLLM 0.29 server publishes them, byte for byte in its encoding (msgpack in the shortest form, maps,
 * fields at their default left out), over a cache with a least-recently-used end. Token ids and hashes are random.
 */
const VOCABULARY = 128_000;

export class VllmFrames {
  readonly #blockSizeTokens: number;
  readonly #totalBlocks: number;
  readonly #random: SeededRandom;
  /** By conversation and depth, least recently used first. */
  readonly #blocks = new Map<string, bigint>();
  #sequence = 0;
  blockOperations = 0;

  constructor({ blockSizeTokens, totalBlocks, seed }: { blockSizeTokens: number; totalBlocks: number; seed: number }) {
    this.#blockSizeTokens = blockSizeTokens;
    this.#totalBlocks = totalBlocks;
    this.#random = new SeededRandom(seed);
  }

  /** The batch of a request of so many blocks; undefined when all of it was in the cache. */
  request(conversation: number, blockCount: number): Buffer[] | undefined {
    let held = 0;
    let parent: bigint | undefined;
    for (; held < blockCount; held++) {
      const block = this.#touch(`${conversation}:${held}`);
      if (block === undefined) break;
      parent = block;
    }
    const count = blockCount - held;
    if (count === 0) return undefined;
    const events = this.#evicted(count).map(removedEvent);
    const hashes = Array.from({ length: count }, () => this.#hash());
    const tokenIds = Array.from({ length: count * this.#blockSizeTokens }, () => this.#tokenId());
    events.push(storedEvent(hashes, parent, tokenIds, this.#blockSizeTokens));
    hashes.forEach((hash, i) => this.#blocks.set(`${conversation}:${held + i}`, hash));
    this.blockOperations += count + events.length - 1;
    const payload = Buffer.concat([Buffer.of(0x93), float(1.7e9), arrayHead(events.length), ...events, Buffer.of(0)]);
    const sequence = Buffer.alloc(8);
    sequence.writeBigUInt64BE(BigInt(this.#sequence++));
    return [Buffer.from(""), sequence, payload];
  }

  #touch(key: string): bigint | undefined {
    const block = this.#blocks.get(key);
    if (block === undefined) return undefined;
    this.#blocks.delete(key);
    this.#blocks.set(key, block);
    return block;
  }

  #evicted(count: number): bigint[] {
    const gone: bigint[] = [];
    for (const [key, hash] of this.#blocks) {
      if (this.#blocks.size + count <= this.#totalBlocks) break;
      this.#blocks.delete(key);
      gone.push(hash);
    }
    return gone;
  }

  #hash(): bigint {
    const half = (): bigint => BigInt(Math.floor(this.#random.nextFloat() * 2 ** 32));
    return (half() << 32n) | half();
  }

  #tokenId(): number {
    return Math.floor(this.#random.nextFloat() ** 2 * VOCABULARY);
  }
}

function storedEvent(hashes: readonly bigint[], parent: bigint | undefined, tokenIds: readonly number[], blockSize: number): Buffer {
  return Buffer.concat([
    Buffer.of(0x8b),
    text("type"), text("BlockStored"), text("block_hashes"), arrayHead(hashes.length), ...hashes.map(hash64),
    text("parent_block_hash"), parent === undefined ? NIL : hash64(parent),
    text("token_ids"), arrayHead(tokenIds.length), ...tokenIds.map(unsigned), text("block_size"), unsigned(blockSize),
    text("lora_id"), NIL, text("medium"), text("GPU"), text("lora_name"), NIL,
    text("extra_keys"), arrayHead(hashes.length), Buffer.alloc(hashes.length, 0xc0),
    text("group_idx"), unsigned(0), text("kv_cache_spec_kind"), text("full_attention"),
  ]);
} // prettier-ignore

function removedEvent(hash: bigint): Buffer {
  return Buffer.concat([
    Buffer.of(0x84),
    text("type"),
    text("BlockRemoved"),
    text("block_hashes"),
    arrayHead(1),
    hash64(hash),
    text("medium"),
    text("GPU"),
    text("group_idx"),
    unsigned(0),
  ]);
}

const NIL = Buffer.of(0xc0);

function text(value: string): Buffer {
  return Buffer.concat([Buffer.of(0xa0 | value.length), Buffer.from(value)]);
}

function hash64(value: bigint): Buffer {
  const bytes = Buffer.alloc(9, 0xcf);
  bytes.writeBigUInt64BE(value, 1);
  return bytes;
}

function unsigned(value: number): Buffer {
  if (value < 0x80) return Buffer.of(value);
  if (value < 0x100) return Buffer.of(0xcc, value);
  if (value < 0x10000) return Buffer.of(0xcd, value >> 8, value & 0xff);
  const bytes = Buffer.alloc(5, 0xce);
  bytes.writeUInt32BE(value, 1);
  return bytes;
}

function arrayHead(length: number): Buffer {
  if (length < 16) return Buffer.of(0x90 | length);
  if (length < 0x10000) return Buffer.of(0xdc, length >> 8, length & 0xff);
  const bytes = Buffer.alloc(5, 0xdd);
  bytes.writeUInt32BE(length, 1);
  return bytes;
}

function float(value: number): Buffer {
  const bytes = Buffer.alloc(9, 0xcb);
  bytes.writeDoubleBE(value, 1);
  return bytes;
}
