import { DynamoError } from "../../errors/index.ts";
import type { EvictionName } from "../eviction/index.ts";
import { SlotIndex } from "./slot-index.ts";

/**
 * G2: blocks in this process's memory, which the engine's thread reads and writes too. The memory is reserved whole and
 * becomes resident as slots are first written. Staging area of the tiers below: what is read from them comes here first.
 */
export interface HostTierOptions {
  readonly bytes: number;
  readonly blockBytes: number;
  readonly eviction?: EvictionName;
}

export class HostTier extends SlotIndex {
  readonly memory: SharedArrayBuffer;
  readonly blockBytes: number;
  readonly #bytes: Uint8Array;

  constructor({ bytes, blockBytes, eviction = "lineage" }: HostTierOptions) {
    const slotCount = Math.floor(bytes / blockBytes);
    if (slotCount < 1) {
      throw new DynamoError(
        "invalid-config",
        `host memory for KV blocks: expected at least ${blockBytes} bytes, one block of this model, got ${bytes}`,
      );
    }
    super(slotCount, eviction);
    this.blockBytes = blockBytes;
    this.memory = new SharedArrayBuffer(slotCount * blockBytes);
    this.#bytes = new Uint8Array(this.memory);
  }

  bytesOf(slot: number): Uint8Array {
    return this.#bytes.subarray(slot * this.blockBytes, (slot + 1) * this.blockBytes);
  }

  /** Of the blocks it holds. */
  get usedBytes(): number {
    return this.pool.registeredCount * this.blockBytes;
  }

  get capacityBytes(): number {
    return this.pool.blockCount * this.blockBytes;
  }
}
