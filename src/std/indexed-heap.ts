/**
 * A binary heap whose items know their place in it, so that one in the middle can leave: push, shift, remove and a change
 * of an item's key are O(log n), with no search. The item to serve first is `first`. An item sits in one heap at a time;
 * `position` is the heap's to write.
 */
export interface HeapItem {
  /** In the heap's array; -1 = in no heap. */
  position: number;
}

export class IndexedHeap<Item extends HeapItem> {
  readonly #isBefore: (a: Item, b: Item) => boolean;
  readonly #items: Item[] = [];

  /** `isBefore` must be a strict order that does not change while items are inside, but for `moved` ones. */
  constructor(isBefore: (a: Item, b: Item) => boolean) {
    this.#isBefore = isBefore;
  }

  get length(): number {
    return this.#items.length;
  }

  get first(): Item | undefined {
    return this.#items[0];
  }

  /** In no particular order. */
  values(): Iterable<Item> {
    return this.#items;
  }

  push(item: Item): void {
    this.#items.push(item);
    this.#up(item, this.#items.length - 1);
  }

  shift(): Item | undefined {
    const first = this.#items[0];
    if (first !== undefined) this.remove(first);
    return first;
  }

  /** The item must be in this heap. */
  remove(item: Item): void {
    const { position } = item;
    const last = this.#items.pop()!;
    item.position = -1;
    if (last === item) return;
    this.#up(last, position);
    this.#down(last, last.position);
  }

  /** The item's key changed. */
  moved(item: Item): void {
    this.#up(item, item.position);
    this.#down(item, item.position);
  }

  #up(item: Item, from: number): void {
    let at = from;
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!this.#isBefore(item, this.#items[parent]!)) break;
      this.#put(this.#items[parent]!, at);
      at = parent;
    }
    this.#put(item, at);
  }

  #down(item: Item, from: number): void {
    const items = this.#items;
    let at = from;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= items.length) break;
      if (child + 1 < items.length && this.#isBefore(items[child + 1]!, items[child]!)) child++;
      if (!this.#isBefore(items[child]!, item)) break;
      this.#put(items[child]!, at);
      at = child;
    }
    this.#put(item, at);
  }

  #put(item: Item, position: number): void {
    this.#items[position] = item;
    item.position = position;
  }
}
