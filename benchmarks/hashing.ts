import { blockHashSeed, hashBlocks, hashBlocksInTypeScript } from "../src/tokens/index.ts";

/**
 * Block hashing of one prompt: the WebAssembly version that `hashBlocks` takes, beside its TypeScript twin. Target: 25 us
 * for 10,000 tokens in blocks of 16.
 */
const TOKEN_COUNT = 10_000;
const CALLS_PER_ROUND = 20;
const ROUNDS = 50;

function measure(work: () => void): { bestUs: number; medianUs: number } {
  const rounds: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    const startMs = performance.now();
    for (let call = 0; call < CALLS_PER_ROUND; call++) work();
    rounds.push(((performance.now() - startMs) / CALLS_PER_ROUND) * 1_000);
  }
  rounds.sort((a, b) => a - b);
  return { bestUs: rounds[0]!, medianUs: rounds[ROUNDS >> 1]! };
}

export async function run(): Promise<void> {
  const tokenIds = Uint32Array.from({ length: TOKEN_COUNT }, (_, i) => (i * 7919) % 49_152);
  const seed = blockHashSeed();
  console.log(`block hashing, ${TOKEN_COUNT} tokens, us per prompt (best / median)`);
  for (const blockSizeTokens of [16, 32, 64, 128]) {
    const blockCount = Math.floor(TOKEN_COUNT / blockSizeTokens);
    const shape = { blockSizeTokens, windowTokens: blockSizeTokens, seed, parent: undefined };
    const out = {
      blockCount,
      localHashes: new Uint32Array(2 * blockCount),
      sequenceHashes: new Uint32Array(2 * blockCount),
    };
    const wasm = measure(() => hashBlocks(tokenIds, blockSizeTokens, seed));
    const twin = measure(() => hashBlocksInTypeScript(tokenIds, shape, out));
    console.log(
      `  block ${String(blockSizeTokens).padStart(3)}: WebAssembly ${wasm.bestUs.toFixed(1)} / ${wasm.medianUs.toFixed(1)}` +
        `, TypeScript ${twin.bestUs.toFixed(1)} / ${twin.medianUs.toFixed(1)}, ${(twin.bestUs / wasm.bestUs).toFixed(1)} times`,
    );
  }
  await Promise.resolve();
}

if (import.meta.main) await run();
