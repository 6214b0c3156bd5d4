import type { HashPair } from "./xxh3.ts";

/**
 * 64-bit hashes for people and for libraries: hex and BigInt, at the edge only. Inside, a hash is two u32 in a typed
 * array, low half first.
 */

/** 16 lower-case hex digits, high half first. */
export function hashToHex(lo: number, hi: number): string {
  return (hi >>> 0).toString(16).padStart(8, "0") + (lo >>> 0).toString(16).padStart(8, "0");
}

/** The inverse of `hashToHex`; undefined for anything but 16 hex digits. */
export function tryHashFromHex(hex: string): HashPair | undefined {
  if (!/^[0-9a-fA-F]{16}$/.test(hex)) return undefined;
  return [parseInt(hex.slice(8), 16), parseInt(hex.slice(0, 8), 16)];
}

export function hashToBigInt(lo: number, hi: number): bigint {
  return (BigInt(hi >>> 0) << 32n) | BigInt(lo >>> 0);
}

/** Takes signed and unsigned values: engines publish both. */
export function hashFromBigInt(value: bigint): HashPair {
  const unsigned = BigInt.asUintN(64, value);
  return [Number(unsigned & 0xffff_ffffn), Number(unsigned >> 32n)];
}

/** The 64-bit sum, wrapping. */
export function addHashPairs(a: HashPair, b: HashPair): HashPair {
  const lo = a[0] + b[0];
  return [lo >>> 0, (a[1] + b[1] + (lo > 0xffff_ffff ? 1 : 0)) >>> 0];
}

/** Unsigned order: negative, 0 or positive. */
export function compareHashPairs(a: HashPair, b: HashPair): number {
  return a[1] - b[1] || a[0] - b[0];
}
