import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import {
  EngineOutput,
  GREEDY,
  StepWriter,
  decodeActiveSequences,
  decodeByteRange,
  decodeEngineOutput,
  decodeKvAnswer,
  decodeKvEventBatch,
  decodeKvEvents,
  decodeKvQuery,
  decodeRequest,
  encodeActiveSequences,
  encodeByteRange,
  encodeKvAnswer,
  encodeKvEventBatch,
  encodeKvEvents,
  encodeKvQuery,
  encodeRequest,
  forEachStepEntry,
  parseLoadReport,
  type KvEvent,
  type PreprocessedRequest,
} from "../../../src/protocol/index.ts";
import { VllmEventMapper } from "../../../src/engine-events/vllm-event-mapper.ts";
import { decodeVllmMessage } from "../../../src/engine-events/vllm-events.ts";
import {
  decodeBookingUpdate,
  decodeExplanations,
  decodeRequestId,
  decodeRouteAnswer,
} from "../../../src/router-service/messages.ts";
import {
  decodeBeacon,
  decodeReplayAnswer,
  decodeReplayRequest,
  encodeReplayAnswer,
  encodeReplayRequest,
  idFrame,
  isBeacon,
  u64Frame,
} from "../../../src/runtime/event-plane/zmq-frames.ts";
import { DynamoError } from "../../../src/errors/index.ts";
import { parseTraceparent } from "../../../src/observability/tracing.ts";
import { ByteReader, NONCE_BYTES } from "../../../src/std/index.ts";
import { DescriptorList } from "../../../src/transfer/descriptor-list.ts";
import { decodeMetadata, encodeMetadata } from "../../../src/transfer/metadata.ts";
import * as transferWire from "../../../src/transfer/tcp/wire.ts";
import type { AnyTarget } from "../fuzzer.ts";
import { allowing } from "../allowed.ts";
import { bytesTarget } from "../mutate-bytes.ts";

/** Every binary message that crosses a process: it decodes, or is `malformed-frame`; what decodes encodes to the same meaning. */
const MALFORMED = ["malformed-frame"] as const;

const hashes = (count: number): Uint32Array => Uint32Array.from({ length: 2 * count }, (_, i) => i * 0x9e37_79b1);
const EVENTS: KvEvent[] = [
  {
    type: "stored",
    dpRank: 1,
    tier: "device",
    parentHash: [1, 2],
    startBlock: 3,
    sequenceHashes: hashes(3),
    localHashes: hashes(3),
  },
  { type: "removed", dpRank: 1, tier: "disk", sequenceHashes: hashes(2) },
  { type: "cleared", dpRank: 1 },
];

export const REQUEST: PreprocessedRequest = {
  requestId: "request-1",
  model: "echo",
  tokenIds: Uint32Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17),
  sampling: { ...GREEDY, seed: 7, logitBias: [[5, -100]] },
  stop: { maxTokens: 4, minTokens: 0, stopTokenIds: [2], ignoreEos: false },
  output: { topLogprobs: 2, promptLogprobs: false },
  priority: 0,
  cacheNamespace: "",
};

function copies(...views: Uint8Array[]): Buffer[] {
  return views.map((view) => Buffer.from(view));
}

/** Encoders share a slab: each result is copied before the next. */
function encoded<Message>(encode: (message: Message) => Buffer, ...messages: Message[]): Buffer[] {
  return messages.map((message) => Buffer.from(encode(message)));
}

function kvEvents(): AnyTarget {
  return bytesTarget({
    name: "kv-events",
    about: "decodeKvEvents and decodeKvEventBatch, our own encoding",
    corpus: [
      ...encoded(encodeKvEvents, EVENTS, []),
      ...encoded(encodeKvEventBatch, { dpRank: 1, epoch: 5, firstEventId: 9, events: EVENTS }),
    ],
    run(bytes) {
      const events = allowing(MALFORMED, () => decodeKvEvents(bytes));
      if (events !== undefined) assert.deepEqual(decodeKvEvents(Buffer.from(encodeKvEvents(events))), events);
      const batch = allowing(MALFORMED, () => decodeKvEventBatch(bytes));
      if (batch !== undefined) assert.deepEqual(decodeKvEventBatch(Buffer.from(encodeKvEventBatch(batch))), batch);
    },
  });
}

function kvRecovery(): AnyTarget {
  const head = { epoch: 3, lastEventId: 100 };
  return bytesTarget({
    name: "kv-recovery",
    about: "decodeKvQuery and decodeKvAnswer",
    corpus: [
      ...encoded(
        encodeKvQuery,
        { type: "range", start: 3, end: undefined },
        { type: "page", dumpId: 7, page: 2 },
        { type: "range", start: undefined, end: undefined },
      ),
      ...encoded(
        encodeKvAnswer,
        { type: "events", ...head, firstEventId: 8, events: EVENTS },
        { type: "tree-dump", ...head, dumpId: 1, atEventId: 90, page: 0, pageCount: 3, events: EVENTS },
        { type: "too-new", ...head },
        { type: "dump-gone", ...head },
      ),
    ],
    run(bytes) {
      const query = allowing(MALFORMED, () => decodeKvQuery(bytes));
      if (query !== undefined) assert.deepEqual(decodeKvQuery(Buffer.from(encodeKvQuery(query))), query);
      const answer = allowing(MALFORMED, () => decodeKvAnswer(bytes, 1));
      if (answer !== undefined) assert.deepEqual(decodeKvAnswer(Buffer.from(encodeKvAnswer(answer)), 1), answer);
    },
  });
}

/** vLLM's messages as three frames; in the fuzzed bytes each frame has its length in front. */
function vllmEvents(): AnyTarget {
  const path = join(import.meta.dirname, "../../fixtures/vllm-kv-events.json");
  const { samples } = JSON.parse(readFileSync(path, "utf8")) as { samples: { messages: string[][] }[] };
  const payloads = samples.flatMap(({ messages }) => messages.map((frames) => Buffer.from(frames[2]!, "hex")));
  let mapper = new VllmEventMapper({ blockSizeTokens: 4, maxBlocks: 1_000 });
  let count = 0;
  return bytesTarget({
    name: "vllm-events",
    about: "vLLM's msgpack KV events: decodeVllmMessage and VllmEventMapper",
    corpus: payloads,
    run(payload) {
      if (++count % 100 === 0) mapper = new VllmEventMapper({ blockSizeTokens: 4, maxBlocks: 1_000 });
      const message = allowing(MALFORMED, () => decodeVllmMessage([Buffer.from("kv"), u64Frame(1), payload]));
      if (message === undefined) return;
      const events = mapper.map(message);
      // What is mapped must be an event of ours.
      for (const event of events) {
        if (event.type === "stored") assert.equal(event.sequenceHashes.length, event.localHashes.length);
      }
      assert.ok(mapper.blockCount <= 1_000, `${mapper.blockCount} blocks are kept`);
    },
  });
}

function replicaSync(): AnyTarget {
  return bytesTarget({
    name: "replica-sync",
    about: "decodeActiveSequences: what routers tell each other",
    corpus: encoded(
      encodeActiveSequences,
      {
        type: "events",
        model: "echo",
        events: [
          {
            type: "add",
            requestId: "r1",
            instanceId: "00000000000000aa",
            dpRank: 0,
            sequenceHashes: hashes(2),
            blockCount: 2,
            prefillTokens: 32,
            expectedOutputTokens: 5,
          },
          { type: "prefill-completed", requestId: "r1" },
          { type: "free", requestId: "r1" },
        ],
      },
      { type: "snapshot", model: "echo", events: [] },
      { type: "please", routerId: "00000000000000bb" },
    ),
    run(bytes) {
      const message = allowing(MALFORMED, () => decodeActiveSequences(bytes));
      if (message === undefined) return;
      assert.deepEqual(decodeActiveSequences(Buffer.from(encodeActiveSequences(message))), message);
    },
  });
}

function engineOutput(): AnyTarget {
  const step = new StepWriter();
  const target = new EngineOutput();
  return bytesTarget({
    name: "engine-output",
    about: "decodeEngineOutput: what a worker sends for a stream",
    corpus: outputPayloads(step),
    run(bytes) {
      allowing(
        // An error section carries the worker's own reason.
        [...MALFORMED, "engine-failed", "worker-full"],
        () => decodeEngineOutput(bytes, 0, bytes.length, target),
      );
      assert.ok(target.tokenCount <= target.tokenIds.length);
    },
  });
}

function outputPayloads(step: StepWriter): Buffer[] {
  step.reset();
  step.beginEntry(1);
  step.first({ promptTokens: 17, cachedTokens: 16, queueMs: 1.5, prefillMs: 2.5 });
  step.tokens(Uint32Array.of(5, 6, 7), 3);
  step.logprobs([{ logprob: -0.5, topIds: [5, 6], topLogprobs: [-0.5, -1] }]);
  step.endEntry();
  step.beginEntry(2);
  step.tokens(Uint32Array.of(5), 1);
  step.finish("stop", 3);
  step.endEntry();
  const payloads: Buffer[] = [];
  const view = Buffer.from(step.view());
  forEachStepEntry(view, (_id, start, end) => payloads.push(Buffer.from(view.subarray(start, end))));
  return payloads;
}

function requests(): AnyTarget {
  return bytesTarget({
    name: "requests",
    about: "decodeRequest, decodeByteRange, parseLoadReport and the router service's messages",
    corpus: [
      ...encoded(encodeRequest, REQUEST),
      ...copies(encodeByteRange(5, 100)),
      Buffer.from(JSON.stringify({ instanceId: "00000000000000aa", load: { activeBlocks: 1 } })),
      Buffer.from(
        JSON.stringify({
          type: "decision",
          booking: "b",
          instanceId: "00000000000000aa",
          address: "tcp://127.0.0.1:1",
          dpRank: 0,
          policy: "kv",
          reason: "r",
          candidateCount: 1,
          overlapBlocks: 0,
          queuedMs: 0.5,
          outputStepTokens: 0,
        }),
      ),
      Buffer.from('{"booking":"b","tokens":4,"requestId":"x","decisions":[]}'),
    ],
    run(bytes) {
      const request = allowing(MALFORMED, () => decodeRequest(bytes));
      if (request !== undefined) assert.ok(request.tokenIds instanceof Uint32Array);
      allowing(MALFORMED, () => decodeByteRange(bytes));
      parseLoadReport(bytes);
      for (const decode of [decodeRouteAnswer, decodeBookingUpdate, decodeRequestId, decodeExplanations]) {
        allowing(MALFORMED, () => void decode(bytes));
      }
    },
  });
}

/** Multipart messages: in the fuzzed bytes each frame stands behind one byte of length. */
function zmqFrames(): AnyTarget {
  const join8 = (frames: readonly Uint8Array[]): Buffer =>
    Buffer.concat(frames.flatMap((frame) => [Buffer.of(frame.length), frame]));
  const id = "00000000000000aa";
  const topic = Buffer.from("load");
  return bytesTarget({
    name: "zmq-frames",
    about: "beacons, replay requests and replay answers of the event plane",
    corpus: [
      join8([Buffer.concat([Buffer.of(0), topic]), idFrame(id), u64Frame(9), idFrame(id)]),
      join8(encodeReplayRequest({ topic: "load", publisherId: id, from: 1, to: 9, askNumber: 3 })),
      join8(encodeReplayAnswer({ askNumber: 3, epoch: id, first: 1, newest: 9, payloads: [Buffer.from("event")] })),
      join8([topic, idFrame(id), u64Frame(1), Buffer.from("payload")]),
    ],
    run(bytes) {
      const frames: Buffer[] = [];
      for (let at = 0; at < bytes.length;) {
        const end = at + 1 + bytes[at]!;
        frames.push(bytes.subarray(at + 1, end));
        at = end;
      }
      // A message has at least one frame.
      if (frames.length === 0) return;
      isBeacon(frames);
      decodeBeacon(frames);
      const request = decodeReplayRequest(frames);
      if (request !== undefined) assert.ok(request.from >= 1 && request.to >= request.from);
      decodeReplayAnswer(frames);
    },
  });
}

/** Frames of the transfer library's TCP back end, and what agents tell of their memory. */
function transfer(): AnyTarget {
  const destination = new DescriptorList(Uint32Array.of(1, 2), Float64Array.of(0, 64), Uint32Array.of(16, 32));
  const hello = {
    serverIncarnation: 1n,
    incarnation: 2n,
    port: 5,
    name: "agent",
    nonce: Buffer.alloc(NONCE_BYTES, 7),
    proof: Buffer.alloc(32),
  };
  const bodyOf = (frame: Buffer): Buffer => frame.subarray(transferWire.REQUEST_HEADER_BYTES);
  const textOf = (frame: Buffer): Buffer => frame.subarray(transferWire.RESPONSE_HEADER_BYTES);
  const pull = { id: 1, grant: 9n, timeoutMs: 500, message: Buffer.from("done"), destination };
  return bytesTarget({
    name: "transfer",
    about: "the transfer library's requests, answers and metadata",
    corpus: [
      bodyOf(transferWire.encodeHello(hello)),
      bodyOf(transferWire.encodePull(pull)),
      bodyOf(transferWire.encodePull(pull)).subarray(24),
      textOf(transferWire.encodeServerHello(hello.nonce)),
      textOf(transferWire.encodeError(1, new DynamoError("cancelled", "stopped"))),
      encodeMetadata({ name: "agent", incarnation: 3n, hostId: "h" }, new Map([["tcp", Buffer.from("part")]]), []),
    ],
    run(bytes) {
      const reasons = [...MALFORMED, "protocol-version"] as const;
      const { decoding } = transferWire;
      allowing(reasons, () => decoding(() => transferWire.decodeHello(new ByteReader(bytes))));
      const list = allowing(reasons, () => decoding(() => transferWire.decodeDescriptors(new ByteReader(bytes))));
      if (list !== undefined) assert.ok(list.count * 16 <= bytes.length);
      allowing(reasons, () => decoding(() => transferWire.decodePull(new ByteReader(bytes))));
      allowing(reasons, () => decoding(() => transferWire.decodeServerHello(bytes)));
      assert.ok(transferWire.decodeError(bytes) instanceof DynamoError);
      const metadata = allowing(reasons, () => decodeMetadata(bytes));
      if (metadata !== undefined) assert.notEqual(metadata.name, "");
      parseTraceparent(bytes.toString("latin1"));
    },
  });
}

export const WIRE_TARGETS: Record<string, () => AnyTarget> = {
  "kv-events": kvEvents,
  "kv-recovery": kvRecovery,
  "vllm-events": vllmEvents,
  "replica-sync": replicaSync,
  "engine-output": engineOutput,
  requests,
  "zmq-frames": zmqFrames,
  transfer,
};
