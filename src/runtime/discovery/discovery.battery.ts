import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { DynamoError, type Reason } from "../../errors/index.ts";
import type { Discovery, DiscoveryChange, DiscoveryEntry, JsonValue, Lease, Watch } from "./base.ts";

/** One store, and as many views of it as a test opens: each as another process would have it. */
export interface DiscoveryUnderTest {
  open(): Promise<Discovery>;
  cleanup(): Promise<void>;
}

interface BatteryOptions {
  /** Random histories to try. @default 50 */
  readonly historyCount?: number;
}

/** Remembers what a watch was told, keeps the state that follows from it, and waits for states. */
export class ChangeRecorder {
  readonly changes: DiscoveryChange[] = [];
  readonly state = new Map<string, DiscoveryEntry>();
  /** Keys whose last delete came of a lease that expired. */
  readonly expired = new Set<string>();
  #waiters: (() => void)[] = [];

  readonly listener = (change: DiscoveryChange): void => {
    this.changes.push(change);
    if (change.type === "put") this.state.set(change.entry.key, change.entry);
    else assert.ok(this.state.delete(change.key), `delete of ${change.key}, which was not there`);
    if (change.type === "delete" && change.expired === true) this.expired.add(change.key);
    else this.expired.delete(change.type === "put" ? change.entry.key : change.key);
    for (const wake of this.#waiters.splice(0)) wake();
  };

  /** `{key: value}` of what the watcher knows. */
  get values(): Record<string, JsonValue> {
    return valuesOf([...this.state.values()]);
  }

  /** Resolves once the values are these. */
  async becomes(expected: Record<string, JsonValue>, deadlineMs = 5_000): Promise<void> {
    const wanted = JSON.stringify(sorted(expected));
    const endMs = performance.now() + deadlineMs;
    while (JSON.stringify(this.values) !== wanted) {
      const leftMs = endMs - performance.now();
      assert.ok(leftMs > 0, `expected ${wanted}, got ${JSON.stringify(this.values)}`);
      const woken = Promise.withResolvers<void>();
      const timer = setTimeout(woken.resolve, leftMs);
      this.#waiters.push(woken.resolve);
      await woken.promise;
      clearTimeout(timer);
    }
  }
}

function sorted(values: Record<string, JsonValue>): Record<string, JsonValue> {
  return Object.fromEntries(Object.entries(values).sort(([a], [b]) => (a < b ? -1 : 1)));
}

export function valuesOf(entries: readonly DiscoveryEntry[]): Record<string, JsonValue> {
  return sorted(Object.fromEntries(entries.map(({ key, value }) => [key, value])));
}

export function rejectsWith(reason: Reason): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof DynamoError, `expected a DynamoError, got ${String(error)}`);
    assert.equal(error.reason, reason);
    return true;
  };
}

/** What every discovery back end must do. */
export function discoveryBattery(
  name: string,
  make: () => Promise<DiscoveryUnderTest>,
  options: BatteryOptions = {},
): void {
  const withStore = (run: (open: () => Promise<Discovery>) => Promise<void>) => async (): Promise<void> => {
    const store = await make();
    const views: Discovery[] = [];
    try {
      await run(async () => {
        const view = await store.open();
        views.push(view);
        return view;
      });
    } finally {
      await Promise.all(views.map((view) => view.close()));
      await store.cleanup();
    }
  };

  describe(`discovery battery: ${name}`, () => {
    it(
      "what one process puts, another lists, sorted by key, with the lease that holds it",
      withStore(async (open) => {
        const [writer, reader] = [await open(), await open()];
        const lease = await writer.openLease();
        assert.match(lease.id, /^[0-9a-f]{16}$/);
        await lease.put("v1/b", { port: 2 });
        await lease.put("v1/a", [1, "x", null]);
        assert.deepEqual(await reader.list("v1/"), [
          { key: "v1/a", value: [1, "x", null], leaseId: lease.id },
          { key: "v1/b", value: { port: 2 }, leaseId: lease.id },
        ]);
      }),
    );

    it(
      "a process reads its own writes at once",
      withStore(async (open) => {
        const discovery = await open();
        const lease = await discovery.openLease();
        const watch = await discovery.watch("", () => undefined);
        for (let i = 0; i < 5; i++) {
          await lease.put("v1/a", i);
          assert.deepEqual(valuesOf(await discovery.list("v1/")), { "v1/a": i });
        }
        await watch.close();
      }),
    );

    it(
      "a prefix ends at a segment",
      withStore(async (open) => {
        const discovery = await open();
        const lease = await discovery.openLease();
        for (const key of ["v1/a", "v1/a/x", "v1/ab/x", "v2/a/x"]) await lease.put(key, key);
        assert.deepEqual(Object.keys(valuesOf(await discovery.list("v1/a/"))), ["v1/a/x"]);
        assert.deepEqual(Object.keys(valuesOf(await discovery.list("v1/"))), ["v1/a", "v1/a/x", "v1/ab/x"]);
        assert.equal((await discovery.list("")).length, 4);
        for (const prefix of ["v1", "/", "v1//", "v1/ä/"]) {
          await assert.rejects(discovery.list(prefix), rejectsWith("invalid-config"));
          await assert.rejects(
            discovery.watch(prefix, () => undefined),
            rejectsWith("invalid-config"),
          );
        }
      }),
    );

    it(
      "a watch tells the first set before it resolves, then puts, changes and deletes of others",
      withStore(async (open) => {
        const [writer, watcher] = [await open(), await open()];
        const lease = await writer.openLease();
        await lease.put("v1/b", 1);
        await lease.put("v1/a", 1);
        await lease.put("v2/a", 1);
        const seen = new ChangeRecorder();
        await watcher.watch("v1/", seen.listener);
        assert.deepEqual(
          seen.changes.map((change) => (change.type === "put" ? change.entry.key : change)),
          ["v1/a", "v1/b"],
        );
        await lease.put("v1/c", "new");
        await seen.becomes({ "v1/a": 1, "v1/b": 1, "v1/c": "new" });
        await lease.put("v1/a", 2);
        await seen.becomes({ "v1/a": 2, "v1/b": 1, "v1/c": "new" });
        await lease.delete("v1/b");
        await seen.becomes({ "v1/a": 2, "v1/c": "new" });
        assert.equal(seen.changes.length, 5);
      }),
    );

    it(
      "a watch of an empty store resolves and sees what comes",
      withStore(async (open) => {
        const [writer, watcher] = [await open(), await open()];
        const seen = new ChangeRecorder();
        await watcher.watch("v1/", seen.listener);
        assert.deepEqual(seen.changes, []);
        const lease = await writer.openLease();
        await lease.put("v1/a", 1);
        await seen.becomes({ "v1/a": 1 });
      }),
    );

    it(
      "a change is seen by others within 200 ms",
      withStore(async (open) => {
        const [writer, watcher] = [await open(), await open()];
        const lease = await writer.openLease();
        const seen = new ChangeRecorder();
        await watcher.watch("v1/", seen.listener);
        // The best of a few: the bound is the store's, a busy test machine may pause any one of them.
        let bestMs = Infinity;
        for (let i = 0; i < 5 && bestMs > 200; i++) {
          await lease.put("v1/a", i);
          const startMs = performance.now();
          await seen.becomes({ "v1/a": i });
          bestMs = Math.min(bestMs, performance.now() - startMs);
        }
        assert.ok(bestMs <= 200, `took ${bestMs} ms`);
      }),
    );

    it(
      "a put of an unchanged value is not repeated",
      withStore(async (open) => {
        const [writer, watcher] = [await open(), await open()];
        const lease = await writer.openLease();
        const seen = new ChangeRecorder();
        await watcher.watch("v1/", seen.listener);
        await lease.put("v1/a", { n: 1 });
        await seen.becomes({ "v1/a": { n: 1 } });
        await lease.put("v1/a", { n: 1 });
        await lease.put("v1/b", 1);
        await seen.becomes({ "v1/a": { n: 1 }, "v1/b": 1 });
        assert.equal(seen.changes.length, 2);
      }),
    );

    it(
      "of two writers of a key the later wins, and the earlier cannot take it away",
      withStore(async (open) => {
        const [first, second, watcher] = [await open(), await open(), await open()];
        const seen = new ChangeRecorder();
        await watcher.watch("v1/", seen.listener);
        const [lease1, lease2] = [await first.openLease(), await second.openLease()];
        await lease1.put("v1/a", "first");
        await lease2.put("v1/a", "second");
        await seen.becomes({ "v1/a": "second" });
        assert.equal(seen.state.get("v1/a")?.leaseId, lease2.id);
        await lease1.delete("v1/a");
        await lease1.close();
        await lease2.put("v1/b", 1);
        await seen.becomes({ "v1/a": "second", "v1/b": 1 });
        // And with the winner the key is gone: what it replaced does not come back.
        await lease2.close();
        await seen.becomes({});
        assert.deepEqual(await watcher.list(""), []);
      }),
    );

    it(
      "two writers that put a key again and again agree with all watchers on one winner",
      withStore(async (open) => {
        const views = [await open(), await open(), await open()];
        const recorders = views.map(() => new ChangeRecorder());
        for (const [i, view] of views.entries()) await view.watch("", recorders[i]!.listener);
        const leases = [await views[0]!.openLease(), await views[1]!.openLease()];
        await Promise.all(
          leases.map(async (lease, writer) => {
            for (let i = 0; i < 10; i++) await lease.put("v1/contested", `${writer}.${i}`);
          }),
        );
        const winner = valuesOf(await views[2]!.list(""));
        assert.ok(["0.9", "1.9"].includes(winner["v1/contested"] as string));
        for (const recorder of recorders) await recorder.becomes(winner);
      }),
    );

    it(
      "closing a lease removes its keys and no others, once, and ends it for its holder",
      withStore(async (open) => {
        const [writer, watcher] = [await open(), await open()];
        const [lease, other] = [await writer.openLease(), await writer.openLease()];
        await lease.put("v1/a", 1);
        await lease.put("v1/b", 1);
        await other.put("v1/c", 1);
        const seen = new ChangeRecorder();
        await watcher.watch("v1/", seen.listener);
        await lease.close();
        await lease.close();
        await seen.becomes({ "v1/c": 1 });
        await assert.rejects(lease.put("v1/a", 2), rejectsWith("lease-lost"));
        await lease.delete("v1/c");
        assert.deepEqual(valuesOf(await writer.list("")), { "v1/c": 1 });
        const lost = await Promise.race([lease.lost.then(() => "lost"), other.put("v1/d", 1).then(() => "not lost")]);
        assert.equal(lost, "not lost");
      }),
    );

    it(
      "deleting a key that is not there, or is another's, changes nothing",
      withStore(async (open) => {
        const discovery = await open();
        const [lease, other] = [await discovery.openLease(), await discovery.openLease()];
        await other.put("v1/a", 1);
        await lease.delete("v1/a");
        await lease.delete("v1/none");
        assert.deepEqual(valuesOf(await discovery.list("")), { "v1/a": 1 });
      }),
    );

    it(
      "a closed watch is told nothing more",
      withStore(async (open) => {
        const [writer, watcher] = [await open(), await open()];
        const [closing, staying] = [new ChangeRecorder(), new ChangeRecorder()];
        const watch = await watcher.watch("v1/", closing.listener);
        await watcher.watch("v1/", staying.listener);
        const lease = await writer.openLease();
        await lease.put("v1/a", 1);
        await closing.becomes({ "v1/a": 1 });
        await watch.close();
        await watch.close();
        await lease.put("v1/a", 2);
        await staying.becomes({ "v1/a": 2 });
        assert.deepEqual(closing.values, { "v1/a": 1 });
      }),
    );

    it(
      "listener calls do not overlap, even when the listener itself writes",
      withStore(async (open) => {
        const discovery = await open();
        const lease = await discovery.openLease();
        const seen = new ChangeRecorder();
        let depth = 0;
        const writes: Promise<void>[] = [];
        await discovery.watch("v1/", (change) => {
          assert.equal(++depth, 1);
          if (change.type === "put" && change.entry.key === "v1/a") writes.push(lease.put("v1/b", "from inside"));
          seen.listener(change);
          depth--;
        });
        await lease.put("v1/a", 1);
        await seen.becomes({ "v1/a": 1, "v1/b": "from inside" });
        await Promise.all(writes);
      }),
    );

    it(
      "wrong keys, values and lease times are refused and leave no trace",
      withStore(async (open) => {
        const discovery = await open();
        const lease = await discovery.openLease();
        const wrongKeys = ["", "/a", "a/", "a//b", "a b", "ä", "a\u0000", "../%", "k".repeat(513)];
        for (const key of wrongKeys) await assert.rejects(lease.put(key, 1), rejectsWith("invalid-config"), key);
        await assert.rejects(lease.put("v1/a", "x".repeat(1024 * 1024 - 1)), rejectsWith("invalid-config"));
        await assert.rejects(lease.put("v1/a", "€".repeat(400_000)), rejectsWith("invalid-config"));
        await assert.rejects(lease.put("v1/a", undefined as unknown as JsonValue), rejectsWith("invalid-config"));
        for (const ttlMs of [0, -1, 0.5, NaN, 1e12]) {
          await assert.rejects(discovery.openLease({ ttlMs }), rejectsWith("invalid-config"));
        }
        assert.deepEqual(await discovery.list(""), []);
      }),
    );

    it(
      "the longest key and the largest value come through, and any JSON comes back equal",
      withStore(async (open) => {
        const [writer, reader] = [await open(), await open()];
        const lease = await writer.openLease();
        const values: Record<string, JsonValue> = {
          [`v1/${"k".repeat(509)}`]: "x".repeat(1024 * 1024 - 2),
          "v1/.": { nested: [{}, [], "", 0, -1.5e300, true, null], "": "empty", "10": "ten", "2": "two" },
          "v1/..": '\u0000\ud83d\ude00\u2028"\\',
          "v1/A": JSON.parse('{"__proto__":{"x":1}}') as JsonValue,
          "v1/a": "differs from the last only by case",
        };
        for (const [key, value] of Object.entries(values)) await lease.put(key, value);
        assert.deepEqual(valuesOf(await reader.list("")), sorted(values));
      }),
    );

    it(
      "closing a client closes its leases and watches; after that it refuses work",
      withStore(async (open) => {
        const [writer, watcher] = [await open(), await open()];
        const lease = await writer.openLease();
        await lease.put("v1/a", 1);
        const [own, others] = [new ChangeRecorder(), new ChangeRecorder()];
        await writer.watch("", own.listener);
        await watcher.watch("", others.listener);
        assert.deepEqual(writer.health(), { healthy: true });
        await writer.close();
        await writer.close();
        await others.becomes({});
        assert.deepEqual(own.values, { "v1/a": 1 });
        assert.equal(writer.health().healthy, false);
        await assert.rejects(lease.put("v1/a", 1), rejectsWith("lease-lost"));
        await assert.rejects(writer.openLease(), rejectsWith("discovery-unavailable"));
        await assert.rejects(writer.list(""), rejectsWith("discovery-unavailable"));
        await assert.rejects(
          writer.watch("", () => undefined),
          rejectsWith("discovery-unavailable"),
        );
      }),
    );

    it("after any history of puts, deletes and closed leases, lists and watchers agree with a naive model", async () => {
      const key = fc.constantFrom("v1/a", "v1/a/b", "v1/b", "v2/a");
      const who = fc.nat({ max: 2 });
      const operation = fc.oneof(
        { weight: 5, arbitrary: fc.record({ type: fc.constant("put" as const), who, key, value: fc.nat({ max: 2 }) }) },
        { weight: 2, arbitrary: fc.record({ type: fc.constant("delete" as const), who, key }) },
        { weight: 1, arbitrary: fc.record({ type: fc.constant("reopen" as const), who }) },
        { weight: 1, arbitrary: fc.record({ type: fc.constant("rewatch" as const), who }) },
      );
      await fc.assert(
        fc.asyncProperty(fc.array(operation, { minLength: 1, maxLength: 25 }), async (operations) => {
          await withStore(async (open) => {
            const model = new Map<string, { value: JsonValue; leaseId: string }>();
            const views = [await open(), await open(), await open()];
            const leases: Lease[] = [];
            const watches: { recorder: ChangeRecorder; watch: Watch }[] = [];
            const watchAgain = async (i: number): Promise<void> => {
              const recorder = new ChangeRecorder();
              watches[i] = { recorder, watch: await views[i]!.watch("v1/", recorder.listener) };
            };
            for (const [i, view] of views.entries()) {
              leases.push(await view.openLease());
              await watchAgain(i);
            }
            for (const step of operations) {
              const lease = leases[step.who]!;
              if (step.type === "put") {
                await lease.put(step.key, step.value);
                model.set(step.key, { value: step.value, leaseId: lease.id });
              } else if (step.type === "delete") {
                await lease.delete(step.key);
                if (model.get(step.key)?.leaseId === lease.id) model.delete(step.key);
              } else if (step.type === "reopen") {
                await lease.close();
                leases[step.who] = await views[step.who]!.openLease();
                for (const [held, { leaseId }] of model) if (leaseId === lease.id) model.delete(held);
              } else {
                await watches[step.who]!.watch.close();
                await watchAgain(step.who);
              }
            }
            const expected = [...model].map(([held, entry]) => ({ key: held, ...entry }));
            expected.sort((a, b) => (a.key < b.key ? -1 : 1));
            for (const view of views) assert.deepEqual(await view.list(""), expected);
            const watched = valuesOf(expected.filter((entry) => entry.key.startsWith("v1/")));
            for (const { recorder } of watches) {
              await recorder.becomes(watched);
              assert.equal(recorder.expired.size, 0, "who ends in order did not expire");
            }
          })();
        }),
        { numRuns: options.historyCount ?? 50 },
      );
    });
  });
}
