import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { FairQueue, type FairItem } from "./fair-queue.ts";
import { NaiveFairQueue } from "./naive-fair-queue.ts";

interface Item extends FairItem {
  readonly id: number;
}

function anItem(id: number, tenant: string, strictPriority = 0, priorityJump = 0, cost = 1): Item {
  return { id, tenant, strictPriority, priorityJump, cost, order: 0, key: 0, position: -1 };
}

test("fair queue: tenants take turns, whatever one of them has waiting", () => {
  const queue = new FairQueue<Item>();
  for (let i = 0; i < 6; i++) queue.push(anItem(i, "hog"), i);
  queue.push(anItem(10, "small"), 10);
  queue.push(anItem(11, "small"), 11);
  queue.push(anItem(20, "late"), 20);
  const served = Array.from({ length: 9 }, () => queue.shift()!.id);
  assert.deepEqual(served, [0, 10, 20, 1, 11, 2, 3, 4, 5]);
  assert.equal(queue.shift(), undefined);
});

test("fair queue: a priority moves a tenant's own items and nobody else's", () => {
  const queue = new FairQueue<Item>();
  queue.push(anItem(1, "a"), 0);
  queue.push(anItem(2, "a"), 100);
  queue.push(anItem(3, "a", 0, 1), 200);
  queue.push(anItem(4, "a", 7), 300);
  queue.push(anItem(5, "b"), 400);
  queue.push(anItem(6, "b"), 500);
  assert.deepEqual(
    Array.from({ length: 6 }, () => queue.shift()!.id),
    [4, 5, 3, 6, 1, 2],
  );
});

const TENANTS = ["a", "b", "c", "d"];

test("fair queue: any pushes, shifts and removals give what the naive queue gives", () => {
  const operation = fc.oneof(
    {
      weight: 4,
      arbitrary: fc.record({
        type: fc.constant("push" as const),
        tenant: fc.constantFrom(...TENANTS),
        strict: fc.nat(2),
        jump: fc.integer({ min: -1, max: 3 }),
        cost: fc.integer({ min: 1, max: 4 }),
        afterMs: fc.nat(1_500),
      }),
    },
    { weight: 3, arbitrary: fc.record({ type: fc.constant("shift" as const) }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant("peek" as const) }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant("remove" as const), at: fc.nat() }) },
  );
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 150 }), (operations) => {
      const queue = new FairQueue<Item>();
      const naive = new NaiveFairQueue<Item>();
      const twins = new Map<number, [Item, Item]>();
      let nowMs = 0;
      let count = 0;
      for (const step of operations) {
        if (step.type === "push") {
          nowMs += step.afterMs;
          const twin = (): Item => anItem(count, step.tenant, step.strict, step.jump, step.cost);
          const pair: [Item, Item] = [twin(), twin()];
          twins.set(count++, pair);
          queue.push(pair[0], nowMs);
          naive.push(pair[1], nowMs);
        } else if (step.type === "shift") {
          const item = queue.shift();
          assert.equal(item?.id, naive.shift()?.id);
          if (item !== undefined) twins.delete(item.id);
        } else if (step.type === "peek") {
          assert.equal(queue.peek()?.id, naive.peek()?.id);
        } else if (twins.size > 0) {
          const [id, [mine, other]] = [...twins][step.at % twins.size]!;
          queue.remove(mine);
          naive.remove(other);
          twins.delete(id);
        }
        assert.equal(queue.length, naive.length);
        assert.equal(queue.lastOfLongest()?.id, naive.lastOfLongest()?.id);
        for (const tenant of TENANTS) assert.equal(queue.lengthOf(tenant), naive.lengthOf(tenant));
      }
    }),
  );
});

test("fair queue: a large item waits for as many turns as it costs, and not longer", () => {
  const queue = new FairQueue<Item>();
  queue.push(anItem(100, "large", 0, 0, 3), 0);
  for (let i = 0; i < 6; i++) queue.push(anItem(i, "small"), i);
  assert.deepEqual(
    Array.from({ length: 5 }, () => queue.shift()!.id),
    [0, 1, 100, 2, 3],
  );
});

const MAX_COST = 4;

test("fair queue: bounded unfairness, no starvation, order of arrival inside a tenant and priority", () => {
  const arrivals = fc.array(
    fc.record({
      tenant: fc.constantFrom(...TENANTS),
      strict: fc.nat(1),
      cost: fc.integer({ min: 1, max: MAX_COST }),
      before: fc.nat(2),
    }),
    { minLength: 1, maxLength: 120 },
  );
  fc.assert(
    fc.property(arrivals, (plan) => {
      const queue = new FairQueue<Item>();
      /** What `a` was given more than `b` since both wait without a break. */
      const leads = new Map<string, number>();
      const forget = (tenant: string): void => {
        for (const other of TENANTS) {
          leads.set(`${tenant}>${other}`, 0);
          leads.set(`${other}>${tenant}`, 0);
        }
      };
      TENANTS.forEach(forget);
      const newest = new Map<string, number>();
      /** Services since the tenant was served or began to wait. */
      const waited = new Map<string, number>();
      let nowMs = 0;
      const serve = (): void => {
        const waiting = TENANTS.filter((tenant) => queue.lengthOf(tenant) > 0);
        const item = queue.shift();
        if (item === undefined) return;
        for (const other of waiting) {
          if (other === item.tenant) continue;
          const lead: number = leads.get(`${item.tenant}>${other}`)! + item.cost;
          leads.set(`${item.tenant}>${other}`, lead);
          leads.set(`${other}>${item.tenant}`, -lead);
          // One item, and one turn for having been there first.
          assert.ok(lead <= 2 * MAX_COST, `${item.tenant} leads ${other} by ${lead}`);
          waited.set(other, (waited.get(other) ?? 0) + 1);
          const most = MAX_COST * TENANTS.length;
          assert.ok(waited.get(other)! <= most, `${other} waited for ${waited.get(other)} others`);
        }
        waited.set(item.tenant, 0);
        const kind = `${item.tenant}/${item.strictPriority}`;
        assert.ok(item.id > (newest.get(kind) ?? -1), "first come, first served inside a tenant and priority");
        newest.set(kind, item.id);
        if (queue.lengthOf(item.tenant) === 0) forget(item.tenant);
      };
      plan.forEach(({ tenant, strict, cost, before }, id) => {
        for (let i = 0; i < before; i++) serve();
        if (queue.lengthOf(tenant) === 0) waited.set(tenant, 0);
        queue.push(anItem(id, tenant, strict, 0, cost), (nowMs += 1));
      });
      while (queue.length > 0) serve();
    }),
    { numRuns: 500 },
  );
});
