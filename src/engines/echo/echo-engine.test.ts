import { engineBattery } from "../engine.battery.ts";
import { EchoEngine } from "./echo-engine.ts";
import assert from "node:assert/strict";
import { test } from "node:test";
import { ManualClock } from "../../std/index.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "../engine.recorder.ts";
import type { EchoEngineConfig } from "../config.ts";

const CONFIG: EchoEngineConfig = {
  kind: "echo",
  contextLength: 256,
  maxSequences: 8,
  blockSizeTokens: 4,
  stepMs: 0,
};

function aPrompt(length: number): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => (i * 7 + 3) % 251);
}

engineBattery("echo", () =>
  Promise.resolve({
    engine: new EchoEngine(CONFIG, { maxWaitingRequests: 50 }),
    promptTokenIds: aPrompt,
    stopTokenId: 255,
    supportsExport: false,
    maxWaitingRequests: 50,
  }),
);

async function withEngine(engine: EchoEngine, body: (recorder: EngineRecorder) => Promise<void>): Promise<void> {
  const recorder = new EngineRecorder(engine);
  await recorder.start();
  try {
    await body(recorder);
  } finally {
    await recorder.stop();
  }
  recorder.check();
}

void test("echo: the output is the prompt, over and over", () =>
  withEngine(new EchoEngine(CONFIG), async (recorder) => {
    const { tokens } = await recorder.run(aRequest(Uint32Array.of(5, 6, 7), { stop: { maxTokens: 8 } }));
    assert.deepEqual(tokens, [5, 6, 7, 5, 6, 7, 5, 6]);
  }));

void test("echo: a step has one token of every running stream", () =>
  withEngine(new EchoEngine(CONFIG), async (recorder) => {
    const streamIds = Array.from({ length: 8 }, () =>
      recorder.submit(aRequest(aPrompt(3), { stop: { maxTokens: 5 } })),
    );
    await recorder.ended(streamIds);
    assert.equal(recorder.stepCount, 5);
  }));

void test("echo: output ends where the context ends", () =>
  withEngine(new EchoEngine(CONFIG), async (recorder) => {
    const record = await recorder.run(aRequest(aPrompt(250), { stop: { maxTokens: 100 } }));
    assert.equal(record.tokens.length, 6);
    assert.equal(record.finish, "length");
  }));

void test("echo: a prompt of stop tokens only still gets its min_tokens", () =>
  withEngine(new EchoEngine(CONFIG), async (recorder) => {
    const stop = { maxTokens: 5, minTokens: 2, stopTokenIds: [0, 1] };
    const record = await recorder.run(aRequest(Uint32Array.of(0, 1), { stop }));
    assert.deepEqual(record.tokens, [2, 2]);
    assert.equal(record.finish, "stop");
  }));

void test("echo: a higher priority goes before those that wait", () =>
  withEngine(new EchoEngine({ ...CONFIG, maxSequences: 1 }), async (recorder) => {
    const order: number[] = [];
    const streamIds = [0, 0, 5].map((priority) => recorder.submit(aRequest(aPrompt(3), { priority })));
    await recorder.until(() => {
      for (const id of streamIds) if (recorder.record(id).finish !== undefined && !order.includes(id)) order.push(id);
      return order.length === 3;
    }, "all ends");
    assert.deepEqual(order, [streamIds[2], streamIds[0], streamIds[1]]);
  }));

void test("echo: a small cache evicts the oldest blocks, children first, and says so", () =>
  withEngine(new EchoEngine({ ...CONFIG, contextLength: 32, maxSequences: 2 }), async (recorder) => {
    // 16 blocks in all; each prompt takes 7.
    const prompts = [1, 2, 3, 1].map((salt) => aPrompt(28).map((id) => id + salt));
    const cachedTokens: (number | undefined)[] = [];
    for (const prompt of prompts) {
      const record = await recorder.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      cachedTokens.push(record.first?.cachedTokens);
      const load = recorder.engine.load();
      assert.equal(replayKvEvents(recorder.kvEvents).size, load.activeBlocks + load.cachedBlocks);
      assert.ok(load.activeBlocks + load.cachedBlocks <= load.totalBlocks);
    }
    // The third prompt took 5 of the first one's blocks, from its end.
    assert.deepEqual(cachedTokens, [0, 0, 0, 8]);
  }));

void test("echo: with a step time it waits on its clock", async () => {
  const clock = new ManualClock();
  await withEngine(new EchoEngine({ ...CONFIG, stepMs: 10 }, { clock }), async (recorder) => {
    const streamId = recorder.submit(aRequest(aPrompt(3), { stop: { maxTokens: 3 } }));
    await recorder.until(() => recorder.record(streamId).tokens.length === 1, "the first token");
    assert.equal(clock.pendingTimerCount, 1);
    clock.advance(10);
    assert.equal(recorder.record(streamId).tokens.length, 2);
    clock.advance(9);
    assert.equal(recorder.record(streamId).finish, undefined);
    clock.advance(1);
    assert.equal(recorder.record(streamId).finish, "length");
  });
});
