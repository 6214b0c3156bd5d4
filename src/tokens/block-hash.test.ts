import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import fc from "fast-check";
import {
  blockHashSeed,
  hashBlocks,
  hashBlocksInTypeScript,
  hashToHex,
  nextSequenceHash,
  type BlockHashes,
  type HashPair,
} from "./index.ts";
import { tryHashBlocksInWasm } from "./xxh3-wasm.ts";

const firstTokens = (count: number): Uint32Array => Uint32Array.from({ length: count }, (_, i) => i);

function hexOf(hashes: Uint32Array): string[] {
  return Array.from({ length: hashes.length / 2 }, (_, i) => hashToHex(hashes[2 * i]!, hashes[2 * i + 1]!));
}

interface GoldenCase {
  block_size: number;
  tokens: number[];
  lora_name?: string;
  cache_namespace?: string;
  is_eagle?: boolean;
  local_hashes: string[];
}

void test("block hash: all golden cases of Dynamo's own hasher", () => {
  const file = new URL("../../test/fixtures/golden-block-hashes.json", import.meta.url);
  const { cases } = JSON.parse(readFileSync(file, "utf8")) as { cases: GoldenCase[] };
  assert.equal(cases.length, 83);
  for (const golden of cases) {
    const seed = blockHashSeed({
      loraName: golden.lora_name ?? "",
      cacheNamespace: golden.cache_namespace ?? "",
    });
    const options = { eagle: golden.is_eagle ?? false };
    const { localHashes } = hashBlocks(Uint32Array.from(golden.tokens), golden.block_size, seed, options);
    assert.deepEqual(hexOf(localHashes), golden.local_hashes);
  }
});

void test("block hash: golden chains", () => {
  const chains: [number, number, { loraName?: string; cacheNamespace?: string }, string][] = [
    [16, 4, {}, "7ee2cbedc694ab46 83fb702f20e2ad65 ebe58e326790467b e9036fce74242bb5"],
    [32, 16, {}, "d47a8f41c833328a bf15dffb16447f38"],
    [128, 64, {}, "304d910e689e42bf 23bd5ef232e90ecb"],
    [16, 4, { loraName: "my-lora" }, "9dc086fc4e1faa0b 0f35a42d6142a7f6 f78a30754b3d5d99 451c978646bc00f9"],
    [16, 4, { cacheNamespace: "tenant-a" }, "ec0e52f22b7e6f3e fdaef86913237748 cb97f28268884e3c 35dd41ab98b2e9ab"],
  ];
  for (const [count, blockSize, identity, expected] of chains) {
    const { sequenceHashes } = hashBlocks(firstTokens(count), blockSize, blockHashSeed(identity));
    assert.equal(hexOf(sequenceHashes).join(" "), expected);
  }
  assert.equal(hashToHex(...blockHashSeed({ loraName: "my-lora" })), "b2041cc45cbcfedd");
  assert.equal(hashToHex(...blockHashSeed({ cacheNamespace: "tenant-a" })), "1b095b6229544fb6");
  assert.deepEqual(blockHashSeed({ loraName: "", cacheNamespace: "" }), [1337, 0]);
});

void test("block hash: multimodal hashes follow the tokens, ascending, whatever their order", () => {
  const large: HashPair = [0x76543210, 0xfedcba98];
  for (const hashes of [
    [[5, 0] as const, large],
    [large, [5, 0] as const],
  ]) {
    const options = { multimodalHashes: [hashes, undefined] };
    assert.deepEqual(hexOf(hashBlocks(firstTokens(8), 4, blockHashSeed(), options).localHashes), [
      "bc70f97038de2bbc",
      "a8416cfd935bdb13",
    ]);
  }
});

void test("block hash: WebAssembly and TypeScript agree for every block size, window, seed and parent", () => {
  fc.assert(
    fc.property(
      fc.uint32Array({ maxLength: 1500 }),
      fc.integer({ min: 1, max: 300 }),
      fc.boolean(),
      fc.tuple(fc.nat(0xffffffff), fc.nat(0xffffffff)),
      fc.option(fc.tuple(fc.nat(0xffffffff), fc.nat(0xffffffff)), { nil: undefined }),
      (tokenIds, blockSizeTokens, eagle, seed, parent) => {
        const windowTokens = blockSizeTokens + (eagle ? 1 : 0);
        const blockCount = Math.max(0, Math.floor((tokenIds.length - windowTokens) / blockSizeTokens) + 1);
        const shape = { blockSizeTokens, windowTokens, seed, parent };
        const [fast, plain] = [emptyHashes(blockCount), emptyHashes(blockCount)];
        assert.ok(tryHashBlocksInWasm(tokenIds, shape, fast), "this platform has WebAssembly");
        hashBlocksInTypeScript(tokenIds, shape, plain);
        assert.deepEqual(fast, plain);
        const options = { eagle, ...(parent === undefined ? {} : { parent }) };
        assert.deepEqual(hashBlocks(tokenIds, blockSizeTokens, seed, options), plain);
      },
    ),
    { numRuns: 300 },
  );
});

function emptyHashes(blockCount: number): BlockHashes {
  return {
    blockCount,
    localHashes: new Uint32Array(2 * blockCount),
    sequenceHashes: new Uint32Array(2 * blockCount),
  };
}

void test("block hash: sequences longer than one chunk are one chain", () => {
  const tokenIds = firstTokens(150_001);
  for (const blockSizeTokens of [1, 7, 16, 40_000]) {
    const whole = hashBlocks(tokenIds, blockSizeTokens, blockHashSeed());
    const plain = emptyHashes(whole.blockCount);
    const shape = { blockSizeTokens, windowTokens: blockSizeTokens, seed: blockHashSeed(), parent: undefined };
    hashBlocksInTypeScript(tokenIds, shape, plain);
    assert.equal(whole.blockCount, Math.floor(150_001 / blockSizeTokens));
    assert.deepEqual(whole, plain);
  }
});

void test("block hash: a block larger than a chunk is hashed all the same", () => {
  const tokenIds = firstTokens(70_000);
  assert.equal(hashBlocks(tokenIds, 70_000, blockHashSeed()).blockCount, 1);
  assert.equal(hashBlocks(tokenIds, 70_000, blockHashSeed(), { eagle: true }).blockCount, 0);
});

void test("block hash: a chain goes on from its parent, one block at a time", () => {
  const tokenIds = firstTokens(80);
  const whole = hashBlocks(tokenIds, 16, blockHashSeed());
  const [lo, hi] = [whole.sequenceHashes[4]!, whole.sequenceHashes[5]!];
  const rest = hashBlocks(tokenIds.subarray(48), 16, blockHashSeed(), { parent: [lo, hi] });
  assert.deepEqual(rest.sequenceHashes, whole.sequenceHashes.subarray(6));
  const step = new Uint32Array(2);
  nextSequenceHash(lo, hi, whole.localHashes[6]!, whole.localHashes[7]!, step, 0);
  assert.deepEqual(step, whole.sequenceHashes.subarray(6, 8));
});

void test("block hash: only complete blocks count", () => {
  for (const [tokens, blocks] of [
    [0, 0],
    [15, 0],
    [16, 1],
    [31, 1],
    [32, 2],
  ] as const) {
    assert.equal(hashBlocks(firstTokens(tokens), 16, blockHashSeed()).blockCount, blocks);
  }
  assert.throws(() => hashBlocks(firstTokens(4), 0, blockHashSeed()), /at least one token/);
});
