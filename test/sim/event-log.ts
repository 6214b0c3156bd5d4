/**
 * What happened in a run: a running hash of all lines, and the last of them for people. Two runs of a seed are equal when
 * their hashes are.
 */
export class EventLog {
  lines = 0;
  #high = 0xdeadbeef;
  #low = 0x41c6ce57;
  readonly #kept: string[] = [];
  readonly #keep: number;
  #at = 0;

  constructor(keep = 200) {
    this.#keep = keep;
  }

  add(nowMs: number, text: string): void {
    const line = `${nowMs.toFixed(3)} ${text}`;
    this.lines++;
    let high = this.#high;
    let low = this.#low;
    for (let i = 0; i < line.length; i++) {
      const code = line.charCodeAt(i);
      high = Math.imul(high ^ code, 2654435761);
      low = Math.imul(low ^ code, 1597334677);
    }
    this.#high = high ^ (low >>> 16);
    this.#low = low ^ (high >>> 13);
    this.#kept[this.#at] = line;
    this.#at = (this.#at + 1) % this.#keep;
  }

  get hash(): string {
    return (this.#high >>> 0).toString(16).padStart(8, "0") + (this.#low >>> 0).toString(16).padStart(8, "0");
  }

  /** Oldest first. */
  last(count: number): string[] {
    const inOrder = [...this.#kept.slice(this.#at), ...this.#kept.slice(0, this.#at)];
    return inOrder.slice(-count);
  }
}
