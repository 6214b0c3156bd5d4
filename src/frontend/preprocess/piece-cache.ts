/**
 * Piece of text -> token ids, without a string per look-up: open addressing over code units, keys and values in two
 * arenas. Bounded: when entries or an arena are full it forgets everything and starts again (words of ordinary text are
 * back after a few hundred microseconds; a hostile text only makes its own requests slower). About 3.5 MB per model.
 *
 *     #slots    entry + 1, or 0                 #keyEnds[entry]   end of the key in #keys
 *     #hashes   hash by slot                    #idEnds[entry]    end of the tokens in ids
 */
const ENTRIES_MAX = 1 << 15;
const SLOTS = ENTRIES_MAX * 2;
const KEY_UNITS = 1 << 19;
const IDS = 1 << 18;

/** Look-ups end after this many slots: at half load that is enough, and crafted collisions cost no more than a miss. */
const PROBES_MAX = 16;

/** Longer pieces are rare and not kept. */
export const CACHED_UNITS_MAX = 48;

export class PieceCache {
  /** After a successful `find`: the tokens are `ids[idStart .. idEnd)`. */
  readonly ids = new Uint32Array(IDS);
  idStart = 0;
  idEnd = 0;

  readonly #slots = new Int32Array(SLOTS);
  readonly #hashes = new Int32Array(SLOTS);
  readonly #keys = new Uint16Array(KEY_UNITS);
  readonly #keyEnds = new Int32Array(ENTRIES_MAX + 1);
  readonly #idEnds = new Int32Array(ENTRIES_MAX + 1);
  #count = 0;

  /** The hash to pass to `find` and `add`. */
  static hash(units: Uint16Array, start: number, end: number): number {
    let hash = end - start;
    for (let index = start; index < end; index++) hash = Math.imul(hash ^ (units[index] as number), 0x01000193);
    hash ^= hash >>> 15;
    hash = Math.imul(hash, 0x2c1b3c6d);
    return hash ^ (hash >>> 13);
  }

  find(units: Uint16Array, start: number, end: number, hash: number): boolean {
    const keys = this.#keys;
    for (let probe = 0; probe < PROBES_MAX; probe++) {
      const slot = (hash + probe) & (SLOTS - 1);
      const entry = (this.#slots[slot] as number) - 1;
      if (entry < 0) return false;
      if (this.#hashes[slot] !== hash) continue;
      const keyStart = entry === 0 ? 0 : (this.#keyEnds[entry - 1] as number);
      if ((this.#keyEnds[entry] as number) - keyStart !== end - start) continue;
      let index = start;
      while (index < end && keys[keyStart + index - start] === units[index]) index++;
      if (index < end) continue;
      this.idStart = entry === 0 ? 0 : (this.#idEnds[entry - 1] as number);
      this.idEnd = this.#idEnds[entry] as number;
      return true;
    }
    return false;
  }

  /** Keeps `ids[from .. to)` for the piece if there is a slot near its hash; the piece is not in the cache and not over `CACHED_UNITS_MAX`. */
  add(units: Uint16Array, start: number, end: number, hash: number, ids: Uint32Array, from: number, to: number): void {
    let keyEnd = this.#count === 0 ? 0 : (this.#keyEnds[this.#count - 1] as number);
    let idEnd = this.#count === 0 ? 0 : (this.#idEnds[this.#count - 1] as number);
    if (this.#count === ENTRIES_MAX || keyEnd + end - start > KEY_UNITS || idEnd + to - from > IDS) {
      this.#slots.fill(0);
      this.#count = 0;
      keyEnd = 0;
      idEnd = 0;
    }
    let probe = 0;
    while (probe < PROBES_MAX && this.#slots[(hash + probe) & (SLOTS - 1)] !== 0) probe++;
    if (probe === PROBES_MAX) return;
    for (let index = start; index < end; index++) this.#keys[keyEnd++] = units[index] as number;
    for (let index = from; index < to; index++) this.ids[idEnd++] = ids[index] as number;
    this.#keyEnds[this.#count] = keyEnd;
    this.#idEnds[this.#count] = idEnd;
    const slot = (hash + probe) & (SLOTS - 1);
    this.#slots[slot] = ++this.#count;
    this.#hashes[slot] = hash;
  }
}
