import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../../errors/index.ts";
import { silentLogger } from "../../observability/index.ts";
import { ManualClock, TimerWheel } from "../../std/index.ts";
import { ClientSession } from "./client-session.ts";
import { openStream, type ClientCore } from "./client-stream.ts";
import { FRAME, FrameDecoder, serverFrames } from "./frame.ts";
import { DEFAULT_LIMITS } from "./limits.ts";
import type { Link } from "./link.ts";
import type { ServerStream } from "./base.ts";
import { Outbox } from "./outbox.ts";
import { ENDPOINT, Recorder, assertReason } from "./request-plane.battery.ts";
import { ServerCore } from "./server-core.ts";
import { ServerSession } from "./server-session.ts";

/** Sessions without any carrier: frames go in by hand, the outbox shows what goes out. */
class BareLink implements Link {
  readonly outbox = new Outbox();
  readonly inFlightBytes = 0;
  dirty = false;
  requestFlush(): void {}
  flushOutbox(): void {}
  drop(): void {}
}

function aClient(): { session: ClientSession; link: BareLink; open: () => Recorder } {
  const clock = new ManualClock();
  const link = new BareLink();
  const session = new ClientSession({ link, maxStreams: 65_536, queuedBytes: 1 << 26 });
  const core: ClientCore = {
    clock,
    wheel: new TimerWheel({ clock }),
    schedule: (run) => setImmediate(run),
    logger: silentLogger,
    maxFrameBytes: 1 << 20,
    inflight: { add: () => undefined },
  };
  const open = (): Recorder => {
    const recorder = new Recorder();
    const options = { endpoint: ENDPOINT, requestId: "r", traceparent: "", timeoutMs: 1_000, autoCredit: true };
    recorder.stream = openStream(core, () => session, Buffer.from("p"), options, recorder);
    return recorder;
  };
  return { session, link, open };
}

function aServer(): { session: ServerSession; core: ServerCore } {
  const clock = new ManualClock();
  const wheel = new TimerWheel({ clock });
  const core = new ServerCore({ clock, wheel, limits: DEFAULT_LIMITS, logger: silentLogger });
  core.serve(ENDPOINT, () => ({ onCancel: () => undefined }));
  return { session: new ServerSession(core, new BareLink()), core };
}

/** Body of a batch as a server writes it. */
function batch(write: (outbox: Outbox) => void): Buffer {
  const outbox = new Outbox();
  write(outbox);
  return outbox.take().subarray(5);
}

test("client session: an item for a stream that ended does not reach the next one in its slot", () => {
  const { session, open } = aClient();
  const first = open();
  first.stream!.cancel();
  const second = open();
  const late = batch((outbox) => {
    outbox.item(0, Buffer.from("for the first"));
    outbox.streamEnd(0, undefined);
    outbox.item(65_536, Buffer.from("for the second"));
  });
  session.onFrame(FRAME.batch, late, 0, late.length);
  session.turnEnd();
  assert.deepEqual(first.items, []);
  assert.deepEqual(second.texts, ["for the second"]);
  assert.equal(second.endCount, 0);
});

test("client session: slots are used again for a very long time without mixing streams up", () => {
  const { session, link, open } = aClient();
  const ids = new Set<number>();
  const decoder = new FrameDecoder(serverFrames(1 << 20));
  for (let i = 0; i < 40_000; i++) {
    const recorder = open();
    recorder.stream!.cancel();
    if (i % 1_000 > 0) continue;
    decoder.push(link.outbox.take(), {
      closed: false,
      onFrame: (type, bytes, start) => {
        if (type === FRAME.open) ids.add(bytes.readUInt32LE(start));
      },
    });
  }
  assert.equal(session.streamCount, 0);
  // 2^15 generations of one slot, then the first number again.
  assert.equal(ids.size, 32_768);
});

test("client session: a batch with a broken entry is refused after the entries before it", () => {
  const { session, open } = aClient();
  const recorder = open();
  const good = batch((outbox) => outbox.item(0, Buffer.from("good")));
  for (const tail of [Buffer.alloc(1), Buffer.alloc(7), Buffer.from([0, 0, 0, 0, 1, 0, 0, 0]), Buffer.alloc(8, 0xff)]) {
    const bytes = Buffer.concat([good, tail]);
    assert.throws(() => session.onFrame(FRAME.batch, bytes, 0, bytes.length), { reason: "malformed-frame" });
  }
  session.lost(new DynamoError("worker-lost", "broke"));
  assert.equal(recorder.items.length, 4);
  assertReason(recorder.end, "worker-lost");
  assert.deepEqual(recorder.violations, []);
});

test("sessions: garbage in any frame is refused with malformed-frame or ignored, nothing else", () => {
  fc.assert(
    fc.property(fc.integer({ min: 0, max: 255 }), fc.uint8Array({ maxLength: 80 }), (type, garbage) => {
      const bytes = Buffer.from(garbage);
      const client = aClient();
      const recorder = client.open();
      const server = aServer();
      for (const session of [client.session, server.session]) {
        try {
          session.onFrame(type, bytes, 0, bytes.length);
        } catch (error) {
          assert.equal((error as DynamoError).reason, "malformed-frame", String(error));
        }
      }
      client.session.turnEnd();
      assert.deepEqual(recorder.violations, []);
    }),
    { numRuns: 500 },
  );
});

test("server session: a live stream id cannot be opened twice, credit cannot exceed the window", () => {
  const clock = new ManualClock();
  const link = new BareLink();
  const core = new ServerCore({
    clock,
    wheel: new TimerWheel({ clock }),
    limits: DEFAULT_LIMITS,
    logger: silentLogger,
  });
  const session = new ServerSession(core, link);
  let stream: ServerStream | undefined;
  core.serve(ENDPOINT, (opened) => {
    stream = opened;
    return { onCancel: () => undefined };
  });
  const outbox = new Outbox();
  const fields = { wireId: 9, timeoutMs: 1_000, windowBytes: 100, endpoint: ENDPOINT, requestId: "r", traceparent: "" };
  outbox.open(fields, Buffer.alloc(0));
  const openBody = outbox.take().subarray(5);
  session.onFrame(FRAME.open, openBody, 0, openBody.length);
  assert.throws(() => session.onFrame(FRAME.open, openBody, 0, openBody.length), { reason: "malformed-frame" });
  outbox.credit(9, 0xffff_ffff);
  outbox.credit(9, 0xffff_ffff);
  outbox.credit(1_234, 5);
  const creditBody = outbox.take().subarray(5);
  session.onFrame(FRAME.credit, creditBody, 0, creditBody.length);
  for (let i = 0; i < 5; i++) stream!.write(Buffer.alloc(60));
  assert.equal(link.outbox.byteLength, 5 + 2 * (8 + 60), "two items use up the window of 100, the others wait");
  session.lost(new DynamoError("client-gone", "gone"));
  assert.equal(core.activeStreamCount, 0);
  assert.equal(core.parkedBytes, 0);
});
