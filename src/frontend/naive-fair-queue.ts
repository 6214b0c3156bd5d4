import type { FairItem } from "./fair-queue.ts";

/** The plain version of `FairQueue`: one list of who waits, one of whose turn it is. What its tests compare with. */
export class NaiveFairQueue<Item extends FairItem> {
  #items: Item[] = [];
  #turns: string[] = [];
  #credits = new Map<string, number>();
  #next: Item | undefined;
  #order = 0;

  get length(): number {
    return this.#items.length;
  }

  push(item: Item, nowMs: number): void {
    item.order = this.#order++;
    item.key = nowMs - Math.max(0, item.priorityJump) * 1_000;
    this.#items.push(item);
    if (!this.#turns.includes(item.tenant)) this.#turns.push(item.tenant);
  }

  peek(): Item | undefined {
    while (this.#next === undefined && this.#items.length > 0) {
      const tenant = this.#turns[0]!;
      const item = this.#of(tenant)[0]!;
      const credit = this.#credits.get(tenant) ?? 0;
      this.#credits.set(tenant, this.#turns.length === 1 ? Math.max(credit, item.cost) : credit + 1);
      if (this.#credits.get(tenant)! >= item.cost) this.#next = item;
      else this.#turns.push(this.#turns.shift()!);
    }
    return this.#next;
  }

  shift(): Item | undefined {
    const item = this.peek();
    if (item === undefined) return undefined;
    const { tenant } = item;
    this.#credits.set(tenant, this.#credits.get(tenant)! - item.cost);
    this.#turns = [...this.#turns.filter((other) => other !== tenant), tenant];
    this.remove(item);
    return item;
  }

  remove(item: Item): void {
    this.#items = this.#items.filter((other) => other !== item);
    if (this.#next === item) this.#next = undefined;
    if (this.lengthOf(item.tenant) > 0) return;
    this.#turns = this.#turns.filter((tenant) => tenant !== item.tenant);
    this.#credits.delete(item.tenant);
  }

  lengthOf(tenant: string): number {
    return this.#items.filter((item) => item.tenant === tenant).length;
  }

  lastOfLongest(): Item | undefined {
    let longest: Item[] = [];
    for (const tenant of this.#turns) {
      const items = this.#of(tenant);
      if (items.length > longest.length) longest = items;
    }
    return longest.at(-1);
  }

  /** In the order in which they are served. */
  #of(tenant: string): Item[] {
    return this.#items
      .filter((item) => item.tenant === tenant)
      .sort((a, b) => b.strictPriority - a.strictPriority || a.key - b.key || a.order - b.order);
  }
}
