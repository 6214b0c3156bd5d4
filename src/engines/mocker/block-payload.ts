/**
 * What an exported block of the mock engine holds: its sequence hash, mixed on and on. Real KV bytes would say nothing here;
 * these say whether a block arrived whole and under its own name, which is what tests of transfers ask.
 */
export const MOCK_BLOCK_BYTES = 64;

/** Writes the payload of block `i` of the hashes to `data` at block `at`. */
export function writeBlockPayload(sequenceHashes: Uint32Array, i: number, data: Uint8Array, at: number): void {
  const view = new DataView(data.buffer, data.byteOffset + at * MOCK_BLOCK_BYTES, MOCK_BLOCK_BYTES);
  let word = sequenceHashes[2 * i]!;
  const hi = sequenceHashes[2 * i + 1]!;
  for (let offset = 0; offset < MOCK_BLOCK_BYTES; offset += 4) {
    view.setUint32(offset, word, true);
    word = (Math.imul(word ^ hi, 0x9e37_79b1) + offset + 1) >>> 0;
  }
}

/** Whether `data` has block `i` of the hashes as its block `at`. */
export function isBlockPayload(sequenceHashes: Uint32Array, i: number, data: Uint8Array, at: number): boolean {
  const expected = new Uint8Array(MOCK_BLOCK_BYTES);
  writeBlockPayload(sequenceHashes, i, expected, 0);
  const start = at * MOCK_BLOCK_BYTES;
  return expected.every((byte, k) => byte === data[start + k]);
}
