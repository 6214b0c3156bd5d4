import assert from "node:assert/strict";
import { test } from "node:test";
import { DynamoError, type Reason } from "../../errors/index.ts";
import { SeededRandom } from "../../std/index.ts";
import type {
  ClientStream,
  ClientStreamHandler,
  EndpointHandler,
  OpenOptions,
  RequestPlane,
  RequestPlaneServer,
  ServerStream,
  StreamEnd,
} from "./base.ts";
import type { RequestPlaneLimits } from "./limits.ts";

/**
 * What `base.ts` promises, as tests that every back end passes. A back end hands in a `World`: a way to make planes that
 * reach each other. Every recorder checks on its own that a stream ends once and that nothing follows the end.
 */
export interface World {
  plane(options?: PlaneOptions): RequestPlane;
  /** An address that nobody serves. */
  deadAddress(): string | Promise<string>;
  close(): Promise<void>;
}

export interface PlaneOptions {
  readonly limits?: Partial<RequestPlaneLimits>;
  /** Listens at an address that was in use before. */
  readonly address?: string;
}

export const ENDPOINT = "test.worker.generate";
const DEADLINE_MS = 8_000;

/** Runs turns until `condition` holds; fails with `what` when it takes too long. */
export async function until(condition: () => boolean, what: string, deadlineMs = DEADLINE_MS): Promise<void> {
  const endMs = performance.now() + deadlineMs;
  while (!condition()) {
    if (performance.now() > endMs) assert.fail(`timed out: ${what}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** A client's handler that keeps what came and fails loudly when a promise is broken. */
export class Recorder implements ClientStreamHandler {
  readonly items: Buffer[] = [];
  itemBytes = 0;
  turnEndCount = 0;
  endCount = 0;
  end: StreamEnd = undefined;
  stream: ClientStream | undefined = undefined;
  /** What was called after the end, or out of order. */
  readonly violations: string[] = [];
  onItemHook: ((recorder: Recorder, byteCount: number) => void) | undefined = undefined;
  onEndHook: (() => void) | undefined = undefined;
  keepItems = true;
  #itemsThisTurn = 0;

  onItem(bytes: Uint8Array, start: number, end: number): void {
    if (this.endCount > 0) this.violations.push("item after the end");
    this.#itemsThisTurn++;
    this.itemBytes += end - start;
    if (this.keepItems) this.items.push(Buffer.from(bytes.subarray(start, end)));
    this.onItemHook?.(this, end - start);
  }

  onTurnEnd(): void {
    if (this.endCount > 0) this.violations.push("turn end after the end");
    if (this.#itemsThisTurn === 0) this.violations.push("turn end without an item");
    this.#itemsThisTurn = 0;
    this.turnEndCount++;
  }

  onEnd(end: StreamEnd): void {
    if (this.stream === undefined) this.violations.push("ended inside open");
    else if (!this.stream.ended) this.violations.push("`ended` is false in onEnd");
    this.endCount++;
    this.end = end;
    this.onEndHook?.();
  }

  /** No turn of items was left without its end, unless the reader itself cut it short. */
  get openTurn(): boolean {
    return this.#itemsThisTurn > 0;
  }

  get texts(): string[] {
    return this.items.map((item) => item.toString());
  }

  async ended(): Promise<this> {
    await until(() => this.endCount > 0, "the stream did not end");
    assert.deepEqual(this.violations, []);
    assert.equal(this.endCount, 1);
    return this;
  }
}

export function open(
  plane: RequestPlane,
  address: string,
  { payload = Buffer.from("request"), ...options }: Partial<OpenOptions> & { payload?: Uint8Array } = {},
  recorder = new Recorder(),
): Recorder {
  const all = { endpoint: ENDPOINT, requestId: "r-1", traceparent: "", timeoutMs: 60_000, autoCredit: true };
  recorder.stream = plane.client.open(address, payload, { ...all, ...options }, recorder);
  return recorder;
}

export function assertReason(end: StreamEnd, reason: Reason): void {
  assert.ok(end instanceof DynamoError, `expected ${reason}, the stream ended cleanly`);
  assert.equal(end.reason, reason, `${end.message}: ${end.diagnostic}`);
}

/** The server's streams with what their handlers were told. */
export class Served {
  readonly streams: ServerStream[] = [];
  readonly cancels = new Map<number, DynamoError[]>();

  readonly handler: EndpointHandler = (stream) => {
    this.streams.push(stream);
    this.cancels.set(stream.id, []);
    return { onCancel: (error) => this.cancels.get(stream.id)!.push(error) };
  };

  async stream(index = 0): Promise<ServerStream> {
    await until(() => this.streams.length > index, `stream ${index} did not arrive`);
    return this.streams[index]!;
  }

  cancelsOf(stream: ServerStream): DynamoError[] {
    return this.cancels.get(stream.id)!;
  }
}

const echo: EndpointHandler = (stream, payload) => {
  stream.write(payload);
  stream.end();
  return { onCancel: () => assert.fail("cancelled after its end") };
};

interface Fixture {
  readonly world: World;
  readonly server: RequestPlaneServer;
  readonly serverPlane: RequestPlane;
  readonly client: RequestPlane;
  readonly served: Served;
}

export function requestPlaneBattery(name: string, makeWorld: () => World): void {
  const check = (title: string, run: (fixture: Fixture) => Promise<void>, options: PlaneOptions = {}): void => {
    test(`${name}: ${title}`, async () => {
      const world = makeWorld();
      try {
        const serverPlane = world.plane(options);
        const server = await serverPlane.listen();
        const served = new Served();
        server.serve(ENDPOINT, served.handler);
        await run({ world, server, serverPlane, client: world.plane(options), served });
        await until(
          () => served.streams.every((stream) => stream.ended) || server.activeStreamCount > 0,
          "streams hang",
        );
      } finally {
        await world.close();
      }
    });
  };

  check("items arrive in order, byte for byte, and then the end", async ({ client, server, served }) => {
    const recorder = open(client, server.address);
    const stream = await served.stream();
    const sent: Buffer[] = [];
    const random = new SeededRandom(1);
    for (let i = 0; i < 500; i++) {
      const item = Buffer.alloc(random.nextU32() % 300, i);
      sent.push(item);
      stream.write(item);
      if (i % 7 === 0) server.flush();
      if (i % 50 === 0) await until(() => recorder.items.length > i / 2, "items do not flow");
    }
    stream.end();
    await recorder.ended();
    assert.equal(recorder.end, undefined);
    assert.deepEqual(Buffer.concat(recorder.items), Buffer.concat(sent));
    assert.deepEqual(
      recorder.items.map((item) => item.length),
      sent.map((item) => item.length),
    );
    assert.equal(recorder.openTurn, false);
  });

  check("a request arrives with its payload, names and deadline", async ({ client, server }) => {
    let seen: { stream: ServerStream; text: string } | undefined;
    server.serve("test.worker.other", (stream, payload) => {
      seen = { stream, text: Buffer.from(payload).toString() };
      stream.end();
      return { onCancel: () => undefined };
    });
    const payload = Buffer.from("what is the capital of France?");
    const recorder = open(client, server.address, {
      endpoint: "test.worker.other",
      requestId: "anfrage-ü",
      traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
      timeoutMs: 5_000,
      payload,
    });
    payload.fill(0); // Copied before `open` returned.
    const openedMs = performance.now();
    await recorder.ended();
    assert.equal(seen!.text, "what is the capital of France?");
    assert.equal(seen!.stream.endpoint, "test.worker.other");
    assert.equal(seen!.stream.requestId, "anfrage-ü");
    assert.equal(seen!.stream.traceparent, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    assert.ok(seen!.stream.deadlineMs > openedMs + 4_000 && seen!.stream.deadlineMs < performance.now() + 5_000);
    assert.ok(seen!.stream.id >= 0 && seen!.stream.id < 2 ** 31);
  });

  check("an item is copied at once, an empty item and an empty payload are items", async ({ client, server }) => {
    server.serve(ENDPOINT, (stream, payload) => {
      assert.equal(payload.length, 0);
      const item = Buffer.from("first");
      stream.write(item);
      item.write("XXXXX");
      stream.write(new Uint8Array(0));
      stream.write(Buffer.from("last"));
      stream.end();
      return { onCancel: () => undefined };
    });
    const recorder = await open(client, server.address, { payload: new Uint8Array(0) }).ended();
    assert.deepEqual(recorder.texts, ["first", "", "last"]);
  });

  check(
    "what is written in one turn comes in one turn, for each stream it is for",
    async ({ client, server, served }) => {
      const recorders = [open(client, server.address), open(client, server.address), open(client, server.address)];
      await served.stream(2);
      for (let round = 1; round <= 5; round++) {
        for (const stream of served.streams.slice(0, 2)) for (let i = 0; i < 4; i++) stream.write(Buffer.from("x"));
        server.flush();
        await until(() => recorders[1]!.items.length === 4 * round, "the flush did not arrive");
        assert.equal(recorders[0]!.items.length, 4 * round);
        assert.equal(recorders[0]!.turnEndCount, round);
        assert.equal(recorders[1]!.turnEndCount, round);
        assert.equal(recorders[2]!.turnEndCount, 0);
      }
      for (const stream of served.streams) stream.end();
      for (const recorder of recorders) await recorder.ended();
    },
  );

  check("what was not flushed goes at the end of the turn", async ({ client, server, served }) => {
    const recorder = open(client, server.address);
    (await served.stream()).write(Buffer.from("unflushed"));
    await until(() => recorder.items.length === 1, "the item did not leave by itself");
    (await served.stream()).end();
    await recorder.ended();
  });

  check("an error crosses with reason, message and diagnostic", async ({ client, server, served }) => {
    const recorder = open(client, server.address);
    const stream = await served.stream();
    stream.write(Buffer.from("partial"));
    stream.end(new DynamoError("engine-failed", "the engine failed: ünïcode", { diagnostic: "step 17" }));
    await recorder.ended();
    assertReason(recorder.end, "engine-failed");
    assert.equal(recorder.end!.publicMessage, "the engine failed: ünïcode");
    assert.equal(recorder.end!.diagnostic, "step 17");
    assert.deepEqual(recorder.texts, ["partial"]);
  });

  check("an unknown endpoint is refused, a withdrawn one too, its running streams go on", async (fixture) => {
    const { client, server } = fixture;
    assertReason(
      (await open(client, server.address, { endpoint: "no.such.endpoint" }).ended()).end,
      "endpoint-not-found",
    );
    const served = new Served();
    const withdraw = server.serve("test.worker.brief", served.handler);
    const running = open(client, server.address, { endpoint: "test.worker.brief" });
    const stream = await served.stream();
    withdraw();
    const refused = await open(client, server.address, { endpoint: "test.worker.brief" }).ended();
    assertReason(refused.end, "endpoint-not-found");
    stream.write(Buffer.from("still here"));
    stream.end();
    assert.deepEqual((await running.ended()).texts, ["still here"]);
  });

  check("a handler that throws ends its stream with the error, behind what it wrote", async ({ client, server }) => {
    server.serve("test.worker.full", (stream) => {
      stream.write(Buffer.from("before"));
      throw new DynamoError("worker-full", "the queue is full", { retryAfterMs: 2_345 });
    });
    server.serve("test.worker.defect", () => {
      throw new TypeError("secret detail");
    });
    const full = await open(client, server.address, { endpoint: "test.worker.full" }).ended();
    assertReason(full.end, "worker-full");
    assert.equal(full.end!.retryAfterMs, 2_345);
    assert.deepEqual(full.texts, ["before"]);
    const defect = await open(client, server.address, { endpoint: "test.worker.defect" }).ended();
    assertReason(defect.end, "internal");
    assert.ok(!defect.end!.publicMessage.includes("secret"));
    assert.equal(server.activeStreamCount, 0);
  });

  check("a cancel ends the client at once and reaches the handler once", async ({ client, server, served }) => {
    const recorder = open(client, server.address);
    const stream = await served.stream();
    recorder.stream!.cancel();
    assert.equal(recorder.endCount, 1);
    assertReason(recorder.end, "cancelled");
    recorder.stream!.cancel();
    recorder.stream!.grant(100);
    await until(() => stream.ended, "the cancel did not arrive");
    stream.write(Buffer.from("late"));
    stream.end();
    const other = open(client, server.address);
    (await served.stream(1)).end();
    await other.ended();
    assert.equal(recorder.items.length, 0);
    assert.deepEqual(
      served.cancelsOf(stream).map((error) => error.reason),
      ["cancelled"],
    );
    const gone = open(client, server.address);
    await served.stream(2);
    gone.stream!.cancel(new DynamoError("client-gone", "the client closed the connection"));
    assertReason(gone.end, "client-gone");
    await until(() => served.streams[2]!.ended, "the cancel did not arrive");
    assert.deepEqual(
      served.cancelsOf(served.streams[2]!).map((error) => [error.reason, error.publicMessage]),
      [["client-gone", "the client closed the connection"]],
    );
    assert.equal(server.activeStreamCount, 0);
  });

  check("the first end counts, later writes and ends are ignored", async ({ client, server, served }) => {
    const recorder = open(client, server.address);
    const stream = await served.stream();
    stream.write(Buffer.from("one"));
    assert.equal(stream.ended, false);
    stream.end();
    assert.equal(stream.ended, true);
    stream.write(Buffer.from("two"));
    stream.end(new DynamoError("engine-failed", "too late"));
    await recorder.ended();
    assert.equal(recorder.end, undefined);
    assert.deepEqual(recorder.texts, ["one"]);
    assert.equal(served.cancelsOf(stream).length, 0);
  });

  check("a deadline ends both sides, the handler is told once", async ({ client, server, served }) => {
    const openedMs = performance.now();
    const recorder = open(client, server.address, { timeoutMs: 60 });
    const stream = await served.stream();
    stream.write(Buffer.from("in time"));
    await recorder.ended();
    assertReason(recorder.end, "request-deadline");
    assert.ok(performance.now() - openedMs >= 60, "ended early");
    await until(() => stream.ended, "the server did not stop");
    assert.equal(served.cancelsOf(stream).length, 1);
    assertReason(served.cancelsOf(stream)[0], "request-deadline");
    for (const timeoutMs of [0, -1, Number.NaN]) {
      assertReason((await open(client, server.address, { timeoutMs }).ended()).end, "request-deadline");
    }
    assert.equal(served.streams.length, 1);
  });

  check(
    "one stream without grants stalls nobody and ends alone with slow-reader",
    async ({ client, server, served }) => {
      const limits = { windowBytes: 1_024, autoCredit: false };
      const stalled = open(client, server.address, limits);
      const stalledStream = await served.stream();
      const others = Array.from({ length: 50 }, () => open(client, server.address, { windowBytes: 1_024 }));
      await served.stream(50);
      const item = Buffer.alloc(256, 7);
      for (let step = 0; step < 40; step++) {
        for (const stream of served.streams) stream.write(item);
        server.flush();
        await until(() => others.every(({ items }) => items.length === step + 1), "a reader that grants is stalled");
      }
      assert.equal(stalled.itemBytes, 1_024, "more than its window was sent");
      assert.equal(stalledStream.ended, false);
      // 4 KiB fit into its buffer; it holds more after this.
      for (let i = 0; i < 40; i++) stalledStream.write(item);
      assert.equal(stalledStream.ended, true);
      await stalled.ended();
      assertReason(stalled.end, "slow-reader");
      assert.equal(stalled.itemBytes, 1_024);
      assertReason(served.cancelsOf(stalledStream)[0], "slow-reader");
      for (const stream of served.streams) stream.end();
      for (const recorder of others) assert.equal((await recorder.ended()).end, undefined);
    },
    { limits: { parkedBytesPerStream: 16 * 1024 } },
  );

  check("parked items come in order when credit comes, and the end behind them", async ({ client, server, served }) => {
    const recorder = open(client, server.address, { windowBytes: 64, autoCredit: false });
    const stream = await served.stream();
    for (let i = 0; i < 100; i++) stream.write(Buffer.from(`item ${i}`));
    stream.end();
    await until(() => recorder.itemBytes >= 64, "the window did not come");
    assert.ok(recorder.itemBytes < 64 + 8, "the window was overrun by more than an item");
    assert.equal(recorder.endCount, 0);
    assert.equal(server.activeStreamCount, 1, "a stream with parked items still runs");
    recorder.onItemHook = (_, byteCount) => recorder.stream!.grant(byteCount);
    recorder.stream!.grant(recorder.itemBytes);
    await recorder.ended();
    assert.equal(recorder.end, undefined);
    assert.deepEqual(
      recorder.texts,
      Array.from({ length: 100 }, (_, i) => `item ${i}`),
    );
    assert.equal(served.cancelsOf(stream).length, 0);
  });

  check("an ended stream with parked items ends by its deadline or cancel without onCancel", async (fixture) => {
    const { client, server, served } = fixture;
    const options = { windowBytes: 4, autoCredit: false };
    const late = open(client, server.address, { ...options, timeoutMs: 60 });
    const cancelled = open(client, server.address, options);
    await served.stream(1);
    for (const stream of served.streams) {
      stream.write(Buffer.from("1234"));
      stream.write(Buffer.from("5678"));
      stream.end();
    }
    await until(() => cancelled.items.length === 1, "the window did not come");
    cancelled.stream!.cancel();
    assertReason((await late.ended()).end, "request-deadline");
    await until(() => server.activeStreamCount === 0, "the server holds a stream");
    for (const stream of served.streams) assert.equal(served.cancelsOf(stream).length, 0);
  });

  check("an item larger than the window and the buffer still gets through", async ({ client, server, served }) => {
    const recorder = open(client, server.address, { windowBytes: 16 });
    const stream = await served.stream();
    const large = Buffer.alloc(2 * 1024 * 1024, 9);
    stream.write(large);
    stream.write(large);
    stream.end();
    await recorder.ended();
    assert.equal(recorder.end, undefined);
    assert.deepEqual(recorder.items, [large, large]);
  });

  check(
    "what all streams together park is bounded",
    async ({ client, server, served }) => {
      const recorders = Array.from({ length: 20 }, () =>
        open(client, server.address, { windowBytes: 1, autoCredit: false }),
      );
      await served.stream(19);
      const item = Buffer.alloc(1_000);
      for (let round = 0; round < 10; round++) for (const stream of served.streams) stream.write(item);
      const alive = served.streams.filter((stream) => !stream.ended).length;
      assert.ok(alive > 0 && alive < 20, `${alive} of 20 streams are left`);
      for (const recorder of recorders) recorder.stream!.cancel();
      await until(() => server.activeStreamCount === 0, "streams are left");
      // Everything was given back: a new stream may park again.
      const again = open(client, server.address, { windowBytes: 1, autoCredit: false });
      const stream = await served.stream(20);
      for (let i = 0; i < 10; i++) stream.write(item);
      assert.equal(stream.ended, false);
      again.stream!.cancel();
    },
    { limits: { parkedBytesTotal: 64 * 1024 } },
  );

  check("ten thousand streams share a connection", async ({ client, server, served }) => {
    const count = 10_000;
    const recorders = Array.from({ length: count }, (_, i) => open(client, server.address, { requestId: `r-${i}` }));
    await served.stream(count - 1);
    assert.equal(server.activeStreamCount, count);
    assert.equal(new Set(served.streams.map(({ id }) => id)).size, count);
    for (let step = 0; step < 3; step++) {
      for (const stream of served.streams) stream.write(Buffer.from(stream.requestId));
      server.flush();
    }
    for (const stream of served.streams) stream.end();
    await until(() => recorders.every(({ endCount }) => endCount === 1), "streams did not end");
    for (const [i, recorder] of recorders.entries()) {
      assert.deepEqual(recorder.violations, []);
      assert.equal(recorder.end, undefined);
      assert.deepEqual(recorder.texts, [`r-${i}`, `r-${i}`, `r-${i}`]);
    }
    assert.equal(server.activeStreamCount, 0);
  });

  check("a payload of 16 MB arrives whole, one over the limit ends its stream alone", async ({ client, server }) => {
    const payload = Buffer.allocUnsafe(16 * 1024 * 1024);
    for (let i = 0; i < payload.length; i += 4_096) payload.writeUInt32LE(i, i);
    let same = false;
    server.serve("test.worker.large", (stream, got) => {
      same = payload.equals(got);
      stream.end();
      return { onCancel: () => undefined };
    });
    server.serve(ENDPOINT, echo);
    const small = open(client, server.address);
    const large = open(client, server.address, { endpoint: "test.worker.large", payload });
    const tooLarge = open(client, server.address, { payload: new Uint8Array(65 * 1024 * 1024) });
    assert.equal((await large.ended()).end, undefined);
    assert.ok(same, "the payload differs");
    assertReason((await tooLarge.ended()).end, "body-too-large");
    assert.deepEqual((await small.ended()).texts, ["request"]);
  });

  check("texts over their limits end the stream, the connection goes on", async ({ client, server }) => {
    server.serve(ENDPOINT, echo);
    for (const options of [
      { endpoint: "e".repeat(257) },
      { requestId: "ü".repeat(65) },
      { traceparent: "t".repeat(129) },
    ]) {
      assertReason((await open(client, server.address, options).ended()).end, "malformed-frame");
    }
    const longest = { requestId: "ü".repeat(64), traceparent: "t".repeat(128) };
    assert.equal((await open(client, server.address, longest).ended()).end, undefined);
  });

  check(
    "a connection takes streams up to its limit and more after one ended",
    async ({ client, server, served }) => {
      const recorders = Array.from({ length: 10 }, () => open(client, server.address));
      assertReason((await open(client, server.address).ended()).end, "stream-limit");
      await served.stream(9);
      recorders[3]!.stream!.cancel();
      const next = open(client, server.address);
      await served.stream(10);
      for (const stream of served.streams) stream.end();
      assert.equal((await next.ended()).end, undefined);
    },
    { limits: { maxStreamsPerConnection: 10 } },
  );

  check("draining refuses new streams and waits for those that run", async ({ client, server, served }) => {
    const running = open(client, server.address);
    const stream = await served.stream();
    let drained = false;
    const draining = server.drain().then(() => (drained = true));
    assertReason((await open(client, server.address).ended()).end, "draining");
    assertReason((await open(client, server.address).ended()).end, "draining");
    stream.write(Buffer.from("the rest"));
    assert.equal(drained, false);
    stream.end();
    await draining;
    assert.deepEqual((await running.ended()).texts, ["the rest"]);
    await server.drain();
    assert.equal(served.streams.length, 1);
  });

  check(
    "onceLeft tells once: of a server that drains, and of a connection that ends",
    async ({ client, world, served, server }) => {
      assert.equal(
        client.client.onceLeft(server.address, () => assert.fail("no connection")),
        undefined,
      );
      open(client, server.address);
      await served.stream();
      await until(() => client.client.onceLeft(server.address, () => undefined) !== undefined, "no connection stands");
      let told = 0;
      client.client.onceLeft(server.address, () => told++);
      client.client.onceLeft(server.address, () => assert.fail("taken back"))!();
      served.streams[0]!.end();
      await server.drain();
      await until(() => told === 1, "the drain was not told");
      assert.equal(
        client.client.onceLeft(server.address, () => assert.fail("it is leaving")),
        undefined,
      );

      const other = world.plane();
      const second = await other.listen();
      second.serve(ENDPOINT, echo);
      await open(client, second.address).ended();
      client.client.onceLeft(second.address, () => told++);
      await other.close();
      await until(() => told === 2, "the end of the connection was not told");
      assert.equal(
        client.client.onceLeft(second.address, () => assert.fail("it is gone")),
        undefined,
      );
      await server.close();
      assert.equal(told, 2);
    },
  );

  check("closing the server ends what runs with engine-stopped on both sides", async ({ client, server, served }) => {
    const recorders = Array.from({ length: 5 }, () => open(client, server.address));
    await served.stream(4);
    served.streams[0]!.write(Buffer.from("last words"));
    const closed = server.close();
    for (const stream of served.streams) {
      assert.equal(stream.ended, true);
      assert.equal(served.cancelsOf(stream).length, 1);
      assertReason(served.cancelsOf(stream)[0], "engine-stopped");
    }
    for (const recorder of recorders) assertReason((await recorder.ended()).end, "engine-stopped");
    assert.deepEqual(recorders[0]!.texts, ["last words"]);
    await closed;
    await server.close();
    assert.equal(server.activeStreamCount, 0);
  });

  check("after a restart at the same address new streams reach the new server", async (fixture) => {
    const { world, client, server, serverPlane, served } = fixture;
    const old = open(client, server.address);
    await served.stream();
    await serverPlane.close();
    assertReason((await old.ended()).end, "engine-stopped");
    const again = await world.plane({ address: server.address }).listen();
    assert.equal(again.address, server.address);
    again.serve(ENDPOINT, echo);
    assert.deepEqual((await open(client, again.address).ended()).texts, ["request"]);
  });

  check("an address nobody serves ends streams with worker-unreachable and never throws", async ({ world, client }) => {
    const dead = await world.deadAddress();
    for (const address of [
      dead,
      "",
      "tcp://",
      "tcp://127.0.0.1:0",
      "tcp://127.0.0.1:99999",
      "memory://999999",
      "ü:// x",
    ]) {
      const recorders = Array.from({ length: 3 }, () => open(client, address));
      for (const recorder of recorders) {
        assertReason((await recorder.ended()).end, "worker-unreachable");
      }
    }
    const cancelled = open(client, dead);
    cancelled.stream!.cancel();
    assertReason((await cancelled.ended()).end, "cancelled");
  });

  check("two servers cannot have one address", async ({ world, server }) => {
    await assert.rejects(world.plane({ address: server.address }).listen(), (error) => {
      assertReason(error as DynamoError, "address-in-use");
      return true;
    });
  });

  check("closing the client cancels what runs and refuses the rest", async ({ client, server, served }) => {
    const recorders = Array.from({ length: 5 }, () => open(client, server.address));
    await served.stream(4);
    const closed = client.client.close();
    for (const recorder of recorders) assertReason((await recorder.ended()).end, "cancelled");
    await closed;
    await client.client.close();
    await until(() => server.activeStreamCount === 0, "the server was not told");
    for (const stream of served.streams) assert.equal(served.cancelsOf(stream).length, 1);
    assertReason((await open(client, server.address).ended()).end, "cancelled");
  });

  check("a reader that throws loses its own stream only", async ({ client, server, served }) => {
    const bad = new Recorder();
    bad.onItemHook = () => {
      throw new Error("defect of the reader");
    };
    open(client, server.address, {}, bad);
    const good = open(client, server.address);
    await served.stream(1);
    for (let i = 0; i < 3; i++) for (const stream of served.streams) stream.write(Buffer.from("x"));
    assertReason((await bad.ended()).end, "internal");
    await until(() => served.streams[0]!.ended, "the server was not told");
    served.streams[1]!.end();
    assert.equal((await good.ended()).items.length, 3);
  });

  check("a handler that throws in onCancel harms nobody else", async ({ client, server, served }) => {
    server.serve("test.worker.rude", () => ({
      onCancel: () => {
        throw new Error("defect of the handler");
      },
    }));
    const rude = open(client, server.address, { endpoint: "test.worker.rude" });
    const good = open(client, server.address);
    await served.stream();
    rude.stream!.cancel();
    await until(() => server.activeStreamCount === 1, "the cancel did not arrive");
    served.streams[0]!.end();
    assert.equal((await good.ended()).end, undefined);
  });

  check("an end may open the next stream, a thousand times in a row", async ({ client, server }) => {
    server.serve(ENDPOINT, echo);
    let count = 0;
    const next = (): void => {
      const recorder = new Recorder();
      recorder.onEndHook = () => {
        assert.deepEqual(recorder.violations, []);
        assert.deepEqual(recorder.texts, ["request"]);
        if (++count < 1_000) next();
      };
      open(client, server.address, {}, recorder);
    };
    next();
    await until(() => count === 1_000, `stopped after ${count}`);
    assert.equal(server.activeStreamCount, 0);
  });

  check("stream ids are unique over the clients of a server", async ({ world, client, server, served }) => {
    const second = world.plane();
    const recorders = Array.from({ length: 20 }, (_, i) => open(i % 2 === 0 ? client : second, server.address));
    await served.stream(19);
    assert.equal(new Set(served.streams.map(({ id }) => id)).size, 20);
    for (const stream of served.streams) stream.end(new DynamoError("engine-failed", stream.requestId));
    for (const recorder of recorders) assertReason((await recorder.ended()).end, "engine-failed");
  });

  for (const seed of [1, 2, 3, 4, 5, 6]) {
    check(`every stream ends exactly once on both sides under racing ends (seed ${seed})`, (fixture) =>
      raceEnds(fixture, seed),
    );
  }
}

/** Both sides do random things to random streams, then one of them closes; all accounts must balance. */
async function raceEnds({ world, client, server, served }: Fixture, seed: number): Promise<void> {
  const random = new SeededRandom(seed);
  const pick = (count: number): number => random.nextU32() % count;
  const second = world.plane();
  const recorders: Recorder[] = [];
  const endedByServer = new Set<ServerStream>();
  for (let turn = 0; turn < 60; turn++) {
    for (let i = pick(6); i > 0; i--) {
      const options = { timeoutMs: pick(10) === 0 ? 1 + pick(40) : 60_000, windowBytes: 1 + pick(200) };
      recorders.push(open(pick(2) === 0 ? client : second, server.address, { ...options, autoCredit: pick(3) > 0 }));
    }
    for (let i = pick(8); i > 0 && served.streams.length > 0; i--) {
      const stream = served.streams[pick(served.streams.length)]!;
      stream.write(Buffer.alloc(pick(150)));
      if (pick(3) > 0) continue;
      if (!stream.ended) endedByServer.add(stream);
      stream.end(pick(2) === 0 ? undefined : new DynamoError("engine-failed", "failed"));
    }
    for (let i = pick(3); i > 0 && recorders.length > 0; i--) recorders[pick(recorders.length)]!.stream!.cancel();
    if (pick(4) === 0) server.flush();
    if (pick(2) === 0) await new Promise((resolve) => setImmediate(resolve));
  }
  const closings = [() => server.close(), () => client.close(), () => second.close()];
  const first = pick(3);
  await Promise.all([closings[first]!(), closings[(first + 1) % 3]!(), closings[(first + 2) % 3]!()]);
  await until(() => recorders.every(({ endCount }) => endCount > 0), "a client stream did not end");
  for (const { violations, endCount } of recorders) {
    assert.deepEqual(violations, []);
    assert.equal(endCount, 1);
  }
  assert.equal(server.activeStreamCount, 0);
  for (const stream of served.streams) {
    assert.equal(stream.ended, true);
    const cancelCount = served.cancelsOf(stream).length;
    assert.equal(cancelCount, endedByServer.has(stream) ? 0 : 1, `onCancel was called ${cancelCount} times`);
  }
}
