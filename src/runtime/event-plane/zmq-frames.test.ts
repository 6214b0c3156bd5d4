import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import {
  MAX_SEQUENCE,
  decodeBeacon,
  decodeReplayAnswer,
  decodeReplayRequest,
  encodeReplayAnswer,
  encodeReplayRequest,
  idFrame,
  readSequence,
  u64Frame,
} from "./zmq-frames.ts";

const id = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map((value) => value.toString(16).padStart(16, "0"));
const sequence = fc.integer({ min: 1, max: 2 ** 51 });

test("zmq frames: sequences are u64 big-endian, as a foreign listener reads them", () => {
  assert.equal(u64Frame(0x0102_0304_0506).toString("hex"), "0000010203040506");
  fc.assert(
    fc.property(fc.integer({ min: 0, max: MAX_SEQUENCE }), (value) => {
      assert.equal(u64Frame(value).readBigUInt64BE(0), BigInt(value));
      assert.equal(readSequence(u64Frame(value)), value);
    }),
  );
});

test("zmq frames: a sequence that is too large or not eight bytes is refused", () => {
  assert.equal(readSequence(Buffer.alloc(8, 0xff)), -1);
  for (const length of [0, 1, 7, 9, 1000]) assert.equal(readSequence(Buffer.alloc(length)), -1);
});

test("zmq frames: requests and answers survive the round trip", () => {
  fc.assert(
    fc.property(id, sequence, fc.nat(1000), fc.nat(), (publisherId, from, length, askNumber) => {
      const request = { topic: "kv-events", publisherId, from, to: from + length, askNumber };
      assert.deepEqual(decodeReplayRequest(encodeReplayRequest(request)), request);
    }),
  );
  fc.assert(
    fc.property(id, sequence, fc.nat(), fc.array(fc.uint8Array({ maxLength: 20 })), (epoch, first, askNumber, all) => {
      const payloads = all.map((payload) => Buffer.from(payload));
      const answer = { askNumber, epoch, first, newest: first + 3, payloads };
      assert.deepEqual(decodeReplayAnswer(encodeReplayAnswer(answer) as Buffer[]), answer);
    }),
  );
});

test("zmq frames: a message cut or changed anywhere is refused or read within its bounds, never thrown on", () => {
  const decoders = [decodeBeacon, decodeReplayRequest, decodeReplayAnswer];
  const messages = [
    [Buffer.from("\0load"), idFrame("00000000000000aa"), u64Frame(7), idFrame("00000000000000bb")],
    encodeReplayRequest({ topic: "load", publisherId: "00000000000000aa", from: 1, to: 5, askNumber: 1 }),
    encodeReplayAnswer({
      askNumber: 1,
      epoch: "00000000000000bb",
      first: 1,
      newest: 5,
      payloads: [Buffer.from("x")],
    }) as Buffer[],
  ];
  messages.forEach((frames, index) => {
    assert.notEqual(decoders[index]!(frames), undefined);
    for (let count = 0; count < Math.min(4, frames.length); count++) {
      assert.equal(decoders[index]!(frames.slice(0, count)), undefined, `${index} cut to ${count} frames`);
    }
    for (let at = index === 0 ? 1 : 0; at < 4; at++) {
      for (const bad of [Buffer.alloc(0), frames[at]!.subarray(1), Buffer.alloc(9), Buffer.alloc(300)]) {
        const isTopic = index === 1 && at === 0;
        if (isTopic && bad.length <= 128) continue;
        assert.equal(decoders[index]!(frames.with(at, bad)), undefined, `${index}: frame ${at} of ${bad.length} bytes`);
      }
    }
  });
  fc.assert(
    fc.property(fc.array(fc.uint8Array({ maxLength: 12 }), { maxLength: 8 }), (raw) => {
      for (const decode of decoders) decode(raw.map((frame) => Buffer.from(frame)));
    }),
  );
});

test("zmq frames: a request from 0, backwards or over the largest sequence is refused", () => {
  const good = { topic: "load", publisherId: "00000000000000aa", from: 2, to: 5, askNumber: 1 };
  assert.equal(decodeReplayRequest(encodeReplayRequest({ ...good, from: 0 })), undefined);
  assert.equal(decodeReplayRequest(encodeReplayRequest({ ...good, to: 1 })), undefined);
  assert.equal(decodeReplayRequest(encodeReplayRequest({ ...good, to: MAX_SEQUENCE * 2 })), undefined);
});
