import { IndexedHeap, type HeapItem } from "../std/index.ts";

/**
 * Who waits for a place, in fair shares: tenants take turns, one item each, and inside a tenant the order is strict
 * priority (larger first), then arrival with `priorityJump` as a head start in seconds, as in the router's queue.
 *
 * Deficit round robin (Shreedhar and Varghese, 1995) with a quantum of one: at each turn a tenant gains one place of
 * credit, and an item is served when its tenant can pay for it. Whoever else comes, under however many new names:
 *
 *   between two tenants that wait all the time, what one was given exceeds the other's by at most one item and a turn;
 *   a tenant's item of cost c is served after at most c turns of each of the others: nobody starves;
 *   a tenant that does not wait is forgotten at once, credit too: memory is what waits, and nothing else.
 *
 * A priority only moves a tenant's own items, so nobody gains by claiming one. Push, shift and remove are O(log n) in the
 * tenant's items; shift also passes over tenants that cannot pay yet. Owned by the admission gate.
 */
export interface FairItem extends HeapItem {
  readonly tenant: string;
  readonly strictPriority: number;
  /** Seconds; below 0 counts as 0. */
  readonly priorityJump: number;
  /** Places it takes; an integer from 1 up. */
  readonly cost: number;
  /** Set by the queue. */
  order: number;
  /** Milliseconds: arrival less the head start. Set by the queue. */
  key: number;
}

class Tenant<Item extends FairItem> {
  readonly name: string;
  readonly items = new IndexedHeap<Item>(isBefore);
  credit = 0;

  constructor(name: string) {
    this.name = name;
  }
}

export class FairQueue<Item extends FairItem> {
  /** In the order of their turns; only tenants with items. */
  readonly #tenants = new Map<string, Tenant<Item>>();
  #length = 0;
  #order = 0;
  /** Whose turn it is, once that was asked. Stays so until it is served or leaves. */
  #next: Item | undefined;

  get length(): number {
    return this.#length;
  }

  push(item: Item, nowMs: number): void {
    item.order = this.#order++;
    item.key = nowMs - Math.max(0, item.priorityJump) * 1_000;
    let tenant = this.#tenants.get(item.tenant);
    if (tenant === undefined) this.#tenants.set(item.tenant, (tenant = new Tenant<Item>(item.tenant)));
    tenant.items.push(item);
    this.#length++;
  }

  /** Whose turn it is; still in the queue. */
  peek(): Item | undefined {
    if (this.#next !== undefined || this.#length === 0) return this.#next;
    for (;;) {
      const tenant: Tenant<Item> = this.#tenants.values().next().value!;
      const item = tenant.items.first!;
      // Alone, it need not be made to wait for credit.
      tenant.credit = this.#tenants.size === 1 ? Math.max(tenant.credit, item.cost) : tenant.credit + 1;
      if (tenant.credit >= item.cost) return (this.#next = item);
      this.#toTheEnd(tenant);
    }
  }

  shift(): Item | undefined {
    const item = this.peek();
    if (item === undefined) return undefined;
    const tenant = this.#tenants.get(item.tenant)!;
    tenant.credit -= item.cost;
    this.remove(item);
    if (tenant.items.length > 0) this.#toTheEnd(tenant);
    return item;
  }

  /** The item must be in this queue. */
  remove(item: Item): void {
    const tenant = this.#tenants.get(item.tenant)!;
    tenant.items.remove(item);
    this.#length--;
    if (item === this.#next) this.#next = undefined;
    if (tenant.items.length === 0) this.#tenants.delete(item.tenant);
  }

  get tenantCount(): number {
    return this.#tenants.size;
  }

  lengthOf(tenant: string): number {
    return this.#tenants.get(tenant)?.items.length ?? 0;
  }

  /** Who would be served last of the tenant with most items: whom to send away for one of a tenant with fewer. O(n). */
  lastOfLongest(): Item | undefined {
    let longest: Tenant<Item> | undefined;
    for (const tenant of this.#tenants.values()) {
      if (longest === undefined || tenant.items.length > longest.items.length) longest = tenant;
    }
    let last: Item | undefined;
    for (const item of longest?.items.values() ?? []) if (last === undefined || isBefore(last, item)) last = item;
    return last;
  }

  #toTheEnd(tenant: Tenant<Item>): void {
    this.#tenants.delete(tenant.name);
    this.#tenants.set(tenant.name, tenant);
  }
}

function isBefore(a: FairItem, b: FairItem): boolean {
  if (a.strictPriority !== b.strictPriority) return a.strictPriority > b.strictPriority;
  if (a.key !== b.key) return a.key < b.key;
  return a.order < b.order;
}
