import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, it } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import type { KvEvent, KvStored } from "../protocol/index.ts";
import { blockHashSeed, hashBlocks, tryHashFromHex } from "../tokens/index.ts";
import { FlatKvIndex, OverlapScores } from "../router/indexer/index.ts";
import { pack, type Value } from "./msgpack-writer.fixture.ts";
import { MsgpackCursor, MsgpackError } from "./msgpack-cursor.ts";
import { NaiveVllmEventMapper } from "./naive-vllm-event-mapper.ts";
import { VllmEventMapper } from "./vllm-event-mapper.ts";
import { decodeVllmBatch, decodeVllmMessage, type VllmEvent, type VllmStored } from "./vllm-events.ts";

const FIXTURE = join(import.meta.dirname, "../../test/fixtures/vllm-kv-events.json");
const { samples } = JSON.parse(readFileSync(FIXTURE, "utf8")) as {
  samples: { encoding: string; hashes: string; messages: string[][] }[];
};
const isMalformed = (error: unknown): boolean => error instanceof DynamoError && error.reason === "malformed-frame";

function framesOf(message: readonly string[]): Buffer[] {
  return message.map((hex) => Buffer.from(hex, "hex"));
}

function batchOf(...events: Value[]): Buffer {
  return pack([1.5, events, 0]);
}

/** A stored event in the form of arrays. */
/** Removals one by one, however they were put together. */
function oneByOne(events: readonly KvEvent[]): KvEvent[] {
  return events.flatMap((event): KvEvent[] => {
    if (event.type !== "removed") return [event];
    const { sequenceHashes } = event;
    return Array.from({ length: sequenceHashes.length / 2 }, (_, i) => ({ ...event, sequenceHashes: sequenceHashes.slice(2 * i, 2 * i + 2) }));
  });
} // prettier-ignore

function stored(hashes: Value[], parent: Value, tokens: Value[], rest: { size?: number; tail?: Value[] } = {}): Value {
  return ["BlockStored", hashes, parent, tokens, rest.size ?? 4, null, "GPU", null, ...(rest.tail ?? [])];
}

function mapped(mapper: VllmEventMapper, ...events: Value[]): KvEvent[] {
  return mapper.map(decodeVllmBatch(batchOf(...events)));
}

describe("msgpack cursor", () => {
  it("reads token ids in every form, up to the last byte, and refuses what is none or is cut off", () => {
    const forms: [string, number][] = [["05", 5], ["7f", 127], ["cc80", 128], ["cdffff", 65_535], ["ce00010000", 65_536], ["ceffffffff", 2 ** 32 - 1], ["cf0000000000000009", 9]]; // prettier-ignore
    fc.assert(
      fc.property(fc.array(fc.constantFrom(...forms), { minLength: 1, maxLength: 40 }), (ids) => {
        const bytes = Buffer.from(ids.map(([hex]) => hex).join(""), "hex");
        const out = new Uint32Array(ids.length);
        const cursor = new MsgpackCursor(bytes);
        cursor.u32s(out, 0);
        assert.deepEqual([...out], ids.map(([, id]) => id)); // prettier-ignore
        assert.equal(cursor.remaining, 0);
        assert.throws(() => new MsgpackCursor(bytes.subarray(0, -1)).u32s(out, 0), MsgpackError);
      }),
    );
    assert.throws(() => new MsgpackCursor(Buffer.from("d0ff", "hex")).u32s(new Uint32Array(1), 0), MsgpackError);
  });

  it("words and names: the same as text and 64-bit integers", () => {
    fc.assert(
      fc.property(fc.array(fc.string({ unit: "grapheme", maxLength: 12 }), { maxLength: 20 }), (texts) => {
        for (const text of [...texts, ...texts]) {
          const utf8 = Buffer.from(text);
          const bytes = utf8.length < 32 ? Buffer.concat([Buffer.of(0xa0 | utf8.length), utf8]) : pack(text);
          assert.equal(new MsgpackCursor(bytes).word(1_000), text);
        }
      }),
    );
    const halves = (hex: string): number[] => {
      const out: number[] = [];
      new MsgpackCursor(Buffer.from(hex, "hex")).pushHash(out, 64);
      return out;
    };
    assert.deepEqual(halves("cf0000000100000002"), [2, 1]);
    assert.deepEqual(halves("d3fffffffffffffffe"), halves("cffffffffffffffffe"));
    assert.deepEqual(halves("fe"), halves("cffffffffffffffffe"));
    assert.deepEqual(halves("07"), [7, 0]);
    assert.deepEqual(halves("c40a0000ffffffffffffffff"), halves("cfffffffffffffffff"));
    assert.throws(() => halves("c403010203"), MsgpackError);
  });

  it("reads every integer form, signed and unsigned, and refuses what does not fit", () => {
    const values = [0n, 127n, 128n, 255n, 65_535n, 2n ** 32n, 2n ** 63n, 2n ** 64n - 1n, -1n, -(2n ** 63n)];
    for (const value of values) assert.equal(new MsgpackCursor(pack(value)).integer64(), value);
    for (const [hex, value] of [
      ["cc80", 128n],
      ["cd0100", 256n],
      ["ce00010000", 65_536n],
      ["d0ff", -1n],
      ["d1ff00", -256n],
      ["d2ffff0000", -65_536n],
      ["e0", -32n],
    ] as const) {
      assert.equal(new MsgpackCursor(Buffer.from(hex, "hex")).integer64(), value);
    }
    assert.equal(new MsgpackCursor(pack(5n)).u32(), 5);
    for (const wrong of [2n ** 32n, -1n]) assert.throws(() => new MsgpackCursor(pack(wrong)).u32(), MsgpackError);
    assert.throws(() => new MsgpackCursor(pack(2n ** 60n)).integer(), MsgpackError);
    assert.throws(() => new MsgpackCursor(pack("x")).integer64(), MsgpackError);
  });

  it("skips any value whole, extensions included, and ends where it ends", () => {
    const value: fc.Arbitrary<Value> = fc.letrec<{ value: Value }>((tie) => ({
      value: fc.oneof(
        { maxDepth: 3 },
        fc.constant(null),
        fc.boolean(),
        fc.bigInt({ min: -(2n ** 63n), max: 2n ** 64n - 1n }),
        fc.double(),
        fc.string(),
        fc.uint8Array(),
        fc.array(tie("value"), { maxLength: 4 }),
        fc.dictionary(fc.string(), tie("value"), { maxKeys: 4 }),
      ),
    })).value;
    fc.assert(
      fc.property(value, (one) => {
        const bytes = pack(one);
        const cursor = new MsgpackCursor(Buffer.concat([bytes, Buffer.of(0x07)]));
        cursor.skip();
        assert.equal(cursor.integer(), 7);
        for (let length = 0; length < bytes.length; length++) {
          assert.throws(() => new MsgpackCursor(bytes.subarray(0, length)).skip(), MsgpackError);
        }
      }),
      { numRuns: 200 },
    );
    for (const hex of [
      "d40111",
      "d5011122",
      "d801" + "00".repeat(16),
      "c70301112233",
      "c8000201aabb",
      "c90000000101aa",
    ]) {
      const cursor = new MsgpackCursor(Buffer.from(`${hex}07`, "hex"));
      assert.equal(cursor.kind(), "extension");
      cursor.skip();
      assert.equal(cursor.integer(), 7);
    }
  });

  it("lengths that do not fit, nesting without end, bad UTF-8 and the unused tag are refused", () => {
    for (const hex of ["ddffffffff", "dfffffffff", "dbffffffff00", "c6ffffffff00", "c1", "91", "81a161", ""]) {
      assert.throws(() => new MsgpackCursor(Buffer.from(hex, "hex")).skip(), MsgpackError, hex);
    }
    assert.throws(() => new MsgpackCursor(Buffer.alloc(100_000, 0x91)).skip(), MsgpackError);
    assert.throws(() => new MsgpackCursor(Buffer.from("a2fffe", "hex")).text(10), MsgpackError);
    assert.throws(() => new MsgpackCursor(pack("long")).text(3), MsgpackError);
    assert.throws(() => new MsgpackCursor(pack(Buffer.alloc(10))).bytes(9), MsgpackError);
  });
});

describe("vLLM events", () => {
  const seed = blockHashSeed();
  const main = hashBlocks(
    Uint32Array.from({ length: 12 }, (_, i) => 1_000 + i),
    4,
    seed,
  );
  const lora = hashBlocks(Uint32Array.of(7, 8, 9, 200_000), 4, blockHashSeed({ loraName: "my-lora" }));
  const salted = hashBlocks(Uint32Array.of(5, 6, 7, 8), 4, blockHashSeed({ cacheNamespace: "tenant-a" }), {
    multimodalHashes: [[tryHashFromHex("aa".repeat(8))!]],
  });

  for (const { encoding, hashes, messages } of samples) {
    it(`a recorded history in the form of ${encoding} with ${hashes} hashes leads to the same index`, () => {
      const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
      const index = new FlatKvIndex({ maxBytes: 4 * 2 ** 20 });
      const rank = index.rankOf("worker", 1);
      for (const [at, message] of messages.entries()) {
        const decoded = decodeVllmMessage(framesOf(message));
        assert.equal(decoded.sequence, at === messages.length - 1 ? -1 : at);
        if (decoded.events.length > 0) assert.equal(decoded.dpRank, 1);
        for (const event of mapper.map(decoded)) assert.equal(index.apply(rank, event), "ok");
      }
      const overlap = (sequenceHashes: Uint32Array, tier: "device" | "host" = "device"): number => {
        const scores = new OverlapScores();
        index.findMatches(sequenceHashes, sequenceHashes.length / 2, scores);
        return scores[tier][rank]!;
      };
      assert.equal(overlap(main.sequenceHashes), 2, "the third block was removed");
      assert.equal(overlap(lora.sequenceHashes), 1);
      assert.equal(overlap(salted.sequenceHashes), 1);
      const other = hashBlocks(Uint32Array.of(1, 2, 3, 4), 4, seed);
      assert.equal(overlap(other.sequenceHashes), 0, "a sliding window is no prefix");
      const memberships = index
        .dump(rank)
        .reduce((sum, event) => sum + (event.type === "stored" ? event.sequenceHashes.length / 2 : 0), 0);
      assert.equal(memberships, 5, "two of the chain, one of them in host memory too, LoRA, salted");
      assert.deepEqual(Object.fromEntries(mapper.leftOut), { "other-group": 2 });
      assert.equal(mapper.blockCount, 4);
    });
  }

  it("signed and unsigned integers of the same bits are one name", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
    mapped(mapper, stored([2n ** 64n - 5n], null, [1, 2, 3, 4]));
    const [removed] = mapped(mapper, ["BlockRemoved", [-5n], "GPU"]);
    assert.equal(removed!.type, "removed");
    assert.equal(mapper.blockCount, 0);
  });

  it("pairs of tokens, as with Eagle, are hashed as windows of one token more", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
    const tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    const pairs = tokens.slice(0, 8).map((token, i) => [token, tokens[i + 1]!]);
    const [event] = mapped(mapper, stored([1, 2], null, pairs));
    const expected = hashBlocks(Uint32Array.from(tokens), 4, seed, { eagle: true });
    assert.deepEqual((event as KvStored).sequenceHashes, expected.sequenceHashes);
  });

  it("a continued chain goes on from its parent, with the salt of its first block", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
    mapped(mapper, stored([1], null, [1, 2, 3, 4], { tail: [[["dynamo-cache-salt:t"]]] }));
    const [event] = mapped(mapper, stored([2], 1, [5, 6, 7, 8])) as [KvStored];
    const whole = hashBlocks(Uint32Array.of(1, 2, 3, 4, 5, 6, 7, 8), 4, blockHashSeed({ cacheNamespace: "t" }));
    assert.deepEqual(event.sequenceHashes, whole.sequenceHashes.slice(2));
    assert.deepEqual(event.parentHash, [...whole.sequenceHashes.subarray(0, 2)]);
    assert.equal(event.startBlock, 1);
  });

  it("an offload tier may name blocks without their tokens, if they are known", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
    mapped(mapper, stored([1, 2], null, [1, 2, 3, 4, 5, 6, 7, 8]));
    const placeholder = {
      type: "BlockStored",
      block_hashes: [2, 77],
      parent_block_hash: null,
      token_ids: [],
      block_size: 0,
      medium: "CPU",
    };
    const events = mapped(mapper, placeholder) as KvStored[];
    assert.equal(events.length, 1);
    assert.equal(events[0]!.tier, "host");
    const known = hashBlocks(Uint32Array.of(1, 2, 3, 4, 5, 6, 7, 8), 4, seed).sequenceHashes;
    assert.deepEqual(events[0]!.sequenceHashes, known.slice(2));
    assert.deepEqual(events[0]!.parentHash, [known[0], known[1]]);
    assert.equal(mapper.leftOut.get("unknown-block"), 1);
    // The block lives on in host memory when the device lets it go.
    mapped(mapper, ["BlockRemoved", [2], "GPU"]);
    assert.equal(mapper.blockCount, 2);
    mapped(mapper, ["BlockRemoved", [2], "CPU"]);
    assert.equal(mapper.blockCount, 1);
  });

  it("a name that comes to mean other tokens takes the old block out first", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
    const [before] = mapped(mapper, stored([1], null, [1, 2, 3, 4])) as [KvStored];
    const events = mapped(mapper, stored([1], null, [9, 9, 9, 9]));
    assert.deepEqual(
      events.map((event) => event.type),
      ["removed", "stored"],
    );
    assert.deepEqual((events[0] as KvStored).sequenceHashes, before.sequenceHashes);
  });

  it("what cannot be indexed is left out and counted by its cause", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4, maxBlocks: 3 });
    const map = {
      type: "BlockStored",
      block_hashes: [1],
      parent_block_hash: null,
      token_ids: [1, 2, 3, 4],
      block_size: 4,
    };
    const cases: [string, Value][] = [
      ["block-size", { ...map, block_size: 16 }],
      ["contradiction", { ...map, token_ids: [1, 2, 3] }],
      ["contradiction", { ...map, block_hashes: [1, 1], token_ids: [1, 2, 3, 4, 5, 6, 7, 8] }],
      ["contradiction", { ...map, parent_block_hash: 1 }],
      ["unknown-parent", { ...map, parent_block_hash: 99 }],
      ["remote", { ...map, locality: "REMOTE" }],
      ["other-group", { ...map, group_idx: 2 }],
      ["other-group", { ...map, group_idx: 0, kv_cache_spec_kind: "mamba" }],
      ["unknown-medium", { ...map, medium: "TAPE" }],
      ["unknown-event", ["BlockPainted", [1]]],
      ["unknown-block", ["BlockRemoved", [5], "GPU"]],
      ["no-room", { ...map, block_hashes: [1, 2, 3, 4], token_ids: Array.from({ length: 16 }, (_, i) => i) }],
    ];
    for (const [cause, event] of cases) {
      mapper.leftOut.clear();
      assert.deepEqual(mapped(mapper, event), []);
      assert.deepEqual([...mapper.leftOut.keys()], [cause]);
    }
    assert.equal(mapper.blockCount, 0);
  });

  it("fields and events that a newer engine added are ignored, in both forms", () => {
    const tail: Value[] = [null, 0, "full_attention", null, "LOCAL", { deep: [1, { x: null }] }, "session", 1.5, true];
    const asArray = decodeVllmBatch(pack([1, [stored([1], null, [1, 2, 3, 4], { tail })], 2, "more", { a: 1 }]));
    assert.equal(asArray.dpRank, 2);
    assert.deepEqual((asArray.events[0] as VllmStored).group, { index: 0, kind: "full_attention", locality: "LOCAL" });
    const fields = {
      new_field: [[]],
      type: "BlockStored",
      block_hashes: [Buffer.alloc(32, 3)],
      parent_block_hash: null,
      token_ids: [1, 2, 3, 4],
      block_size: 4,
      medium: "GPU",
      x: { y: 1 },
    };
    const asMap = decodeVllmBatch(pack({ ts: 1, version: 9, events: [fields], data_parallel_rank: null }));
    assert.deepEqual((asMap.events[0] as VllmStored).hashes, [0x03030303, 0x03030303]);
    assert.equal(asMap.dpRank, 0);
  });

  it("hostile frames and payloads are refused: truncated, prolonged, wrong types, lengths without end", () => {
    for (const { messages } of samples) {
      for (const message of messages.slice(0, -1)) {
        const [topic, sequence, payload] = framesOf(message) as [Buffer, Buffer, Buffer];
        for (let length = 0; length < payload.length; length++) {
          assert.throws(() => decodeVllmBatch(payload.subarray(0, length)), isMalformed);
        }
        assert.throws(() => decodeVllmBatch(Buffer.concat([payload, Buffer.of(0)])), isMalformed);
        assert.throws(() => decodeVllmMessage([topic, sequence.subarray(1), payload]), isMalformed);
        assert.throws(() => decodeVllmMessage([topic, sequence]), isMalformed);
        assert.throws(() => decodeVllmMessage([topic, sequence, payload, payload]), isMalformed);
      }
    }
    const wrong: Value[] = [
      [1],
      [1, [[]]],
      [1, [[5]]],
      [1, ["BlockStored"]],
      { ts: 1 },
      [1, [stored(["text"], null, [1])]],
      [1, [stored([1], null, [[1, 2, 3]])]],
      [1, [stored([1], null, [-1])]],
      [1, [stored([1], null, [2 ** 40])]],
      [1, [stored([Buffer.alloc(100)], null, [1])]],
      [1, [], 1_000_000],
      "text",
    ];
    for (const value of wrong) assert.throws(() => decodeVllmBatch(pack(value)), isMalformed);
    assert.throws(() => decodeVllmBatch(Buffer.from("93cb41d954fc40000000ddffffffff01", "hex")), isMalformed);
  });

  it("any sequence of events is mapped as by the plain mapper", () => {
    const name = fc.integer({ min: 1, max: 12 });
    const medium = fc.constantFrom("GPU", "CPU", null);
    const tokens = fc.array(fc.constantFrom(1, 200, 70_000, 2 ** 32 - 1), { minLength: 8, maxLength: 8 });
    const store = fc
      .tuple(fc.array(name, { minLength: 1, maxLength: 2 }), fc.option(name, { nil: null }), tokens, medium, fc.boolean())
      .map(([names, parent, ids, where, isPlaceholder]): Value => ["BlockStored", names, parent, isPlaceholder ? [] : ids.slice(0, 4 * names.length), 4, null, where, null]);
    const remove = fc.tuple(fc.array(name, { maxLength: 3 }), medium).map((event): Value => ["BlockRemoved", ...event]);
    const event = fc.oneof({ weight: 6, arbitrary: store }, { weight: 4, arbitrary: remove }, fc.constant<Value>(["AllBlocksCleared"]));
    fc.assert(
      fc.property(fc.array(fc.array(event, { maxLength: 6 }), { maxLength: 30 }), (batches) => {
        const options = { blockSizeTokens: 4, maxBlocks: 8 };
        const [fast, plain] = [new VllmEventMapper(options), new NaiveVllmEventMapper(options)];
        for (const events of batches) {
          const batch = decodeVllmBatch(pack([0, events, 0]));
          assert.deepEqual(oneByOne(fast.map(batch)), oneByOne(plain.map(batch)));
          assert.deepEqual(fast.leftOut, plain.leftOut);
          assert.equal(fast.blockCount, plain.blockCount);
        }
      }),
      { numRuns: 500 },
    );
  }); // prettier-ignore

  it("a thousand evictions in a row are one event, in their order; another tier begins a new one", () => {
    const mapper = new VllmEventMapper({ blockSizeTokens: 4 });
    const names = Array.from({ length: 1_000 }, (_, i) => i + 1);
    const ids = names.flatMap((id) => [id, id, id, id]);
    const [whole] = mapped(mapper, stored(names, null, ids)) as [KvStored];
    mapped(mapper, { type: "BlockStored", block_hashes: [1], parent_block_hash: null, token_ids: [], block_size: 0, medium: "CPU" });
    const removals: Value[] = names.toReversed().map((name): Value => ["BlockRemoved", [name], "GPU"]);
    const events = mapper.map(decodeVllmBatch(pack([0, [...removals, ["BlockRemoved", [1], "CPU"]], 0])));
    assert.equal(events.length, 2);
    const pairs = Array.from({ length: 1_000 }, (_, i) => [...whole.sequenceHashes.subarray(2 * i, 2 * i + 2)]);
    assert.deepEqual(events[0], { type: "removed", dpRank: 0, tier: "device", sequenceHashes: Uint32Array.from(pairs.toReversed().flat()) });
    assert.equal(mapper.blockCount, 0);
  }); // prettier-ignore

  it("any bytes are decoded or refused, and what is decoded is mapped without an exception", () => {
    const payloads = samples.flatMap(({ messages }) => messages.slice(0, -1).map((message) => framesOf(message)[2]!));
    const damaged = fc.tuple(
      fc.constantFrom(...payloads),
      fc.array(fc.tuple(fc.nat(400), fc.nat(255)), { maxLength: 4 }),
    );
    fc.assert(
      fc.property(damaged, ([payload, changes]) => {
        const bytes = Buffer.from(payload);
        for (const [at, value] of changes) bytes[at % bytes.length] = value;
        let events: readonly VllmEvent[] = [];
        try {
          const batch = decodeVllmBatch(bytes);
          events = batch.events;
          new VllmEventMapper({ blockSizeTokens: 4 }).map(batch);
        } catch (error) {
          assert.ok(isMalformed(error), String(error));
        }
        assert.ok(events.length <= bytes.length);
      }),
      { numRuns: 2_000 },
    );
  });
});
