/** A growing list of token ids. `room` before a run of writes keeps the check out of the inner loop. */
export class TokenSink {
  ids: Uint32Array;
  length = 0;
  /** How many of them came from a cache. */
  cachedCount = 0;

  constructor(capacity: number) {
    this.ids = new Uint32Array(capacity);
  }

  reset(): void {
    this.length = 0;
    this.cachedCount = 0;
  }

  push(id: number): void {
    if (this.length === this.ids.length) this.room(1);
    this.ids[this.length++] = id;
  }

  append(ids: Uint32Array): void {
    this.room(ids.length);
    this.ids.set(ids, this.length);
    this.length += ids.length;
  }

  /** Makes sure that `count` more fit; `ids` may be another array afterwards. */
  room(count: number): void {
    if (this.length + count <= this.ids.length) return;
    const grown = new Uint32Array(Math.max(this.ids.length * 2, this.length + count));
    grown.set(this.ids.subarray(0, this.length));
    this.ids = grown;
  }

  /** The tokens so far, as an array of their own. */
  take(): Uint32Array {
    return this.ids.slice(0, this.length);
  }
}
