import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import { TrtllmEventAdapter, decodeTrtllmEvents } from "./trtllm-events.ts";
import { VllmEventMapper } from "./vllm-event-mapper.ts";

/** Events in the form of TensorRT-LLM's KVCacheEventSerializer (`_utils.py`), blocks of four tokens. */
const block = (hash: string, tokens: readonly number[], level = 0, extra = 0): string =>
  `{"type":"stored_block","block_hash":${hash},"tokens":[${tokens.map((id) => `{"type":"unique_token","token_id":${id},"token_extra_id":${extra}}`).join(",")}],"cache_level":${level},"priority":35,"mm_keys":[]}`;
const stored = (parent: string, ...blocks: readonly string[]): string =>
  `{"type":"stored","parent_hash":${parent},"blocks":[${blocks.join(",")}]}`;

function mapped(...data: readonly string[]) {
  const text = `[${data.map((one, id) => `{"event_id":${id},"data":${one},"window_size":512}`).join(",")}]`;
  const adapter = new TrtllmEventAdapter(4);
  const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
  const events = decodeTrtllmEvents(text).flatMap(({ event }) => adapter.adapt(event));
  return { events: mapper.map({ dpRank: 0, events }), leftOut: Object.fromEntries(mapper.leftOut) };
}

describe("TensorRT-LLM's KV events", () => {
  test("a chain in one event is the chain by our hashes; hashes beyond 53 bits stay apart", () => {
    const [one, two] = ["9223372036854775809", "9223372036854775810"];
    assert.equal(Number(one), Number(two), "as numbers they are one");
    const { events, leftOut } = mapped(stored("null", block(one, [1, 2, 3, 4]), block(two, [5, 6, 7, 8])), `{"type":"removed","block_hashes":[${two}]}`); // prettier-ignore
    const { sequenceHashes } = hashBlocks(Uint32Array.of(1, 2, 3, 4, 5, 6, 7, 8), 4, blockHashSeed());
    const hashesOf = (type: string) =>
      events.filter((event) => event.type === type).flatMap((event) => ("sequenceHashes" in event ? [...event.sequenceHashes] : [])); // prettier-ignore
    assert.deepEqual(hashesOf("stored"), [...sequenceHashes]);
    assert.deepEqual(hashesOf("removed"), [...sequenceHashes.subarray(2)]);
    assert.deepEqual(leftOut, {});
  });

  test("down to host memory and back, and gone from there", () => {
    const { events, leftOut } = mapped(
      `{"type":"created","num_blocks_per_cache_level":[8,8]}`,
      stored("null", block("7", [1, 2, 3, 4])),
      `{"type":"updated","block_hash":7,"cache_level":{"type":"event_diff","new_value":1,"old_value":0},"priority":null}`,
      `{"type":"removed","block_hashes":[7]}`,
    );
    const said = events.map((event) => (event.type === "cleared" ? "cleared" : `${event.type} ${event.tier}`));
    assert.deepEqual(said, ["cleared", "stored device", "stored host", "removed device", "removed host"]);
    assert.deepEqual(leftOut, {});
  });

  test("what is no whole block of text is left out, with what follows it", () => {
    const { events } = mapped(
      stored("null", block("1", [1, 2, 3, 4]), block("2", [5, 6])),
      stored("1", block("3", [5, 6, 7, 8], 0, 9), block("4", [9, 9, 9, 9])),
    );
    assert.equal(events.length, 1);
  });

  test("what is no list of events is refused", () => {
    for (const text of ["{}", "[1]", '[{"event_id":"a","data":{}}]', "nothing"]) {
      assert.throws(() => decodeTrtllmEvents(text), { reason: "malformed-frame" });
    }
  });
});
