import {
  WasmFunction,
  doWhile,
  i32,
  i64,
  instantiateWasm,
  when,
  type Code,
  type WasmExports,
  type WasmLocal,
} from "../std/index.ts";
import type { BlockHashes, BlockShape } from "./block-hash.ts";
import { XXH3_ACCUMULATORS, XXH3_SECRET, deriveXxh3Secret } from "./xxh3.ts";

/**
 * Block hashing as one WebAssembly function over a whole sequence: local hashes and chain in one pass, in 64-bit
 * arithmetic, where JavaScript has only 32. Its twin is `hashBlocksInTypeScript`, which also takes over where
 * WebAssembly is missing. What each path computes is said in `xxh3.ts`; here is only how.
 *
 * Token blocks are a multiple of 4 bytes and never empty, so the paths for 0 to 3 bytes are left out. Memory, in bytes:
 *
 *   0    secret with the seed in it    192  default secret    384  seed    392  parent of the first block
 *   1 Ki input: tokens of one chunk    1 Ki + 256 Ki  local hashes, then sequence hashes of the chunk
 *
 * 1.5 MiB in all; longer sequences go through in chunks. One per thread, made at first use (5 ms in a fresh process).
 */
const DERIVED_SECRET = 0;
const DEFAULT_SECRET = 192;
const SEED = 384;
const PARENT = 392;
const INPUT = 1024;
const MAX_INPUT_TOKENS = 65_536;
const LOCAL_HASHES = INPUT + 4 * MAX_INPUT_TOKENS;
const MAX_BLOCKS = 65_536;
const SEQUENCE_HASHES = LOCAL_HASHES + 8 * MAX_BLOCKS;
const MEMORY_PAGES = Math.ceil((SEQUENCE_HASHES + 8 * MAX_BLOCKS) / 65_536);

const CHAIN_SEED = 1337n;
const PRIME32_1 = 0x9e3779b1n;
const PRIME64_1 = 0x9e3779b185ebca87n;
const PRIME_RRMXMX = 0x9fb21c651e98df25n;
const PRIME_AVALANCHE = 0x165667919e3779f9n;

const secretView = new DataView(XXH3_SECRET.buffer);
const defaultSecret64 = (at: number): bigint => secretView.getBigUint64(at, true);

const LOW_HALF = i64.const(0xffffffffn);
const zero = i32.const(0);
const low = (value: Code): Code => i64.and(value, LOW_HALF);
const high = (value: Code): Code => i64.shiftRightUnsigned(value, i64.const(32n));
const sum = (first: Code, ...rest: Code[]): Code => rest.reduce((left, right) => i64.add(left, right), first);

/** The code that several paths share, over the scratch locals of the one function. */
class Xxh3Emitter {
  readonly a: WasmLocal;
  readonly b: WasmLocal;
  readonly #lowProduct: WasmLocal;
  readonly #crossProduct: WasmLocal;
  readonly #crossSum: WasmLocal;
  readonly #hash: WasmLocal;

  constructor(target: WasmFunction) {
    this.a = target.local("i64");
    this.b = target.local("i64");
    this.#lowProduct = target.local("i64");
    this.#crossProduct = target.local("i64");
    this.#crossSum = target.local("i64");
    this.#hash = target.local("i64");
  }

  /** The 128-bit product of `a` and `b`, its halves xored. */
  fold(): Code {
    const { a, b } = this;
    return [
      ...this.#lowProduct.set(i64.mul(low(a.get), low(b.get))),
      ...this.#crossProduct.set(i64.mul(high(a.get), low(b.get))),
      ...this.#crossSum.set(
        sum(high(this.#lowProduct.get), low(this.#crossProduct.get), i64.mul(low(a.get), high(b.get))),
      ),
      ...i64.xor(
        sum(high(this.#crossProduct.get), high(this.#crossSum.get), i64.mul(high(a.get), high(b.get))),
        i64.mul(a.get, b.get),
      ),
    ];
  }

  foldOf(a: Code, b: Code): Code {
    return [...this.a.set(a), ...this.b.set(b), ...this.fold()];
  }

  /** 16 bytes of input with 16 bytes of the seeded secret, which is what the seeded rounds up to 128 bytes come to. */
  mixSeeded(input: Code, inputOffset: number, secretOffset: number): Code {
    const word = (at: number): Code =>
      i64.xor(i64.load(input, inputOffset + at), i64.load(zero, DERIVED_SECRET + secretOffset + at));
    return this.foldOf(word(0), word(8));
  }

  /** As above with any place in the secret: default secret, seed added and subtracted. */
  mixUnaligned(input: Code, secret: Code, seed: Code): Code {
    return this.foldOf(
      i64.xor(i64.load(input), i64.add(i64.load(secret, DEFAULT_SECRET), seed)),
      i64.xor(i64.load(input, 8), i64.sub(i64.load(secret, DEFAULT_SECRET + 8), seed)),
    );
  }

  xorShiftRight(value: Code, shift: bigint): Code {
    return i64.xor(this.#hash.tee(value), i64.shiftRightUnsigned(this.#hash.get, i64.const(shift)));
  }

  avalanche(value: Code): Code {
    return this.xorShiftRight(i64.mul(this.xorShiftRight(value, 37n), i64.const(PRIME_AVALANCHE)), 32n);
  }

  byteSwap(value: Code): Code {
    const swapPairs = (of: Code, bits: bigint, mask: bigint): Code =>
      i64.or(
        i64.and(i64.shiftRightUnsigned(this.#hash.tee(of), i64.const(bits)), i64.const(mask)),
        i64.shiftLeft(i64.and(this.#hash.get, i64.const(mask)), i64.const(bits)),
      );
    return i64.rotateLeft(
      swapPairs(swapPairs(value, 8n, 0x00ff00ff00ff00ffn), 16n, 0x0000ffff0000ffffn),
      i64.const(32n),
    );
  }

  /** The 9 to 16 byte path over its two words. */
  hash16(first: Code, last: Code, length: Code, seed: Code): Code {
    const flipFirst = i64.add(i64.const(defaultSecret64(24) ^ defaultSecret64(32)), seed);
    const flipLast = i64.sub(i64.const(defaultSecret64(40) ^ defaultSecret64(48)), seed);
    return [
      ...this.a.set(i64.xor(first, flipFirst)),
      ...this.b.set(i64.xor(last, flipLast)),
      ...this.avalanche(sum(length, this.byteSwap(this.a.get), this.b.get, this.fold())),
    ];
  }
}

/** `hashBlocks(block count, stride bytes, window bytes, has parent)` over the memory above. */
function emitHashBlocks(): WasmFunction {
  const target = new WasmFunction("hashBlocks", ["i32", "i32", "i32", "i32"]);
  const blockCount = target.parameter(0);
  const strideBytes = target.parameter(1);
  const windowBytes = target.parameter(2);
  const hasParent = target.parameter(3);
  const input = target.local("i32");
  const inputEnd = target.local("i32");
  const out = target.local("i32");
  const outEnd = target.local("i32");
  const seed = target.local("i64");
  const length = target.local("i64");
  const local = target.local("i64");
  const sequence = target.local("i64");
  const emitter = new Xxh3Emitter(target);

  const windowIsAtMost = (bytes: number): Code => i32.lessUnsigned(windowBytes.get, i32.const(bytes + 1));
  const path = { target, emitter, input, inputEnd, windowBytes, seed, length, local };
  target.body(
    seed.set(i64.load(zero, SEED)),
    length.set(i64.fromI32Unsigned(windowBytes.get)),
    sequence.set(i64.load(zero, PARENT)),
    input.set(i32.const(INPUT)),
    outEnd.set(i32.shiftLeft(blockCount.get, i32.const(3))),
    doWhile(
      [
        ...inputEnd.set(i32.add(input.get, windowBytes.get)),
        ...when(
          windowIsAtMost(128),
          when(
            windowIsAtMost(16),
            when(windowIsAtMost(8), emit4to8(path), emit9to16(path)),
            emit17to128(path, windowIsAtMost),
          ),
          when(windowIsAtMost(240), emit129to240(path), emitLong(path)),
        ),
        ...i64.store(out.get, local.get, LOCAL_HASHES),
        ...when(
          hasParent.get,
          sequence.set(emitter.hash16(sequence.get, local.get, i64.const(16n), i64.const(CHAIN_SEED))),
          [...sequence.set(local.get), ...hasParent.set(i32.const(1))],
        ),
        ...i64.store(out.get, sequence.get, SEQUENCE_HASHES),
        ...input.set(i32.add(input.get, strideBytes.get)),
      ],
      i32.lessUnsigned(out.tee(i32.add(out.get, i32.const(8))), outEnd.get),
    ),
  );
  return target;
}

/** What a path gets: where the window is, and `local` to leave its hash in. */
interface Path {
  readonly target: WasmFunction;
  readonly emitter: Xxh3Emitter;
  readonly input: WasmLocal;
  readonly inputEnd: WasmLocal;
  readonly windowBytes: WasmLocal;
  readonly seed: WasmLocal;
  readonly length: WasmLocal;
  readonly local: WasmLocal;
}

/** An address before the end of the window. */
const before = ({ inputEnd }: Path, byteCount: number): Code => i32.sub(inputEnd.get, i32.const(byteCount));

function emit4to8(path: Path): Code {
  const { emitter, input, seed, length, local } = path;
  // The seed's low half, bytes swapped, goes into its high half.
  const swappedLow = i64.and(emitter.byteSwap(low(seed.get)), i64.const(0xffffffff00000000n));
  const key = i64.sub(i64.const(defaultSecret64(8) ^ defaultSecret64(16)), i64.xor(seed.get, swappedLow));
  const words = i64.add(
    i64.load32Unsigned(before(path, 4)),
    i64.shiftLeft(i64.load32Unsigned(input.get), i64.const(32n)),
  );
  const { a } = emitter;
  const rotated = (bits: bigint): Code => i64.rotateLeft(a.get, i64.const(bits));
  return [
    ...a.set(i64.xor(words, key)),
    ...a.set(i64.mul(i64.xor(a.get, i64.xor(rotated(49n), rotated(24n))), i64.const(PRIME_RRMXMX))),
    ...a.set(i64.xor(a.get, i64.add(i64.shiftRightUnsigned(a.get, i64.const(35n)), length.get))),
    ...local.set(emitter.xorShiftRight(i64.mul(a.get, i64.const(PRIME_RRMXMX)), 28n)),
  ];
}

function emit9to16(path: Path): Code {
  const { emitter, input, seed, length, local } = path;
  return local.set(emitter.hash16(i64.load(input.get), i64.load(before(path, 8)), length.get, seed.get));
}

function emit17to128(path: Path, windowIsAtMost: (bytes: number) => Code): Code {
  const { emitter, input, length, local } = path;
  /** Sixteen bytes from the front and as many from the back. */
  const pair = (index: number): Code => [
    ...local.set(i64.add(local.get, emitter.mixSeeded(input.get, 16 * index, 32 * index))),
    ...local.set(i64.add(local.get, emitter.mixSeeded(before(path, 16 * (index + 1)), 0, 32 * index + 16))),
  ];
  const pairsFrom = (index: number): Code =>
    index === 4 ? [] : [...pair(index), ...when(i32.eqz(windowIsAtMost(32 * (index + 1))), pairsFrom(index + 1))];
  return [
    ...local.set(i64.mul(length.get, i64.const(PRIME64_1))),
    ...pairsFrom(0),
    ...local.set(emitter.avalanche(local.get)),
  ];
}

function emit129to240(path: Path): Code {
  const { target, emitter, input, windowBytes, seed, length, local } = path;
  const at = target.local("i32");
  const roundsEnd = target.local("i32");
  const rounds = (secretAt: Code): Code => [
    ...local.set(i64.add(local.get, emitter.mixUnaligned(i32.add(input.get, at.get), secretAt, seed.get))),
    ...at.set(i32.add(at.get, i32.const(16))),
  ];
  return [
    ...local.set(i64.mul(length.get, i64.const(PRIME64_1))),
    ...at.set(zero),
    ...doWhile(rounds(at.get), i32.lessUnsigned(at.get, i32.const(128))),
    ...local.set(emitter.avalanche(local.get)),
    ...roundsEnd.set(i32.and(windowBytes.get, i32.const(-16))),
    ...when(
      i32.lessUnsigned(at.get, roundsEnd.get),
      doWhile(rounds(i32.sub(at.get, i32.const(128 - 3))), i32.lessUnsigned(at.get, roundsEnd.get)),
    ),
    ...local.set(i64.add(local.get, emitter.mixUnaligned(before(path, 16), i32.const(136 - 17), seed.get))),
    ...local.set(emitter.avalanche(local.get)),
  ];
}

function emitLong(path: Path): Code {
  const { target, emitter, input, length, local } = path;
  const accumulators = Array.from({ length: 8 }, () => target.local("i64"));
  const stripe = target.local("i32");
  const secretAt = target.local("i32");
  const stripesEnd = target.local("i32");
  const data = target.local("i64");
  const key = target.local("i64");
  const lanes = (emitLane: (accumulator: WasmLocal, lane: number) => Code): Code =>
    accumulators.flatMap((accumulator, lane) => emitLane(accumulator, lane));

  const accumulate = (from: Code, secret: Code): Code =>
    lanes((accumulator, lane) => {
      const neighbour = accumulators[lane ^ 1]!;
      return [
        ...data.set(i64.load(from, 8 * lane)),
        ...key.set(i64.xor(data.get, i64.load(secret, DERIVED_SECRET + 8 * lane))),
        ...neighbour.set(i64.add(neighbour.get, data.get)),
        ...accumulator.set(i64.add(accumulator.get, i64.mul(low(key.get), high(key.get)))),
      ];
    });
  const scramble = lanes((accumulator, lane) =>
    accumulator.set(
      i64.mul(
        i64.xor(emitter.xorShiftRight(accumulator.get, 47n), i64.load(zero, DERIVED_SECRET + 128 + 8 * lane)),
        i64.const(PRIME32_1),
      ),
    ),
  );
  const merge = [0, 1, 2, 3].flatMap((pair) => {
    const word = (half: number): Code =>
      i64.xor(accumulators[2 * pair + half]!.get, i64.load(zero, DERIVED_SECRET + 11 + 16 * pair + 8 * half));
    return local.set(i64.add(local.get, emitter.foldOf(word(0), word(1))));
  });
  return [
    ...lanes((accumulator, lane) =>
      accumulator.set(
        i64.const((BigInt(XXH3_ACCUMULATORS[2 * lane + 1]!) << 32n) | BigInt(XXH3_ACCUMULATORS[2 * lane]!)),
      ),
    ),
    ...stripe.set(input.get),
    // Whole stripes, leaving at least one byte for the last.
    ...stripesEnd.set(i32.add(input.get, i32.and(i32.sub(path.windowBytes.get, i32.const(1)), i32.const(-64)))),
    ...secretAt.set(zero),
    ...doWhile(
      [
        ...accumulate(stripe.get, secretAt.get),
        ...stripe.set(i32.add(stripe.get, i32.const(64))),
        ...when(i32.eq(secretAt.tee(i32.add(secretAt.get, i32.const(8))), i32.const(128)), [
          ...scramble,
          ...secretAt.set(zero),
        ]),
      ],
      i32.lessUnsigned(stripe.get, stripesEnd.get),
    ),
    ...accumulate(before(path, 64), i32.const(192 - 64 - 7)),
    ...local.set(i64.mul(length.get, i64.const(PRIME64_1))),
    ...merge,
    ...local.set(emitter.avalanche(local.get)),
  ];
}

interface HashBlocksFunctions {
  hashBlocks(blockCount: number, strideBytes: number, windowBytes: number, hasParent: number): void;
}

/** undefined = not tried yet, null = this platform has no WebAssembly. */
let wasm: WasmExports<HashBlocksFunctions> | null | undefined;
let words: Uint32Array;
let seedInMemory: readonly [number, number] | undefined;

function load(): WasmExports<HashBlocksFunctions> | null {
  const loaded = instantiateWasm<HashBlocksFunctions>({ functions: [emitHashBlocks()], memoryPages: MEMORY_PAGES });
  if (loaded === undefined) return null;
  words = new Uint32Array(loaded.memory.buffer);
  new Uint8Array(loaded.memory.buffer).set(XXH3_SECRET, DEFAULT_SECRET);
  return loaded;
}

/** Fills `out`; false when this platform or so large a block needs the TypeScript version. */
export function tryHashBlocksInWasm(tokenIds: Uint32Array, shape: BlockShape, out: BlockHashes): boolean {
  const { blockSizeTokens, windowTokens } = shape;
  const blocksPerChunk = Math.min(
    MAX_BLOCKS,
    Math.floor((MAX_INPUT_TOKENS - (windowTokens - blockSizeTokens)) / blockSizeTokens),
  );
  if (blocksPerChunk < 1) return false;
  if (wasm === undefined) wasm = load();
  if (wasm === null) return false;
  putSeed(shape.seed);
  words[PARENT / 4] = shape.parent?.[0] ?? 0;
  words[PARENT / 4 + 1] = shape.parent?.[1] ?? 0;
  let hasParent = shape.parent === undefined ? 0 : 1;
  for (let block = 0; block < out.blockCount; block += blocksPerChunk) {
    const count = Math.min(blocksPerChunk, out.blockCount - block);
    const firstToken = block * blockSizeTokens;
    words.set(tokenIds.subarray(firstToken, firstToken + (count - 1) * blockSizeTokens + windowTokens), INPUT / 4);
    wasm.functions.hashBlocks(count, 4 * blockSizeTokens, 4 * windowTokens, hasParent);
    out.localHashes.set(words.subarray(LOCAL_HASHES / 4, LOCAL_HASHES / 4 + 2 * count), 2 * block);
    out.sequenceHashes.set(words.subarray(SEQUENCE_HASHES / 4, SEQUENCE_HASHES / 4 + 2 * count), 2 * block);
    const last = SEQUENCE_HASHES / 4 + 2 * (count - 1);
    words[PARENT / 4] = words[last]!;
    words[PARENT / 4 + 1] = words[last + 1]!;
    hasParent = 1;
  }
  return true;
}

function putSeed(seed: readonly [number, number]): void {
  if (seedInMemory !== undefined && seedInMemory[0] === seed[0] && seedInMemory[1] === seed[1]) return;
  words[SEED / 4] = seed[0];
  words[SEED / 4 + 1] = seed[1];
  new Uint8Array(words.buffer).set(deriveXxh3Secret(seed[0], seed[1]), DERIVED_SECRET);
  seedInMemory = seed;
}
