import { BlockPool, BlockState, NO_BLOCK } from "../block-pool.ts";
import type { EvictionName } from "../eviction/index.ts";
import type { BlockIdentity } from "./block-identity.ts";

/**
 * A block pool whose slots remember what they hold beyond the hash: what a lower tier and the router need to know of a
 * block. 28 bytes a slot. Shared by the host tier (slots of memory) and the disk tier (slots of a file).
 */
const FIELDS = 7;

export class SlotIndex {
  readonly pool: BlockPool;
  readonly #fields: Uint32Array;
  readonly #one = new Int32Array(1);

  constructor(slotCount: number, eviction: EvictionName) {
    this.pool = new BlockPool({ blockCount: slotCount, eviction });
    this.#fields = new Uint32Array(FIELDS * slotCount);
  }

  has({ lo, hi }: BlockIdentity): boolean {
    return this.pool.find(lo, hi) !== NO_BLOCK;
  }

  /** A slot to fill, evicting what is needed, or NO_BLOCK when every block is held. */
  take(): number {
    return this.pool.allocate(1, this.#one) ? this.#one[0]! : NO_BLOCK;
  }

  /** The slot is filled. Returns the handle that the caller holds from now on: another slot if the block was there. */
  fill(slot: number, block: BlockIdentity): number {
    this.#fields.set(
      [block.lo, block.hi, block.parentLo, block.parentHi, block.localLo, block.localHi, block.depth],
      FIELDS * slot,
    );
    this.pool.stage(slot, block.lo, block.hi, block.parentLo, block.parentHi);
    return this.pool.register(slot);
  }

  /** (lo, hi) of every block that can be found; for tests. */
  hashes(): Uint32Array {
    const found: number[] = [];
    for (let slot = 0; slot < this.pool.blockCount; slot++) {
      if (this.pool.stateOf(slot) === BlockState.registered) found.push(...this.pool.hashOf(slot));
    }
    return Uint32Array.from(found);
  }

  /** Of a registered slot. */
  identityOf(slot: number): BlockIdentity {
    const [lo, hi, parentLo, parentHi, localLo, localHi, depth] = this.#fields.subarray(FIELDS * slot) as unknown as [
      number,
      number,
      number,
      number,
      number,
      number,
      number,
    ];
    return { lo, hi, parentLo, parentHi, localLo, localHi, depth };
  }
}
