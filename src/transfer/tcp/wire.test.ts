import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ByteReader } from "../../std/index.ts";
import { DynamoError } from "../../errors/index.ts";
import { DescriptorList } from "../descriptor-list.ts";
import {
  MAX_HELLO_BYTES,
  MAX_REQUEST_BYTES,
  REQUEST,
  RequestDecoder,
  decodeDescriptors,
  decodeHello,
  decodePull,
  decoding,
  encodeHello,
  encodeNotify,
  encodePull,
  encodeRead,
} from "./wire.ts";

const someMessages = fc.array(fc.uint8Array({ maxLength: 200 }), { minLength: 1, maxLength: 12 });

function ready(): RequestDecoder {
  const decoder = new RequestDecoder();
  decoder.maxBytes = MAX_REQUEST_BYTES;
  return decoder;
}

test("transfer wire: requests come out whole however the stream is cut", () => {
  fc.assert(
    fc.property(someMessages, fc.array(fc.nat(40), { minLength: 1 }), (messages, cuts) => {
      const stream = Buffer.concat(messages.map((message, i) => encodeNotify(i, message)));
      for (const sizes of [[stream.length], [1], cuts.map((cut) => cut + 1)]) {
        const decoder = ready();
        const got: Buffer[] = [];
        for (let at = 0, i = 0; at < stream.length; i++) {
          const end = Math.min(stream.length, at + sizes[i % sizes.length]!);
          decoder.feed(stream.subarray(at, end), (type, body) => {
            assert.equal(type, REQUEST.notify);
            assert.equal(body.u32(), got.length);
            got.push(Buffer.from(body.bytes(body.remaining)));
          });
          at = end;
        }
        assert.deepEqual(
          got,
          messages.map((message) => Buffer.from(message)),
        );
      }
    }),
  );
});

test("transfer wire: a truncated or mangled request is malformed and nothing else", () => {
  const list = new DescriptorList(Uint32Array.of(1, 2), Float64Array.of(0, 4096), Uint32Array.of(10, 20));
  const proof = Buffer.alloc(32, 1);
  const frames = [
    encodeHello({ serverIncarnation: 5n, incarnation: 6n, port: 7, name: "a", nonce: Buffer.alloc(16), proof }),
    encodePull({ id: 1, grant: 2n, timeoutMs: 3, message: Buffer.from("m"), destination: list }),
    encodeRead(1, { list, first: 0, inside: 3, byteCount: 27 }),
  ];
  const decoders = [
    (body: ByteReader) => decodeHello(body),
    (body: ByteReader) => decodePull(body),
    (body: ByteReader) => [body.u32(), decodeDescriptors(body)],
  ];
  fc.assert(
    fc.property(
      fc.nat(frames.length - 1),
      fc.double({ min: 0, max: 1, noNaN: true }),
      fc.nat(255),
      fc.boolean(),
      (which, part, byte, isCut) => {
        const body = Buffer.from(frames[which]!.subarray(5));
        const at = Math.min(body.length - 1, Math.floor(part * body.length));
        if (!isCut) body[at] = byte;
        try {
          decoding(() => decoders[which]!(new ByteReader(body, 0, isCut ? at : body.length)));
        } catch (thrown) {
          assert.ok(
            thrown instanceof DynamoError && ["malformed-frame", "protocol-version"].includes(thrown.reason),
            String(thrown),
          );
          return;
        }
        assert.ok(!isCut, "a truncated request was taken");
      },
    ),
  );
});

test("transfer wire: a span names its pieces from inside the first descriptor to inside the last", () => {
  const list = new DescriptorList(Uint32Array.of(1, 2, 3), Float64Array.of(100, 200, 300), Uint32Array.of(10, 20, 30));
  const frame = encodeRead(9, { list, first: 0, inside: 4, byteCount: 6 + 20 + 5 });
  const body = new ByteReader(frame, 5);
  assert.equal(body.u32(), 9);
  const pieces = decodeDescriptors(body);
  assert.deepEqual([...pieces.regionIds], [1, 2, 3]);
  assert.deepEqual([...pieces.offsets], [104, 200, 300]);
  assert.deepEqual([...pieces.lengths], [6, 20, 5]);
});

test("transfer wire: before the handshake only a small frame is taken", () => {
  const decoder = new RequestDecoder();
  const frame = encodeNotify(1, Buffer.alloc(MAX_HELLO_BYTES));
  assert.throws(() => decoder.feed(frame.subarray(0, 5), () => assert.fail("a frame")), /malformed/);
});
