import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { TrtllmEngineConfig } from "../config.ts";
import { aRequest } from "../engine.recorder.ts";
import type { TransferTicket } from "../base.ts";
import { OPTIONS, SIZES, promptOf } from "../foreign/faults.battery.ts";
import { EngineWatcher, withEngine } from "../foreign/fixtures/engine-watcher.ts";
import { FakeTrtllm } from "./fixtures/fake-trtllm.ts";
import { createTrtllmEngine } from "./trtllm-engine.ts";
import { rawObject } from "./trtllm-transfer.ts";

/** TensorRT-LLM's context and generation servers as the two legs of a request. Over fake servers, never real ones. */
const LIMIT = { timeout: 60_000 };

function configOf(url: string, role: "agg" | "prefill" | "decode"): TrtllmEngineConfig {
  return {
    kind: "trtllm",
    url,
    role,
    vocabularySize: 4_096,
    startTimeoutMs: 10_000,
    kvEvents: false,
    maxSequences: 8,
    maxBatchedTokens: 512,
    contextLength: 512,
    blockSizeTokens: 16,
    metricsIntervalMs: 20,
  };
}

describe("TensorRT-LLM split over two servers", () => {
  test(
    "what the context server said reaches the generation server as it was, which answers from the first token on",
    LIMIT,
    async () => {
      const fakes = ["agg", "prefill", "decode"].map(() => new FakeTrtllm(SIZES));
      const [whole, prefill, decode] = await Promise.all(
        (["agg", "prefill", "decode"] as const).map(async (role, i) =>
          createTrtllmEngine(configOf(await fakes[i]!.listen(), role), OPTIONS),
        ),
      );
      const request = aRequest(promptOf(40), { stop: { maxTokens: 6 } });
      let wanted: readonly number[] = [];
      await withEngine(whole!, async (watcher) => void (wanted = (await watcher.run({ ...request })).tokens));
      const [one, two] = [new EngineWatcher(prefill!), new EngineWatcher(decode!)];
      assert.equal((await one.start()).kvConnector, "trtllm");
      await two.start();

      const first = one.submitBy((id) => prefill!.transfer!.submitPrefill(id, { ...request }));
      assert.equal(first.result, undefined, "the ticket comes with the answer");
      let ticket: TransferTicket | undefined;
      await one.until(() => {
        if (one.record(first.id).finish === undefined) return false;
        ticket ??= prefill!.transfer!.takeTicket(first.id);
        return true;
      }, "the context server's word");
      assert.equal(one.record(first.id).finish, "length");
      const carried = JSON.parse(JSON.stringify(ticket)) as TransferTicket;
      const second = two.submitBy((id) => decode!.transfer!.submitDecode(id, { ...request }, carried));
      await two.ended([second.id]);
      assert.deepEqual([two.record(second.id).tokens, two.record(second.id).finish], [wanted, "length"]);
      const kinds = [1, 2].map((i) => fakes[i]!.requests.at(-1)!.body.disaggregated_params?.request_type);
      assert.deepEqual(kinds, ["context_only", "generation_only"]);

      // Used up: said as a failure of the engine's, so that the worker computes it whole.
      const again = two.submitBy((id) => decode!.transfer!.submitDecode(id, { ...request }, carried));
      await two.ended([again.id]);
      assert.equal(two.record(again.id).error?.reason, "engine-failed");
      assert.deepEqual((await two.run({ ...request })).tokens, wanted, "whole requests it does as any server");
      await Promise.all([one.stop(), two.stop()]);
      await Promise.all(fakes.map((fake) => fake.close()));
    },
  );

  test("an object out of a text, as it stands there", () => {
    const text = '{"a":[{"p": {"n":9007199254740993,"s":"}\\"{","o":{"x":1}},"q":2}]}';
    assert.equal(rawObject(text, "p"), '{"n":9007199254740993,"s":"}\\"{","o":{"x":1}}');
    assert.equal(rawObject('{"p":null}', "p"), undefined);
    assert.equal(rawObject('{"p":{"a":1', "p"), undefined);
  });
});
