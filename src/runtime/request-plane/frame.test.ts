import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../../errors/index.ts";
import {
  CLIENT_FRAMES,
  FRAME,
  FrameDecoder,
  HANDSHAKE_FRAMES,
  HEAD_BYTES,
  decodeError,
  decodeOpen,
  encodeError,
  encodeFrame,
  serverFrames,
  type FrameLimits,
  type FrameSink,
} from "./frame.ts";
import { MAX_ERROR_DIAGNOSTIC_BYTES, MAX_ERROR_MESSAGE_BYTES } from "./limits.ts";
import { Outbox } from "./outbox.ts";

class Collected implements FrameSink {
  closed = false;
  readonly frames: { type: number; body: Buffer }[] = [];
  /** Bodies that were handed out without a copy. */
  viewCount = 0;
  chunk: Buffer | undefined = undefined;

  onFrame(type: number, bytes: Buffer, start: number, end: number): void {
    if (bytes === this.chunk) this.viewCount++;
    this.frames.push({ type, body: Buffer.from(bytes.subarray(start, end)) });
  }
}

const LIMITS = new Float64Array(256).fill(-1);
for (let type = 1; type <= 20; type++) LIMITS[type] = 4_000;
LIMITS[21] = 8 * 1024 * 1024;

/** Chunks of the given sizes, the last one taking the rest. */
function split(bytes: Buffer, sizes: readonly number[]): Buffer[] {
  const chunks: Buffer[] = [];
  let at = 0;
  for (const size of sizes) {
    if (at >= bytes.length) break;
    chunks.push(Buffer.from(bytes.subarray(at, at + size)));
    at += size;
  }
  if (at < bytes.length) chunks.push(Buffer.from(bytes.subarray(at)));
  return chunks;
}

function decode(chunks: readonly Buffer[], limits: FrameLimits = LIMITS): Collected {
  const sink = new Collected();
  const decoder = new FrameDecoder(limits);
  for (const chunk of chunks) {
    sink.chunk = chunk;
    decoder.push(chunk, sink);
  }
  return sink;
}

function isMalformed(error: unknown): boolean {
  return error instanceof DynamoError && error.reason === "malformed-frame";
}

const frames = fc.array(fc.record({ type: fc.integer({ min: 1, max: 20 }), body: fc.uint8Array({ maxLength: 300 }) }), {
  maxLength: 12,
});

test("frame decoder: frames that lie whole in a chunk are handed out in place, glued or not", () => {
  const bodies = ["", "a", "second", "x".repeat(4_000)].map((text) => Buffer.from(text));
  const glued = decode([Buffer.concat(bodies.map((body) => encodeFrame(3, body)))]);
  assert.deepEqual(
    glued.frames.map(({ body }) => body),
    bodies,
  );
  assert.equal(glued.viewCount, bodies.length);
  const single = decode(bodies.map((body) => encodeFrame(3, body)));
  assert.deepEqual(single.frames, glued.frames);
  assert.equal(single.viewCount, bodies.length);
});

test("frame decoder: bytes one by one and split at random give the same frames", () => {
  fc.assert(
    fc.property(frames, fc.array(fc.integer({ min: 0, max: 400 }), { maxLength: 30 }), (list, sizes) => {
      const bytes = Buffer.concat(list.map(({ type, body }) => encodeFrame(type, body)));
      const expected = list.map(({ type, body }) => ({ type, body: Buffer.from(body) }));
      assert.deepEqual(decode([bytes]).frames, expected);
      assert.deepEqual(decode(split(bytes, sizes)).frames, expected);
      assert.deepEqual(decode(Array.from(bytes, (byte) => Buffer.from([byte]))).frames, expected);
    }),
    { numRuns: 200 },
  );
});

test("frame decoder: a truncated stream gives the whole frames and keeps the rest", () => {
  fc.assert(
    fc.property(frames, fc.nat(), (list, cutAt) => {
      const encoded = list.map(({ type, body }) => encodeFrame(type, body));
      const bytes = Buffer.concat(encoded);
      const cut = bytes.length === 0 ? 0 : cutAt % bytes.length;
      let wholeCount = 0;
      for (let end = 0; wholeCount < encoded.length; wholeCount++) {
        end += encoded[wholeCount]!.length;
        if (end > cut) break;
      }
      const sink = new Collected();
      const decoder = new FrameDecoder(LIMITS);
      decoder.push(bytes.subarray(0, cut), sink);
      assert.equal(sink.frames.length, wholeCount);
      const consumed = encoded.slice(0, wholeCount).reduce((sum, frame) => sum + frame.length, 0);
      assert.equal(decoder.pendingBytes, cut - consumed);
      decoder.push(bytes.subarray(cut), sink);
      assert.equal(sink.frames.length, list.length);
    }),
    { numRuns: 200 },
  );
});

test("frame decoder: a length over the limit of its type is refused with its head, whole or byte by byte", () => {
  for (const length of [4_001, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]) {
    const head = Buffer.alloc(HEAD_BYTES);
    head.writeUInt32LE(length);
    head[4] = 7;
    assert.throws(() => decode([head]), isMalformed);
    assert.throws(() => decode(Array.from(head, (byte) => Buffer.from([byte]))), isMalformed);
  }
  for (const type of [0, 22, 255]) assert.throws(() => decode([encodeFrame(type)]), isMalformed);
});

test("frame decoder: memory follows what arrived, not what a length announces", () => {
  const head = Buffer.alloc(HEAD_BYTES);
  head.writeUInt32LE(8 * 1024 * 1024);
  head[4] = 21;
  const decoder = new FrameDecoder(LIMITS);
  const sink = new Collected();
  decoder.push(head, sink);
  assert.ok(decoder.bufferBytes <= 8 * 1024, `${decoder.bufferBytes} bytes for a head`);
  decoder.push(Buffer.alloc(100_000), sink);
  assert.ok(decoder.bufferBytes <= 2 * (100_000 + HEAD_BYTES));
  decoder.push(Buffer.alloc(8 * 1024 * 1024 - 100_000), sink);
  assert.equal(sink.frames.length, 1);
  assert.equal(decoder.bufferBytes, 0, "a large buffer is given up");
});

test("frame decoder: nothing is delivered after the sink closed", () => {
  const sink = new Collected();
  const onFrame = sink.onFrame.bind(sink);
  sink.onFrame = (type, bytes, start, end) => {
    onFrame(type, bytes, start, end);
    sink.closed = true;
  };
  new FrameDecoder(LIMITS).push(Buffer.concat([encodeFrame(1), encodeFrame(2)]), sink);
  assert.deepEqual(
    sink.frames.map(({ type }) => type),
    [1],
  );
});

test("frame decoder: garbage is refused or waited for, it never hangs, crashes or takes memory", () => {
  for (const limits of [HANDSHAKE_FRAMES, CLIENT_FRAMES, serverFrames(64 * 1024 * 1024)]) {
    fc.assert(
      fc.property(fc.array(fc.uint8Array({ maxLength: 200 }), { maxLength: 20 }), (chunks) => {
        const decoder = new FrameDecoder(limits);
        const sink = new Collected();
        let byteCount = 0;
        try {
          for (const chunk of chunks) {
            byteCount += chunk.length;
            decoder.push(Buffer.from(chunk), sink);
          }
        } catch (error) {
          assert.ok(isMalformed(error), String(error));
        }
        assert.ok(decoder.bufferBytes <= Math.max(4 * 1024, 2 * byteCount));
      }),
      { numRuns: 300 },
    );
  }
});

test("OPEN: what the outbox writes is what the decoder reads", () => {
  fc.assert(
    fc.property(
      fc.record({
        wireId: fc.nat(0x7fff_ffff),
        timeoutMs: fc.nat(0xffff_ffff),
        windowBytes: fc.nat(0xffff_ffff),
        endpoint: fc.string({ maxLength: 60, unit: "grapheme" }).filter((text) => Buffer.byteLength(text) <= 256),
        requestId: fc.string({ maxLength: 30, unit: "grapheme" }).filter((text) => Buffer.byteLength(text) <= 128),
        traceparent: fc.string({ maxLength: 128 }).filter((text) => Buffer.byteLength(text) <= 128),
      }),
      fc.uint8Array({ maxLength: 500 }),
      (fields, payload) => {
        const outbox = new Outbox();
        outbox.open(fields, payload);
        const [frame] = decode([outbox.take()], serverFrames(1_000_000)).frames;
        const { payloadStart, ...read } = decodeOpen(frame!.body, 0, frame!.body.length);
        assert.deepEqual(read, { ...fields });
        assert.deepEqual(frame!.body.subarray(payloadStart), Buffer.from(payload));
        for (let end = 0; end < payloadStart; end++) assert.throws(() => decodeOpen(frame!.body, 0, end), isMalformed);
      },
    ),
    { numRuns: 40 },
  );
});

test("OPEN: texts over their limits and ids of 2^31 and more are refused", () => {
  const body = (id: number, endpoint: number, requestId: number, traceparent: number): Buffer => {
    const bytes = Buffer.alloc(18 + 100_000);
    bytes.writeUInt32LE(id, 0);
    bytes.writeUInt16LE(endpoint, 12);
    bytes.writeUInt16LE(requestId, 14);
    bytes.writeUInt16LE(traceparent, 16);
    return bytes;
  };
  const bad: [number, number, number, number][] = [
    [2 ** 31, 1, 1, 1],
    [1, 257, 0, 0],
    [1, 0, 129, 0],
    [1, 0, 0, 129],
    [1, 65_535, 65_535, 65_535],
  ];
  for (const fields of bad) {
    const bytes = body(...fields);
    assert.throws(() => decodeOpen(bytes, 0, bytes.length), isMalformed);
  }
  const good = body(2 ** 31 - 1, 256, 128, 128);
  assert.equal(decodeOpen(good, 0, good.length).payloadStart, 18 + 512);
});

test("errors: texts come back, over-long ones cut at a character, damaged ones are refused", () => {
  fc.assert(
    fc.property(
      fc.string({ unit: "binary", maxLength: 30 }),
      fc.string({ unit: "grapheme", maxLength: 20 }),
      fc.nat(),
      (message, diagnostic, retryAfterMs) => {
        // A lone surrogate has no UTF-8.
        fc.pre(message.isWellFormed() && diagnostic.isWellFormed());
        const bytes = encodeError(new DynamoError("worker-full", message, { diagnostic, retryAfterMs }));
        const back = decodeError(bytes, 0, bytes.length);
        assert.equal(back.reason, "worker-full");
        assert.equal(back.publicMessage, message);
        assert.equal(back.diagnostic ?? "", diagnostic);
        assert.equal(back.retryAfterMs ?? 0, retryAfterMs);
        for (let end = 0; end < bytes.length; end++) assert.throws(() => decodeError(bytes, 0, end), isMalformed);
      },
    ),
    { numRuns: 50 },
  );
  const long = encodeError(new DynamoError("internal", "ü".repeat(5_000), { diagnostic: "€".repeat(5_000) }));
  const back = decodeError(long, 0, long.length);
  assert.equal(back.publicMessage, "ü".repeat(MAX_ERROR_MESSAGE_BYTES / 2));
  assert.equal(back.diagnostic, "€".repeat(Math.floor(MAX_ERROR_DIAGNOSTIC_BYTES / 3)));
  const unknown = encodeError({ reason: "from-the-future", publicMessage: "m", diagnostic: "d" } as never);
  assert.equal(decodeError(unknown, 0, unknown.length).reason, "malformed-frame");
});

test("outbox: items, ends and credits share frames, other frames keep their place between them", () => {
  const outbox = new Outbox();
  outbox.item(1, Buffer.from("a"));
  outbox.item(2, Buffer.from("b"));
  outbox.streamEnd(1, undefined);
  outbox.control(FRAME.ping);
  outbox.item(2, Buffer.from("c"));
  outbox.credit(5, 100);
  outbox.credit(6, 200);
  const { frames: list } = decode([outbox.take()]);
  assert.deepEqual(
    list.map(({ type, body }) => [type, body.length]),
    [
      [FRAME.batch, 9 + 9 + 8],
      [FRAME.ping, 0],
      [FRAME.batch, 9],
      [FRAME.credit, 16],
    ],
  );
  assert.equal(outbox.byteLength, 0);
  assert.equal(outbox.take().length, 0);
});

test("outbox: a slab that was given back is used again, a large one is not kept", () => {
  const outbox = new Outbox();
  outbox.item(1, Buffer.alloc(1_000));
  const first = outbox.take();
  outbox.giveBack(first);
  outbox.item(2, Buffer.alloc(2_000));
  assert.equal(outbox.take().buffer, first.buffer);
  outbox.item(3, Buffer.alloc(4 * 1024 * 1024));
  const large = outbox.take();
  outbox.giveBack(large);
  outbox.item(4, Buffer.alloc(10));
  assert.notEqual(outbox.take().buffer, large.buffer);
});

test("outbox: a long batch is cut into frames that the client's limits allow", () => {
  const outbox = new Outbox();
  const item = Buffer.alloc(3_000, 1);
  for (let i = 0; i < 1_000; i++) outbox.item(i, item);
  const { frames: list } = decode([outbox.take()], CLIENT_FRAMES);
  assert.ok(list.length > 30 && list.length < 60, `${list.length} frames`);
  assert.equal(
    list.reduce((sum, { body }) => sum + body.length, 0),
    1_000 * 3_008,
  );
});
