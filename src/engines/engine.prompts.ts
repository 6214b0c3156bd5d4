import assert from "node:assert/strict";

/**
 * The fixed set of prompts whose greedy text must not depend on how it came about: whole, from a cache, from a tier, split
 * over two workers. 10 to 3,000 tokens, a third of them around whole blocks of 16 tokens, some around the sizes at which
 * kernels and chunks change (64, 256, 512). Token ids by arithmetic: what follows such a text is nowhere clear, so near
 * ties are more frequent than in prose, and rounding shows.
 */
const LENGTHS = [
  10, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 47, 48, 49, 56, 63, 64, 65, 72, 79, 80, 81, 95, 96, 97, 100, 111, 113,
  127, 128, 129, 144, 145, 159, 161, 177, 200, 224, 240, 255, 256, 257, 300, 400, 511, 512, 513, 777, 1_025, 3_000,
] as const;

export const PROMPT_SET_SIZE = LENGTHS.length;

/** So many prompts of at most `longest` tokens, spread over the set, its first and last included. */
export function promptSet(count: number, longest = Infinity): Uint32Array[] {
  const lengths = LENGTHS.filter((length) => length <= longest);
  const wanted = Math.min(count, lengths.length);
  return Array.from({ length: wanted }, (_, i) => {
    const index = wanted === 1 ? 0 : Math.round((i * (lengths.length - 1)) / (wanted - 1));
    return aPrompt(lengths[index]!, index);
  });
}

/** The k-th of n parts of a list, dealt out like cards; `part` is "k/n". For a set that takes too long in one run. */
export function partOf<T>(list: readonly T[], part: string | undefined): readonly T[] {
  if (part === undefined) return list;
  const [, k, n] = /^(\d+)\/(\d+)$/.exec(part) ?? [];
  assert(Number(k) >= 1 && Number(k) <= Number(n), `expected a part such as 1/3, got ${part}`);
  return list.filter((_, i) => i % Number(n) === Number(k) - 1);
}

function aPrompt(length: number, salt: number): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => 300 + ((i * 37 + salt * 101 + ((i * i) % 7) * 11) % 4_000));
}

/** Prompts of a set that may part, all at near ties: 2 %. */
export function allowedPartings(count: number): number {
  return Math.floor(count * 0.02);
}
