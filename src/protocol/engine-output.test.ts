import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError, REASONS, type Reason } from "../errors/index.ts";
import {
  EngineOutput,
  StepWriter,
  decodeEngineOutput,
  forEachStepEntry,
  type FinishReason,
  type RestoredBlocks,
  type TokenLogprob,
} from "./engine-output.ts";

/** Ordinary objects, as the decoder makes them. */
function aRecord<T>(model: { [K in keyof T]: fc.Arbitrary<T[K]> }): fc.Arbitrary<T> {
  return fc.record(model, { noNullPrototype: true }) as fc.Arbitrary<T>;
}

const aU32 = fc.nat(0xffffffff);
const anF32 = fc.float({ noNaN: true });
const aLogprob: fc.Arbitrary<TokenLogprob> = fc
  .tuple(anF32, fc.array(fc.tuple(aU32, anF32), { maxLength: 20 }))
  .map(([logprob, top]) => ({ logprob, topIds: top.map(([id]) => id), topLogprobs: top.map(([, value]) => value) }));
const anError = fc
  .tuple(fc.constantFrom(...(Object.keys(REASONS) as Reason[])), fc.string(), fc.string({ minLength: 1 }))
  .map(([reason, message, diagnostic]) => new DynamoError(reason, message, { diagnostic }));

interface Payload {
  tokens: number[];
  first: { promptTokens: number; cachedTokens: number; queueMs: number; prefillMs: number } | undefined;
  logprobs: TokenLogprob[] | undefined;
  promptLogprobs: TokenLogprob[] | undefined;
  restored: RestoredBlocks | undefined;
  finish: Exclude<FinishReason, "error"> | undefined;
  decodeMs: number;
  error: DynamoError | undefined;
}

const aPayload: fc.Arbitrary<Payload> = aRecord({
  tokens: fc.array(aU32, { maxLength: 100 }),
  first: fc.option(aRecord({ promptTokens: aU32, cachedTokens: aU32, queueMs: anF32, prefillMs: anF32 }), {
    nil: undefined,
  }),
  logprobs: fc.option(fc.array(aLogprob, { maxLength: 4 }), { nil: undefined }),
  promptLogprobs: fc.option(fc.array(aLogprob, { maxLength: 4 }), { nil: undefined }),
  restored: fc.option(aRecord({ hostBlocks: aU32, diskBlocks: aU32, objectBlocks: aU32, milliseconds: anF32 }), {
    nil: undefined,
  }),
  finish: fc.option(fc.constantFrom("stop" as const, "length" as const, "cancelled" as const), { nil: undefined }),
  decodeMs: anF32,
  error: fc.option(anError, { nil: undefined }),
});

function write(writer: StepWriter, streamId: number, payload: Payload): void {
  writer.beginEntry(streamId);
  if (payload.first !== undefined) writer.first(payload.first);
  if (payload.tokens.length === 1) writer.token(payload.tokens[0]!);
  else if (payload.tokens.length > 0) writer.tokens(payload.tokens);
  if (payload.logprobs !== undefined) writer.logprobs(payload.logprobs);
  if (payload.promptLogprobs !== undefined) writer.promptLogprobs(payload.promptLogprobs);
  if (payload.restored !== undefined) writer.restored(payload.restored);
  if (payload.finish !== undefined) writer.finish(payload.finish, payload.decodeMs);
  if (payload.error !== undefined) writer.error(payload.error);
  writer.endEntry();
}

function assertDecoded(output: EngineOutput, payload: Payload): void {
  assert.deepEqual([...output.tokenIds.subarray(0, output.tokenCount)], payload.tokens);
  assert.equal(output.hasFirst, payload.first !== undefined);
  if (payload.first !== undefined) {
    const { promptTokens, cachedTokens, queueMs, prefillMs } = output;
    assert.deepEqual({ promptTokens, cachedTokens, queueMs, prefillMs }, payload.first);
  }
  assert.deepEqual(output.logprobs, payload.logprobs);
  assert.deepEqual(output.promptLogprobs, payload.promptLogprobs);
  assert.deepEqual(output.restored, payload.restored);
  assert.equal(output.finish, payload.error === undefined ? payload.finish : "error");
  if (payload.finish !== undefined) assert.equal(output.decodeMs, payload.decodeMs);
  assert.equal(output.error?.reason, payload.error?.reason);
  assert.equal(output.error?.message, payload.error?.message);
  assert.equal(output.error?.diagnostic, payload.error?.diagnostic);
}

void test("engine output: steps of many streams come back as written, whatever the reused target held", () => {
  const writer = new StepWriter();
  const output = new EngineOutput();
  fc.assert(
    fc.property(fc.array(fc.tuple(aU32, aPayload), { maxLength: 8 }), (entries) => {
      writer.reset();
      for (const [streamId, payload] of entries) write(writer, streamId, payload);
      assert.equal(writer.entryCount, entries.length);
      const step = writer.view();
      let index = 0;
      forEachStepEntry(step, (streamId, start, end) => {
        const [expectedId, payload] = entries[index++]!;
        assert.equal(streamId, expectedId);
        decodeEngineOutput(step, start, end, output);
        assertDecoded(output, payload);
      });
      assert.equal(index, entries.length);
    }),
  );
});

function isMalformedFrame(error: unknown): boolean {
  return error instanceof DynamoError && error.reason === "malformed-frame";
}

/** Decodes, and lets nothing pass but success or `malformed-frame`. */
function decodeOrRefuse(bytes: Uint8Array, target = new EngineOutput()): boolean {
  try {
    decodeEngineOutput(bytes, 0, bytes.length, target);
    return true;
  } catch (error) {
    assert.ok(isMalformedFrame(error), String(error));
    return false;
  }
}

function payloadBytes(payload: Payload): Buffer {
  const writer = new StepWriter();
  write(writer, 1, payload);
  return Buffer.from(writer.view().subarray(8));
}

void test("engine output: a payload cut anywhere is refused, or is the sections before the cut", () => {
  fc.assert(
    fc.property(aPayload, (payload) => {
      const bytes = payloadBytes(payload);
      for (let length = 0; length < bytes.length; length++) decodeOrRefuse(bytes.subarray(0, length));
    }),
    { numRuns: 50 },
  );
  // One section has no valid cut but the empty one.
  const oneSection = payloadBytes({
    tokens: [1, 2, 3],
    first: undefined,
    logprobs: undefined,
    promptLogprobs: undefined,
    restored: undefined,
    finish: undefined,
    decodeMs: 0,
    error: undefined,
  });
  for (let length = 1; length < oneSection.length; length++) {
    assert.equal(decodeOrRefuse(oneSection.subarray(0, length)), false, `${length} bytes`);
  }
});

void test("engine output: changed and random bytes are decoded or refused, never more", () => {
  fc.assert(
    fc.property(aPayload, fc.nat(), fc.nat(255), (payload, position, value) => {
      const bytes = payloadBytes(payload);
      if (bytes.length > 0) bytes[position % bytes.length] = value;
      decodeOrRefuse(bytes);
    }),
  );
  fc.assert(fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => void decodeOrRefuse(bytes)));
});

void test("engine output: hostile lengths are refused without memory for them", () => {
  const hostile: readonly (readonly [string, number[]])[] = [
    ["65,535 tokens in no bytes", [1, 0xff, 0xff]],
    ["65,535 logprob records in no bytes", [3, 0xff, 0xff]],
    ["4 billion prompt logprob records in 4 bytes", [4, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]],
    ["255 alternatives in no bytes", [3, 1, 0, 0, 0, 0, 0, 255]],
    ["a reason of 4 GB", [6, 0xff, 0xff, 0xff, 0xff, 65]],
    ["an unknown finish reason", [5, 9, 0, 0, 0, 0]],
    ["an unknown section", [77]],
  ];
  for (const [title, bytes] of hostile) {
    const before = process.memoryUsage().arrayBuffers;
    for (let i = 0; i < 100; i++) {
      assert.equal(decodeOrRefuse(Uint8Array.from(bytes)), false, title);
    }
    // 100 targets with room for 65,535 tokens each are 26 MB.
    assert.ok(process.memoryUsage().arrayBuffers - before < 64e6, title);
  }
});

void test("engine output: a reason that this version does not know becomes malformed-frame of the stream", () => {
  const writer = new StepWriter();
  writer.errorEntry(5, Object.assign(new DynamoError("internal", "text"), { reason: "from-the-future" }));
  const output = new EngineOutput();
  decodeEngineOutput(writer.view(), 8, writer.view().length, output);
  assert.equal(output.finish, "error");
  assert.equal(output.error?.reason, "malformed-frame");
  assert.match(output.error?.diagnostic ?? "", /from-the-future/);
});

void test("engine output: an error entry has no decode time, whatever stream the target held before", () => {
  const writer = new StepWriter();
  writer.beginEntry(4);
  writer.token(7);
  writer.finish("length", 133);
  writer.endEntry();
  writer.errorEntry(5, new DynamoError("engine-stopped", "stopped"));
  const output = new EngineOutput();
  const times: number[] = [];
  forEachStepEntry(writer.view(), (_id, start, end) => {
    decodeEngineOutput(writer.view(), start, end, output);
    times.push(output.decodeMs);
  });
  assert.deepEqual(times, [133, 0]);
});
