import assert from "node:assert/strict";
import test from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { DynamoError } from "../../errors/index.ts";
import type { EventHandler, EventPlane } from "./base.ts";
import { MAX_PAYLOAD_BYTES } from "./limits.ts";

/** Planes that see each other as processes of one cluster do. */
export interface Cluster {
  /** One more process. */
  open(): EventPlane;
  /** Closes all planes, then fails if anything is left. */
  close(): Promise<void>;
}

/** What a subscription saw, as text per publisher. */
export class Witness implements EventHandler {
  readonly calls: string[] = [];
  readonly sequences: number[] = [];
  readonly gaps: { publisherId: string; from: number; to: number }[] = [];
  readonly gone: string[] = [];

  onEvent(publisherId: string, sequence: number, payload: Uint8Array): void {
    this.sequences.push(sequence);
    this.calls.push(`${publisherId} ${sequence} ${Buffer.from(payload.subarray(0, 40)).toString()}`);
  }
  onGap(publisherId: string, from: number, to: number): void {
    this.gaps.push({ publisherId, from, to });
    this.calls.push(`${publisherId} gap ${from}-${to}`);
  }
  onPublisherGone(publisherId: string): void {
    this.gone.push(publisherId);
    this.calls.push(`${publisherId} gone`);
  }
}

/** Waits for a condition, at most 10 seconds. */
export async function until(condition: () => boolean, what: string): Promise<void> {
  const deadlineMs = performance.now() + 10_000;
  while (!condition()) {
    assert.ok(performance.now() < deadlineMs, `timed out waiting until ${what}`);
    await delay(1);
  }
}

export const text = (value: string): Uint8Array => Buffer.from(value);

export function range(from: number, to: number): number[] {
  return Array.from({ length: to - from + 1 }, (_, i) => from + i);
}

/** Every event plane passes these. */
export function eventPlaneBattery(name: string, openCluster: () => Cluster): void {
  const battery = (title: string, body: (cluster: Cluster) => Promise<void>): void => {
    test(`${name}: ${title}`, { timeout: 30_000 }, async () => {
      const cluster = openCluster();
      try {
        await body(cluster);
      } finally {
        await cluster.close();
      }
    });
  };

  battery("a subscriber sees each event of a later publisher, from 1 upwards and in order", async (cluster) => {
    const witness = new Witness();
    await cluster.open().subscribe("load", witness);
    const publisher = await cluster.open().publish("load", { publisherId: "00000000000000aa" });
    for (let i = 1; i <= 100; i++) assert.equal(publisher.publish(text(`event ${i}`)), i);
    await until(() => witness.sequences.length === 100, "100 events came");
    assert.deepEqual(
      witness.calls,
      range(1, 100).map((i) => `00000000000000aa ${i} event ${i}`),
    );
  });

  battery(
    "the last event arrives even if it is published with the announcement and nothing follows",
    async (cluster) => {
      const plane = cluster.open();
      const witness = new Witness();
      await cluster.open().subscribe("load", witness);
      for (let i = 0; i < 5; i++) {
        const publisher = await plane.publish("load");
        publisher.publish(text("only"));
      }
      await until(() => witness.calls.length === 5, "one event of each of five publishers came");
      assert.deepEqual(witness.gaps, []);
    },
  );

  battery("a late joiner without replay starts at the current sequence, without a gap", async (cluster) => {
    const publisher = await cluster.open().publish("load");
    for (let i = 0; i < 50; i++) publisher.publish(text("past"));
    const witness = new Witness();
    await cluster.open().subscribe("load", witness);
    await until(() => {
      publisher.publish(text("present"));
      return witness.sequences.length >= 20;
    }, "the joiner sees events");
    const first = witness.sequences[0]!;
    assert.ok(first > 50, `starts at ${first}`);
    assert.deepEqual(witness.sequences, range(first, first + witness.sequences.length - 1));
    assert.deepEqual(witness.gaps, []);
  });

  battery(
    "a late joiner with replay gets the ring first, then the live events, none twice and none lost",
    async (cluster) => {
      const publisher = await cluster.open().publish("kv-events", { ringSize: 5000 });
      for (let i = 1; i <= 700; i++) publisher.publish(text(`event ${i}`));
      const witness = new Witness();
      const joining = cluster.open().subscribe("kv-events", witness, { replay: true });
      let published = 700;
      await until(() => {
        for (let i = 0; i < 10 && published < 1500; i++) publisher.publish(text(`event ${++published}`));
        return witness.sequences.length === 1500;
      }, "1,500 events came");
      await joining;
      assert.deepEqual(
        witness.calls,
        range(1, 1500).map((i) => `${publisher.publisherId} ${i} event ${i}`),
      );
    },
  );

  battery(
    "a late joiner with replay starts at the oldest event that the ring holds, without a gap",
    async (cluster) => {
      const publisher = await cluster.open().publish("kv-events", { ringSize: 10 });
      for (let i = 1; i <= 100; i++) publisher.publish(text(`event ${i}`));
      const witness = new Witness();
      await cluster.open().subscribe("kv-events", witness, { replay: true });
      await until(() => witness.sequences.length >= 10, "the ring came");
      publisher.publish(text("event 101"));
      await until(() => witness.sequences.at(-1) === 101, "the live event came");
      assert.deepEqual(witness.sequences, range(91, 101));
      assert.deepEqual(witness.gaps, []);
    },
  );

  battery("publishers of one process and of several are numbered each for itself", async (cluster) => {
    const one = cluster.open();
    const two = cluster.open();
    const witness = new Witness();
    await cluster.open().subscribe("load", witness);
    const publishers = [await one.publish("load"), await one.publish("load"), await two.publish("load")];
    assert.equal(new Set(publishers.map((publisher) => publisher.publisherId)).size, 3);
    for (let i = 1; i <= 50; i++) for (const publisher of publishers) publisher.publish(text(`${i}`));
    await until(() => witness.calls.length === 150, "150 events came");
    for (const { publisherId } of publishers) {
      const calls = witness.calls.filter((call) => call.startsWith(publisherId));
      assert.deepEqual(
        calls,
        range(1, 50).map((i) => `${publisherId} ${i} ${i}`),
      );
    }
  });

  battery("topics do not mix, even when one is the beginning of another", async (cluster) => {
    const plane = cluster.open();
    const other = cluster.open();
    const short = new Witness();
    const long = new Witness();
    await other.subscribe("load", short);
    await other.subscribe("load.prefill", long);
    const publisherId = "00000000000000bb";
    const shortPublisher = await plane.publish("load", { publisherId });
    const longPublisher = await plane.publish("load.prefill", { publisherId });
    for (let i = 0; i < 20; i++) {
      shortPublisher.publish(text("short"));
      longPublisher.publish(text("long"));
    }
    await until(() => short.calls.length >= 20 && long.calls.length >= 20, "both saw their events");
    assert.deepEqual(
      short.calls,
      range(1, 20).map((i) => `${publisherId} ${i} short`),
    );
    assert.deepEqual(
      long.calls,
      range(1, 20).map((i) => `${publisherId} ${i} long`),
    );
  });

  battery("subscriptions of one process are independent, and a closed one is called no more", async (cluster) => {
    const plane = cluster.open();
    const closed = new Witness();
    const kept = new Witness();
    const first = await plane.subscribe("load", closed);
    await plane.subscribe("load", kept);
    const publisher = await cluster.open().publish("load");
    publisher.publish(text("1"));
    await until(() => closed.calls.length === 1 && kept.calls.length === 1, "both saw the first");
    await first.close();
    await first.close();
    publisher.publish(text("2"));
    await until(() => kept.calls.length === 2, "the other saw the second");
    assert.equal(closed.calls.length, 1);
  });

  battery(
    "a handler that closes its subscription is not called again, not even for what already waits",
    async (cluster) => {
      const plane = cluster.open();
      const publisher = await cluster.open().publish("load");
      for (let i = 0; i < 10; i++) publisher.publish(text("past"));
      let calls = 0;
      const closed = Promise.withResolvers<void>();
      const subscription = await plane.subscribe(
        "load",
        {
          onEvent() {
            calls++;
            subscription.close().then(closed.resolve, closed.reject);
          },
          onGap() {
            calls++;
          },
          onPublisherGone() {
            calls++;
          },
        },
        { replay: true },
      );
      await closed.promise;
      const witness = new Witness();
      await plane.subscribe("load", witness, { replay: true });
      await until(() => witness.calls.length === 10, "a later subscription saw all");
      assert.equal(calls, 1);
    },
  );

  battery("a closed publisher is reported gone; one with the same id afterwards starts anew at 1", async (cluster) => {
    const publisherId = "00000000000000cc";
    const witness = new Witness();
    await cluster.open().subscribe("load", witness);
    const plane = cluster.open();
    const first = await plane.publish("load", { publisherId });
    for (let i = 1; i <= 3; i++) first.publish(text("first"));
    await until(() => witness.calls.length === 3, "the first one's events came");
    await first.close();
    await first.close();
    await until(() => witness.gone.length === 1, "it is reported gone");
    const second = await plane.publish("load", { publisherId });
    second.publish(text("second"));
    await until(() => witness.calls.length === 5, "the second one's event came");
    assert.deepEqual(witness.calls.slice(3), [`${publisherId} gone`, `${publisherId} 1 second`]);
  });

  battery("a publisher that takes over an id from a living one replaces it", async (cluster) => {
    const publisherId = "00000000000000dd";
    const witness = new Witness();
    await cluster.open().subscribe("load", witness);
    const old = await cluster.open().publish("load", { publisherId });
    old.publish(text("old"));
    await until(() => witness.calls.length === 1, "the old one's event came");
    const heir = await cluster.open().publish("load", { publisherId });
    heir.publish(text("heir"));
    await until(() => witness.calls.length === 3, "the new one's event came");
    old.publish(text("too late"));
    await old.close();
    heir.publish(text("heir"));
    await until(() => witness.calls.length === 4, "the new one goes on");
    assert.deepEqual(witness.calls, [
      `${publisherId} 1 old`,
      `${publisherId} gone`,
      `${publisherId} 1 heir`,
      `${publisherId} 2 heir`,
    ]);
  });

  battery("the end of a publishing process is the end of its publishers", async (cluster) => {
    const witness = new Witness();
    await cluster.open().subscribe("load", witness);
    const plane = cluster.open();
    const publishers = [await plane.publish("load"), await plane.publish("load")];
    await plane.close();
    await until(() => witness.gone.length === 2, "both are reported gone");
    assert.deepEqual(witness.gone.toSorted(), publishers.map(({ publisherId }) => publisherId).toSorted());
    for (const publisher of publishers) assert.ok(publisher.publish(text("after")) >= 1);
    await assert.rejects(plane.publish("load"), isUnavailable);
    await assert.rejects(plane.subscribe("load", witness), isUnavailable);
    await plane.close();
  });

  battery("payloads are taken as they are at the call: empty, binary, reused buffers, up to 8 MiB", async (cluster) => {
    const seen: Buffer[] = [];
    await cluster.open().subscribe("load", {
      onEvent: (_id, _sequence, payload) => seen.push(Buffer.from(payload)),
      onGap: () => assert.fail("no gap"),
    });
    const publisher = await cluster.open().publish("load");
    const buffer = Buffer.alloc(1000, 7);
    publisher.publish(new Uint8Array(0));
    publisher.publish(buffer.subarray(10, 20));
    publisher.publish(buffer);
    buffer.fill(9);
    publisher.publish(new Uint8Array(MAX_PAYLOAD_BYTES).fill(3));
    await until(() => seen.length === 4, "four events came");
    assert.deepEqual(
      seen.map((payload) => [payload.length, payload[0], payload.at(-1)]),
      [
        [0, undefined, undefined],
        [10, 7, 7],
        [1000, 7, 7],
        [MAX_PAYLOAD_BYTES, 3, 3],
      ],
    );
    assert.throws(() => publisher.publish(new Uint8Array(MAX_PAYLOAD_BYTES + 1)), DynamoError);
    assert.equal(publisher.publish(text("next")), 5);
    await until(() => seen.length === 5, "the next one came");
  });

  battery("a burst of 20,000 events in one turn arrives whole and in order", async (cluster) => {
    const witness = new Witness();
    await cluster.open().subscribe("kv-events", witness);
    const publisher = await cluster.open().publish("kv-events");
    const payload = new Uint8Array(200);
    publisher.publish(payload);
    await until(() => witness.sequences.length === 1, "the subscription stands");
    for (let i = 0; i < 20_000; i++) publisher.publish(payload);
    await until(() => witness.sequences.length === 20_001, "all came");
    assert.deepEqual(witness.sequences, range(1, 20_001));
  });

  battery("a handler that throws harms neither the next event nor another subscription", async (cluster) => {
    const plane = cluster.open();
    const witness = new Witness();
    let calls = 0;
    await plane.subscribe("load", {
      onEvent() {
        calls++;
        throw new Error("handler");
      },
      onGap: () => undefined,
    });
    await plane.subscribe("load", witness);
    const publisher = await cluster.open().publish("load");
    for (let i = 0; i < 3; i++) publisher.publish(text("x"));
    await until(() => calls === 3 && witness.calls.length === 3, "both were called three times");
  });

  battery("bad topics and ids are refused", async (cluster) => {
    const plane = cluster.open();
    for (const topic of ["", "a b", "a/b", "\0load", "x".repeat(129)]) {
      await assert.rejects(plane.publish(topic), DynamoError);
      await assert.rejects(plane.subscribe(topic, new Witness()), DynamoError);
    }
    for (const publisherId of ["", "1", "00000000000000AA", "00000000000000aa0"]) {
      await assert.rejects(plane.publish("load", { publisherId }), DynamoError);
    }
  });
}

function isUnavailable(thrown: unknown): boolean {
  return thrown instanceof DynamoError && thrown.reason === "event-plane-unavailable";
}
