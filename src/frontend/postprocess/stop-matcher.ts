/**
 * Stop strings over text that comes in chunks. Emits everything that can no longer be part of a stop string, holds back
 * the rest, and ends at the first character that completes one; if that completes several, the longest counts. What comes
 * out does not depend on how the text was cut. Knuth, Morris and Pratt's automaton per stop string: a step per character
 * and string, nothing is read twice. One instance per stream.
 */
export class StopMatcher {
  /** The stop string that ended the text, if one did. */
  matchedStop: string | undefined = undefined;
  readonly #stops: readonly string[];
  /** Per stop string: by matched length, the longest proper prefix that the match ends with. */
  readonly #fallbacks: readonly Int32Array[];
  /** Per stop string: how much of it the text ends with. */
  readonly #states: Int32Array;
  /** Text not emitted yet; as long as the largest state. */
  #held = "";

  /** Empty stop strings never match. */
  constructor(stops: readonly string[]) {
    this.#stops = stops.filter((stop) => stop !== "").map((stop) => stop.toWellFormed());
    this.#fallbacks = this.#stops.map(fallbackTable);
    this.#states = new Int32Array(this.#stops.length);
  }

  /** Nothing can match: text passes as it is. */
  get isEmpty(): boolean {
    return this.#stops.length === 0;
  }

  get matched(): boolean {
    return this.matchedStop !== undefined;
  }

  /** The text that is safe to emit now; always "" after a match. */
  push(text: string): string {
    if (this.#stops.length === 0) return text;
    if (this.matchedStop !== undefined) return "";
    for (let index = 0; index < text.length; index++) {
      if (!this.#advance(text.charCodeAt(index))) continue;
      const stop = this.matchedStop as unknown as string;
      const emitted = (this.#held + text.slice(0, index + 1)).slice(0, -stop.length);
      this.#held = "";
      return emitted;
    }
    let held = 0;
    for (let stop = 0; stop < this.#states.length; stop++) held = Math.max(held, this.#states[stop] as number);
    const all = this.#held === "" ? text : this.#held + text;
    if (held === 0) {
      this.#held = "";
      return all;
    }
    this.#held = all.slice(all.length - held);
    return all.slice(0, all.length - held);
  }

  /** The text held back, when nothing more will come. */
  flush(): string {
    const held = this.#held;
    this.#held = "";
    this.#states.fill(0);
    return held;
  }

  /** Feeds one unit to every automaton; true if one or more reached their end. */
  #advance(unit: number): boolean {
    for (let index = 0; index < this.#stops.length; index++) {
      const stop = this.#stops[index] as string;
      const fallbacks = this.#fallbacks[index] as Int32Array;
      let state = this.#states[index] as number;
      while (state > 0 && stop.charCodeAt(state) !== unit) state = fallbacks[state] as number;
      if (stop.charCodeAt(state) === unit) state++;
      this.#states[index] = state;
      if (state === stop.length && (this.matchedStop === undefined || stop.length > this.matchedStop.length)) {
        this.matchedStop = stop;
      }
    }
    return this.matchedStop !== undefined;
  }
}

function fallbackTable(stop: string): Int32Array {
  const fallbacks = new Int32Array(stop.length + 1);
  for (let length = 2, state = 0; length <= stop.length; length++) {
    const unit = stop.charCodeAt(length - 1);
    while (state > 0 && stop.charCodeAt(state) !== unit) state = fallbacks[state] as number;
    if (stop.charCodeAt(state) === unit) state++;
    fallbacks[length] = state;
  }
  return fallbacks;
}
