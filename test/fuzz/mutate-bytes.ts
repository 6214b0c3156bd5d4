import type { Random } from "../../src/std/index.ts";
import { targetOf, type AnyTarget } from "./fuzzer.ts";

/** Lengths and counts that parsers trip over. */
const INTERESTING = [
  0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 1_023, 1_024, 4_095, 4_096, 32_767, 32_768, 65_535,
  65_536, 0x00ff_ffff, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff,
];
const MAX_BYTES = 64 * 1024;

export function below(random: Random, limit: number): number {
  return Math.floor(random.nextFloat() * limit);
}

export function pick<Item>(random: Random, items: readonly Item[]): Item {
  return items[below(random, items.length)]!;
}

/** One to eight changes to one of the valid inputs; now and then bytes without any meaning. */
export function mutateBytes(random: Random, corpus: readonly Buffer[]): Buffer {
  if (random.nextFloat() < 0.05) return randomBytes(random, below(random, 256));
  let bytes: Buffer = Buffer.from(pick(random, corpus));
  if (random.nextFloat() < 0.03) return bytes;
  const changes = 1 + below(random, random.nextFloat() < 0.7 ? 3 : 8);
  for (let i = 0; i < changes; i++) bytes = change(random, bytes, corpus);
  return bytes.subarray(0, MAX_BYTES);
}

export function randomBytes(random: Random, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let i = 0; i < length; i++) bytes[i] = random.nextU32();
  return bytes;
}

function change(random: Random, bytes: Buffer, corpus: readonly Buffer[]): Buffer {
  const at = below(random, bytes.length + 1);
  const length = Math.min(bytes.length - at, 1 + below(random, random.nextFloat() < 0.8 ? 8 : 512));
  switch (below(random, 9)) {
    case 0: // One bit.
      if (at < bytes.length) bytes[at]! ^= 1 << below(random, 8);
      return bytes;
    case 1:
      if (at < bytes.length) bytes[at] = random.nextU32();
      return bytes;
    case 2:
      return overwriteNumber(random, bytes, at);
    case 3: // Without a part.
      return Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + length)]);
    case 4: // A part twice.
      return Buffer.concat([bytes.subarray(0, at + length), bytes.subarray(at)]);
    case 5: // Something in between.
      return Buffer.concat([bytes.subarray(0, at), randomBytes(random, 1 + below(random, 16)), bytes.subarray(at)]);
    case 6: // Cut.
      return bytes.subarray(0, at);
    case 7: {
      // The head of this one, the tail of another.
      const other = pick(random, corpus);
      return Buffer.concat([bytes.subarray(0, at), other.subarray(below(random, other.length + 1))]);
    }
    default: // A part over another.
      bytes.copyWithin(below(random, bytes.length + 1), at, at + length);
      return bytes;
  }
}

function overwriteNumber(random: Random, bytes: Buffer, at: number): Buffer {
  const value = random.nextFloat() < 0.8 ? pick(random, INTERESTING) : random.nextU32();
  const isLittle = random.nextFloat() < 0.7;
  const width = pick(random, [1, 2, 4, 8]);
  if (at + width > bytes.length) return bytes;
  const number = BigInt(value) & ((1n << BigInt(8 * width)) - 1n);
  const field = Buffer.alloc(8);
  if (isLittle) field.writeBigUInt64LE(number);
  else field.writeBigUInt64BE(number);
  field.copy(bytes, at, isLittle ? 0 : 8 - width, isLittle ? width : 8);
  return bytes;
}

/** Delta debugging: without halves, quarters, ... single bytes; then with zeros in their place. */
export function* smallerBytes(bytes: Buffer): Iterable<Buffer> {
  for (let length = bytes.length >> 1; length >= 1; length >>= 1) {
    for (let at = 0; at + length <= bytes.length; at += length) {
      yield Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + length)]);
    }
  }
  for (let at = 0; at < bytes.length; at++) {
    if (bytes[at] === 0) continue;
    const zeroed = Buffer.from(bytes);
    zeroed[at] = 0;
    yield zeroed;
  }
}

/** Bytes that a person can paste: as base64, with a piece of them readable. */
export function showBytes(bytes: Buffer): string {
  const readable = JSON.stringify(bytes.toString("latin1", 0, 120));
  return `${bytes.length} bytes, Buffer.from("${bytes.subarray(0, 3_000).toString("base64")}", "base64") ${readable}`;
}

/** A target that takes one buffer. */
export function bytesTarget(options: {
  readonly name: string;
  readonly about: string;
  readonly corpus: readonly Buffer[];
  readonly run: (bytes: Buffer) => void | Promise<void>;
  readonly close?: () => Promise<void> | void;
}): AnyTarget {
  const { name, about, corpus, run, close } = options;
  return targetOf({
    name,
    about,
    generate: (random) => mutateBytes(random, corpus),
    run,
    smaller: smallerBytes,
    show: showBytes,
    ...(close === undefined ? {} : { close }),
  });
}
