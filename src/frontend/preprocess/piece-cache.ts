/**
 * Piece of text -> token ids, without a string per look-up: open addressing over code units, keys and values in two
 * arenas. Bounded: when entries or an arena are full it forgets everything and starts again (words of ordinary text are
 * back after a few hundred microseconds; a hostile text only makes its own requests slower). Begins with 50 KB and doubles
 * up to about 3.5 MB per model.
 *
 *     #slots    entry + 1, or 0                 #keyEnds[entry]   end of the key in #keys
 *     #hashes   hash by slot                    #idEnds[entry]    end of the tokens in ids
 */
const ENTRIES_MIN = 1 << 9;
const ENTRIES_MAX = 1 << 15;
/** Per entry. */
const SLOTS = 2;
const KEY_UNITS = 16;
const IDS = 8;

/** Look-ups end after this many slots: at half load that is enough, and crafted collisions cost no more than a miss. */
const PROBES_MAX = 16;

/** Longer pieces are rare and not kept. */
export const CACHED_UNITS_MAX = 48;

export class PieceCache {
  /** After a successful `find`: the tokens are `ids[idStart .. idEnd)`. */
  ids = new Uint32Array(IDS * ENTRIES_MIN);
  idStart = 0;
  idEnd = 0;

  #size = ENTRIES_MIN;
  #slots = new Int32Array(SLOTS * ENTRIES_MIN);
  #hashes = new Int32Array(SLOTS * ENTRIES_MIN);
  #keys = new Uint16Array(KEY_UNITS * ENTRIES_MIN);
  #keyEnds = new Int32Array(ENTRIES_MIN);
  #idEnds = new Int32Array(ENTRIES_MIN);
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
    const mask = this.#slots.length - 1;
    for (let probe = 0; probe < PROBES_MAX; probe++) {
      const slot = (hash + probe) & mask;
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
    while (
      this.#count === this.#size ||
      keyEnd + end - start > this.#keys.length ||
      idEnd + to - from > this.ids.length
    ) {
      if (this.#size < ENTRIES_MAX) {
        this.#grow();
        continue;
      }
      this.#slots.fill(0);
      this.#count = 0;
      keyEnd = 0;
      idEnd = 0;
      // More than an empty one holds: nobody keeps so many tokens of one piece.
      if (to - from > this.ids.length) return;
    }
    const mask = this.#slots.length - 1;
    let probe = 0;
    while (probe < PROBES_MAX && this.#slots[(hash + probe) & mask] !== 0) probe++;
    if (probe === PROBES_MAX) return;
    for (let index = start; index < end; index++) this.#keys[keyEnd++] = units[index] as number;
    for (let index = from; index < to; index++) this.ids[idEnd++] = ids[index] as number;
    this.#keyEnds[this.#count] = keyEnd;
    this.#idEnds[this.#count] = idEnd;
    const slot = (hash + probe) & mask;
    this.#slots[slot] = ++this.#count;
    this.#hashes[slot] = hash;
  }

  /** Twice as large. An entry whose new neighbourhood is full is not found again. */
  #grow(): void {
    const size = this.#size * 2;
    const [slots, hashes] = [this.#slots, this.#hashes];
    this.#size = size;
    this.ids = grown(this.ids, new Uint32Array(IDS * size));
    this.#keys = grown(this.#keys, new Uint16Array(KEY_UNITS * size));
    this.#keyEnds = grown(this.#keyEnds, new Int32Array(size));
    this.#idEnds = grown(this.#idEnds, new Int32Array(size));
    this.#slots = new Int32Array(SLOTS * size);
    this.#hashes = new Int32Array(SLOTS * size);
    const mask = SLOTS * size - 1;
    for (let from = 0; from < slots.length; from++) {
      if (slots[from] === 0) continue;
      const hash = hashes[from] as number;
      let probe = 0;
      while (probe < PROBES_MAX && this.#slots[(hash + probe) & mask] !== 0) probe++;
      if (probe === PROBES_MAX) continue;
      this.#slots[(hash + probe) & mask] = slots[from] as number;
      this.#hashes[(hash + probe) & mask] = hash;
    }
  }
}

function grown<T extends Uint32Array | Int32Array | Uint16Array>(from: T, to: T): T {
  to.set(from);
  return to;
}
