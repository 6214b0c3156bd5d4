/** A growing list of token ids. `room` before a run of writes keeps the check out of the inner loop. */
export class TokenSink {
  ids: Uint32Array;
  length = 0;

  constructor(capacity: number) {
    this.ids = new Uint32Array(Math.max(16, capacity));
  }

  push(id: number): void {
    if (this.length === this.ids.length) this.room(1);
    this.ids[this.length++] = id;
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
