/**
 * XXH3-64 (xxHash, "XXH3 64-bit variant", all input lengths, with seed) in plain TypeScript. A 64-bit value is a pair of
 * u32 halves, never a BigInt, so that it can be used per block without garbage.
 *
 * This is the reference of `xxh3-wasm.ts` (a test compares them) and the way for everything that is not a batch of
 * blocks: seeds, chain steps, blocks with multimodal bytes. Cost: about 0.1 us for a chain step, 0.4 us for 64 bytes.
 *
 * Helpers leave their 64-bit result in the module registers `resultLo` and `resultHi`: JavaScript returns one number.
 */

/** A 64-bit value as two u32 halves: [low, high]. */
export type HashPair = readonly [lo: number, hi: number];

let resultLo = 0;
let resultHi = 0;

/** The default secret of the specification. */
export const XXH3_SECRET = Uint8Array.from(
  Buffer.from(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e" +
      "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a" +
      "51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8f" +
      "f8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e",
    "hex",
  ),
);

/** Primes of the specification as [low, high]. */
const PRIME64_1: HashPair = [0x85ebca87, 0x9e3779b1];
const PRIME64_2: HashPair = [0x27d4eb4f, 0xc2b2ae3d];
const PRIME64_3: HashPair = [0x9e3779f9, 0x165667b1];
const PRIME32_1 = 0x9e3779b1;

/** Initial accumulators of the long path: prime32_3, 64_1, 64_2, 64_3, 64_4, 32_2, 64_5, 32_1, as (lo, hi). */
// prettier-ignore
export const XXH3_ACCUMULATORS = Uint32Array.of(
  0xc2b2ae3d, 0, 0x85ebca87, 0x9e3779b1, 0x27d4eb4f, 0xc2b2ae3d, 0x9e3779f9, 0x165667b1,
  0xc2b2ae63, 0x85ebca77, 0x85ebca77, 0, 0x165667c5, 0x27d4eb2f, 0x9e3779b1, 0,
);

const STRIPE_BYTES = 64;
/** (secret length - stripe) / 8. */
const STRIPES_PER_BLOCK = 16;

/** XXH3-64 of `bytes`. Cost: linear, 2 to 6 ns a byte. */
export function xxh3_64(bytes: Uint8Array, seed: HashPair): HashPair {
  hashBytes(bytes, bytes.length, seed[0], seed[1]);
  return [resultLo >>> 0, resultHi >>> 0];
}

/** As `xxh3_64` over the first `length` bytes, but writes the pair to `out[index]`, `out[index + 1]`: no allocation. */
export function xxh3_64Into(
  bytes: Uint8Array,
  length: number,
  seedLo: number,
  seedHi: number,
  out: Uint32Array,
  index: number,
): void {
  hashBytes(bytes, length, seedLo, seedHi);
  out[index] = resultLo;
  out[index + 1] = resultHi;
}

/** The secret of the long path for a seed: each 16 bytes are (lo + seed, hi - seed). */
export function deriveXxh3Secret(seedLo: number, seedHi: number): Uint8Array {
  const secret = new Uint8Array(XXH3_SECRET.length);
  for (let at = 0; at < secret.length; at += 16) {
    add64(read32(XXH3_SECRET, at), read32(XXH3_SECRET, at + 4), seedLo, seedHi);
    write64(secret, at);
    sub64(read32(XXH3_SECRET, at + 8), read32(XXH3_SECRET, at + 12), seedLo, seedHi);
    write64(secret, at + 8);
  }
  return secret;
}

function hashBytes(bytes: Uint8Array, length: number, seedLo: number, seedHi: number): void {
  if (length <= 3) hash0to3(bytes, length, seedLo, seedHi);
  else if (length <= 8) hash4to8(bytes, length, seedLo, seedHi);
  else if (length <= 16) hash9to16(bytes, length, seedLo, seedHi);
  else if (length <= 128) hash17to128(bytes, length, seedLo, seedHi);
  else if (length <= 240) hash129to240(bytes, length, seedLo, seedHi);
  else hashLong(bytes, length, seedLo, seedHi);
}

function hash0to3(bytes: Uint8Array, length: number, seedLo: number, seedHi: number): void {
  if (length === 0) {
    resultLo = seedLo ^ secret32(56) ^ secret32(64);
    resultHi = seedHi ^ secret32(60) ^ secret32(68);
  } else {
    const combined = (bytes[0]! << 16) | (bytes[length >>> 1]! << 24) | bytes[length - 1]! | (length << 8);
    add64(secret32(0) ^ secret32(4), 0, seedLo, seedHi);
    resultLo ^= combined;
  }
  avalancheXxh64();
}

function hash4to8(bytes: Uint8Array, length: number, seedLo: number, seedHi: number): void {
  const mixedSeedHi = seedHi ^ byteSwap32(seedLo);
  sub64(secret32(8) ^ secret32(16), secret32(12) ^ secret32(20), seedLo, mixedSeedHi);
  // The last four bytes are the low half, the first four the high half.
  let lo = resultLo ^ read32(bytes, length - 4);
  let hi = resultHi ^ read32(bytes, 0);
  // h ^= rotl(h, 49) ^ rotl(h, 24)
  const lo49 = (hi << 17) | (lo >>> 15);
  const hi49 = (lo << 17) | (hi >>> 15);
  const lo24 = (lo << 24) | (hi >>> 8);
  const hi24 = (hi << 24) | (lo >>> 8);
  lo ^= lo49 ^ lo24;
  hi ^= hi49 ^ hi24;
  multiply64(lo, hi, 0x1e98df25, 0x9fb21c65);
  lo = resultLo;
  hi = resultHi;
  add64(hi >>> 3, 0, length, 0);
  multiply64(lo ^ resultLo, hi ^ resultHi, 0x1e98df25, 0x9fb21c65);
  xorShiftRight(28);
}

function hash9to16(bytes: Uint8Array, length: number, seedLo: number, seedHi: number): void {
  const at = length - 8;
  hash16(read32(bytes, 0), read32(bytes, 4), read32(bytes, at), read32(bytes, at + 4), length, seedLo, seedHi);
}

/** The 9 to 16 byte path, given its two (overlapping) words. */
function hash16(
  firstLo: number,
  firstHi: number,
  lastLo: number,
  lastHi: number,
  length: number,
  seedLo: number,
  seedHi: number,
): void {
  add64(secret32(24) ^ secret32(32), secret32(28) ^ secret32(36), seedLo, seedHi);
  const aLo = firstLo ^ resultLo;
  const aHi = firstHi ^ resultHi;
  sub64(secret32(40) ^ secret32(48), secret32(44) ^ secret32(52), seedLo, seedHi);
  const bLo = lastLo ^ resultLo;
  const bHi = lastHi ^ resultHi;
  multiplyFold(aLo, aHi, bLo, bHi);
  add64(resultLo, resultHi, bLo, bHi);
  add64(resultLo, resultHi, byteSwap32(aHi), byteSwap32(aLo));
  add64(resultLo, resultHi, length, 0);
  avalanche();
}

/** XXH3 of the 16 bytes le64(first) ++ le64(last): the chain step of block hashing, without a byte array. */
export function xxh3_64OfPairInto(
  firstLo: number,
  firstHi: number,
  lastLo: number,
  lastHi: number,
  seedLo: number,
  seedHi: number,
  out: Uint32Array,
  index: number,
): void {
  hash16(firstLo, firstHi, lastLo, lastHi, 16, seedLo, seedHi);
  out[index] = resultLo;
  out[index + 1] = resultHi;
}

/** Pairs of 16 bytes from both ends towards the middle. */
function hash17to128(bytes: Uint8Array, length: number, seedLo: number, seedHi: number): void {
  multiply64(length, 0, PRIME64_1[0], PRIME64_1[1]);
  let lo = resultLo;
  let hi = resultHi;
  for (let pair = (length - 1) >>> 5; pair >= 0; pair--) {
    mix16(bytes, 16 * pair, 32 * pair, seedLo, seedHi);
    add64(lo, hi, resultLo, resultHi);
    lo = resultLo;
    hi = resultHi;
    mix16(bytes, length - 16 * (pair + 1), 32 * pair + 16, seedLo, seedHi);
    add64(lo, hi, resultLo, resultHi);
    lo = resultLo;
    hi = resultHi;
  }
  avalanche();
}

function hash129to240(bytes: Uint8Array, length: number, seedLo: number, seedHi: number): void {
  multiply64(length, 0, PRIME64_1[0], PRIME64_1[1]);
  let lo = resultLo;
  let hi = resultHi;
  const rounds = length >>> 4;
  for (let i = 0; i < rounds; i++) {
    mix16(bytes, 16 * i, i < 8 ? 16 * i : 16 * (i - 8) + 3, seedLo, seedHi);
    add64(lo, hi, resultLo, resultHi);
    // After the eighth round an avalanche; the secret then starts again, shifted by 3.
    if (i === 7) avalanche();
    lo = resultLo;
    hi = resultHi;
  }
  mix16(bytes, length - 16, 136 - 17, seedLo, seedHi);
  add64(lo, hi, resultLo, resultHi);
  avalanche();
}

const accumulators = new Uint32Array(16);
let derivedSecret: Uint8Array = XXH3_SECRET;
let derivedSeedLo = 0;
let derivedSeedHi = 0;

function hashLong(bytes: Uint8Array, length: number, seedLo: number, seedHi: number): void {
  if (seedLo >>> 0 !== derivedSeedLo || seedHi >>> 0 !== derivedSeedHi) {
    derivedSecret = deriveXxh3Secret(seedLo, seedHi);
    derivedSeedLo = seedLo >>> 0;
    derivedSeedHi = seedHi >>> 0;
  }
  const secret = derivedSecret;
  accumulators.set(XXH3_ACCUMULATORS);
  // After each 16 stripes a scramble; at least the last byte is left for the tail.
  const stripeCount = Math.floor((length - 1) / STRIPE_BYTES);
  for (let stripe = 0; stripe < stripeCount; stripe++) {
    const inBlock = stripe % STRIPES_PER_BLOCK;
    accumulate(bytes, stripe * STRIPE_BYTES, secret, 8 * inBlock);
    if (inBlock === STRIPES_PER_BLOCK - 1) scramble(secret);
  }
  accumulate(bytes, length - STRIPE_BYTES, secret, secret.length - STRIPE_BYTES - 7);
  mergeAccumulators(secret, length);
}

/** One 64-byte stripe: acc[i] += lo32(key) * hi32(key), acc[i ^ 1] += data. */
function accumulate(bytes: Uint8Array, at: number, secret: Uint8Array, secretAt: number): void {
  for (let lane = 0; lane < 8; lane++) {
    const dataLo = read32(bytes, at + 8 * lane);
    const dataHi = read32(bytes, at + 8 * lane + 4);
    const other = 2 * (lane ^ 1);
    add64(accumulators[other]!, accumulators[other + 1]!, dataLo, dataHi);
    accumulators[other] = resultLo;
    accumulators[other + 1] = resultHi;
    const keyLo = (dataLo ^ read32(secret, secretAt + 8 * lane)) >>> 0;
    const keyHi = (dataHi ^ read32(secret, secretAt + 8 * lane + 4)) >>> 0;
    add64(accumulators[2 * lane]!, accumulators[2 * lane + 1]!, Math.imul(keyLo, keyHi), multiplyHigh32(keyLo, keyHi));
    accumulators[2 * lane] = resultLo;
    accumulators[2 * lane + 1] = resultHi;
  }
}

function scramble(secret: Uint8Array): void {
  const secretAt = secret.length - STRIPE_BYTES;
  for (let lane = 0; lane < 8; lane++) {
    resultLo = accumulators[2 * lane]!;
    resultHi = accumulators[2 * lane + 1]!;
    xorShiftRight(47);
    const lo = resultLo ^ read32(secret, secretAt + 8 * lane);
    const hi = resultHi ^ read32(secret, secretAt + 8 * lane + 4);
    multiply64(lo, hi, PRIME32_1, 0);
    accumulators[2 * lane] = resultLo;
    accumulators[2 * lane + 1] = resultHi;
  }
}

function mergeAccumulators(secret: Uint8Array, length: number): void {
  multiply64(length, 0, PRIME64_1[0], PRIME64_1[1]);
  let lo = resultLo;
  let hi = resultHi;
  for (let i = 0; i < 4; i++) {
    const at = 11 + 16 * i;
    multiplyFold(
      accumulators[4 * i]! ^ read32(secret, at),
      accumulators[4 * i + 1]! ^ read32(secret, at + 4),
      accumulators[4 * i + 2]! ^ read32(secret, at + 8),
      accumulators[4 * i + 3]! ^ read32(secret, at + 12),
    );
    add64(lo, hi, resultLo, resultHi);
    lo = resultLo;
    hi = resultHi;
  }
  avalanche();
}

function mix16(bytes: Uint8Array, at: number, secretAt: number, seedLo: number, seedHi: number): void {
  add64(secret32(secretAt), secret32(secretAt + 4), seedLo, seedHi);
  const aLo = read32(bytes, at) ^ resultLo;
  const aHi = read32(bytes, at + 4) ^ resultHi;
  sub64(secret32(secretAt + 8), secret32(secretAt + 12), seedLo, seedHi);
  multiplyFold(aLo, aHi, read32(bytes, at + 8) ^ resultLo, read32(bytes, at + 12) ^ resultHi);
}

function avalanche(): void {
  xorShiftRight(37);
  multiply64(resultLo, resultHi, 0x9e3779f9, 0x16566791);
  xorShiftRight(32);
}

/** XXH64's finish, used by the shortest inputs. */
function avalancheXxh64(): void {
  xorShiftRight(33);
  multiply64(resultLo, resultHi, PRIME64_2[0], PRIME64_2[1]);
  xorShiftRight(29);
  multiply64(resultLo, resultHi, PRIME64_3[0], PRIME64_3[1]);
  xorShiftRight(32);
}

/** result ^= result >> shift, for shifts of 1 to 63. */
function xorShiftRight(shift: number): void {
  const lo = resultLo;
  const hi = resultHi;
  if (shift >= 32) {
    resultLo = lo ^ (hi >>> (shift - 32));
  } else {
    resultLo = lo ^ ((lo >>> shift) | (hi << (32 - shift)));
    resultHi = hi ^ (hi >>> shift);
  }
}

function add64(aLo: number, aHi: number, bLo: number, bHi: number): void {
  const lo = (aLo >>> 0) + (bLo >>> 0);
  resultLo = lo | 0;
  resultHi = (aHi + bHi + (lo > 0xffffffff ? 1 : 0)) | 0;
}

function sub64(aLo: number, aHi: number, bLo: number, bHi: number): void {
  resultLo = (aLo - bLo) | 0;
  resultHi = (aHi - bHi - (aLo >>> 0 < bLo >>> 0 ? 1 : 0)) | 0;
}

/** High 32 bits of the product of two u32. */
function multiplyHigh32(a: number, b: number): number {
  const aLo = a & 0xffff;
  const aHi = a >>> 16;
  const bLo = b & 0xffff;
  const bHi = b >>> 16;
  const low = aHi * bLo + ((aLo * bLo) >>> 16);
  const middle = aLo * bHi + (low & 0xffff);
  return (aHi * bHi + (low >>> 16) + (middle >>> 16)) | 0;
}

/** Low 64 bits of the product. */
function multiply64(aLo: number, aHi: number, bLo: number, bHi: number): void {
  resultHi = (multiplyHigh32(aLo, bLo) + Math.imul(aLo, bHi) + Math.imul(aHi, bLo)) | 0;
  resultLo = Math.imul(aLo, bLo);
}

/** The 128-bit product, its two halves xored. */
function multiplyFold(aLo: number, aHi: number, bLo: number, bHi: number): void {
  const word0 = Math.imul(aLo, bLo) >>> 0;
  const crossA = Math.imul(aHi, bLo) >>> 0;
  const crossB = Math.imul(aLo, bHi) >>> 0;
  const highLow = Math.imul(aHi, bHi) >>> 0;
  // Sums of at most four u32 stay exact in a double.
  const sum1 = (multiplyHigh32(aLo, bLo) >>> 0) + crossA + crossB;
  const carry1 = (sum1 - (sum1 >>> 0)) / 0x1_0000_0000;
  const sum2 = (multiplyHigh32(aHi, bLo) >>> 0) + (multiplyHigh32(aLo, bHi) >>> 0) + highLow + carry1;
  const carry2 = (sum2 - (sum2 >>> 0)) / 0x1_0000_0000;
  const word3 = (multiplyHigh32(aHi, bHi) >>> 0) + carry2;
  resultLo = word0 ^ sum2;
  resultHi = sum1 ^ word3;
}

function byteSwap32(value: number): number {
  return (value << 24) | ((value & 0xff00) << 8) | ((value >>> 8) & 0xff00) | (value >>> 24);
}

function read32(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24);
}

function secret32(at: number): number {
  return read32(XXH3_SECRET, at);
}

function write64(bytes: Uint8Array, at: number): void {
  for (let i = 0; i < 4; i++) {
    bytes[at + i] = resultLo >>> (8 * i);
    bytes[at + 4 + i] = resultHi >>> (8 * i);
  }
}
