import assert from "node:assert/strict";

/**
 * Which slots of an arena are taken. Slots are given out from the lowest free one on, as (first, count) runs, so that a
 * fresh arena gives one run and a transfer one descriptor. A byte per slot; O(slots) per call.
 */
export class SlotTable {
  readonly slotCount: number;
  readonly #taken: Uint8Array;
  #freeCount: number;

  constructor(slotCount: number) {
    this.slotCount = slotCount;
    this.#taken = new Uint8Array(slotCount);
    this.#freeCount = slotCount;
  }

  get freeCount(): number {
    return this.#freeCount;
  }

  get takenCount(): number {
    return this.slotCount - this.#freeCount;
  }

  /** (first, count) pairs of `count` slots; there must be as many. */
  take(count: number): Uint32Array {
    assert(count <= this.#freeCount, "no more slots are taken than are free");
    const runs: number[] = [];
    let left = count;
    for (let slot = 0; left > 0; slot++) {
      if (this.#taken[slot] !== 0) continue;
      this.#taken[slot] = 1;
      left--;
      const last = runs.length - 2;
      if (last >= 0 && runs[last]! + runs[last + 1]! === slot) runs[last + 1]!++;
      else runs.push(slot, 1);
    }
    this.#freeCount -= count;
    return Uint32Array.from(runs);
  }

  free(runs: Uint32Array): void {
    for (let i = 0; i < runs.length; i += 2) {
      const first = runs[i]!;
      const count = runs[i + 1]!;
      for (let slot = first; slot < first + count; slot++) {
        assert.equal(this.#taken[slot], 1, "a slot is given back once");
        this.#taken[slot] = 0;
      }
      this.#freeCount += count;
    }
  }
}
