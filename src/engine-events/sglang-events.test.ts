import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { pack, type Value } from "./msgpack-writer.fixture.ts";
import { VllmEventMapper } from "./vllm-event-mapper.ts";
import { decodeVllmBatch, type VllmStored } from "./vllm-events.ts";

/** KV events in the forms that SGLang has had (disaggregation/kv_events.py and mem_cache/events.py), pages of four tokens. */
const HASH = -3_488_128_144_981_237_669n;

function decoded(event: Value) {
  return decodeVllmBatch(pack([1.5, [event], 1]));
}

function storedOf(event: Value): VllmStored {
  const batch = decoded(event);
  assert.equal(batch.dpRank, 1);
  assert.equal(batch.events[0]!.type, "stored");
  return batch.events[0] as VllmStored;
}

describe("SGLang's KV events", () => {
  test("tagged arrays: without a medium, with one, with a map behind it", () => {
    const base: readonly Value[] = ["BlockStored", [HASH], null, [1, 2, 3, 4], 4, null];
    const [short, medium, salted] = [base, [...base, "GPU"], [...base, "GPU", { cache_salt: "tenant" }]].map(storedOf);
    const unsigned = storedOf(["BlockStored", [BigInt.asUintN(64, HASH)], null, [1, 2, 3, 4], 4, null]);
    assert.equal(short!.hashes.length, 2, "a pair of words");
    assert.deepEqual(short!.hashes, unsigned.hashes, "signed and unsigned are one name");
    assert.deepEqual([short!.medium, medium!.medium, salted!.medium], [undefined, "GPU", "GPU"]);
    assert.deepEqual([short!.cacheSalt, medium!.cacheSalt, salted!.cacheSalt], [undefined, undefined, "tenant"]);
    assert.deepEqual([medium!.loraName, salted!.loraName], [undefined, undefined]);
  });

  test("maps: what is none is left out, several pages in one, the salt and the adapter by their names", () => {
    const event = storedOf({
      type: "BlockStored",
      block_hashes: [HASH, 7],
      token_ids: [1, 2, 3, 4, 5, 6, 7, 8],
      block_size: 4,
      medium: "GPU",
      cache_salt: "tenant",
      session_id: "s",
      lora_name: "sql",
      namespaced_block_hashes: [1, 2],
    });
    assert.deepEqual(
      [event.hashes.length, event.parent, event.cacheSalt, event.loraName],
      [4, undefined, "tenant", "sql"],
    );
  });

  test("pages in host memory and on disk are those tiers; a cleared cache at the start clears nothing else", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
    const all: readonly Value[] = [
      ["AllBlocksCleared"],
      ["BlockStored", [1], null, [1, 2, 3, 4], 4, null, "GPU"],
      ["BlockStored", [1], null, [1, 2, 3, 4], 4, null, "CPU_PINNED"],
      ["BlockRemoved", [1], "GPU"],
      ["BlockStored", [1], null, [1, 2, 3, 4], 4, null, "DISK"],
    ];
    const said = mapper.map(decodeVllmBatch(pack([1, all, 0])));
    const shown = said.map((event) => (event.type === "cleared" ? "cleared" : `${event.type} ${event.tier}`));
    assert.deepEqual(shown, ["cleared", "stored device", "stored host", "removed device", "stored disk"]);
    assert.equal(mapper.leftOut.size, 0);
  });

  test("EAGLE's pairs, page by page", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 2 });
    const page = (hash: number, parent: Value, from: number): Value =>
      ["BlockStored", [hash], parent, [[from, from + 1], [from + 1, from + 2]], 2, null, "GPU"]; // prettier-ignore
    const events = mapper.map(decodeVllmBatch(pack([1, [page(1, null, 10), page(2, 1, 12)], 0])));
    assert.deepEqual(events.map(({ type }) => type), ["stored", "stored"]); // prettier-ignore
    assert.equal(mapper.leftOut.size, 0);
  });
});
