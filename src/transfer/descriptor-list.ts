import { DynamoError } from "../errors/index.ts";
import { MAX_DESCRIPTOR_BYTES, MAX_TABLE_DESCRIPTORS, MAX_TRANSFER_DESCRIPTORS } from "./limits.ts";

/**
 * A list of descriptors (region, offset, length) as three typed arrays: descriptor i is `offsets[i]` to
 * `offsets[i] + lengths[i]` of the region `regionIds[i]`. No object per block. Offsets are whole numbers up to 2^53.
 */
export class DescriptorList {
  readonly count: number;
  readonly regionIds: Uint32Array;
  readonly offsets: Float64Array;
  readonly lengths: Uint32Array;

  /** Takes the arrays over; all have the same length. */
  constructor(regionIds: Uint32Array, offsets: Float64Array, lengths: Uint32Array) {
    if (regionIds.length !== offsets.length || offsets.length !== lengths.length) {
      throw new DynamoError("transfer-out-of-bounds", "a descriptor list's arrays have different lengths");
    }
    this.count = regionIds.length;
    this.regionIds = regionIds;
    this.offsets = offsets;
    this.lengths = lengths;
  }

  /** Blocks of equal size in one region: block i starts at `offset + i x stride`. */
  static blocks(
    region: { readonly id: number; readonly byteLength: number },
    options: {
      readonly blockBytes: number;
      /** @default as many as fit */
      readonly blockCount?: number;
      /** @default 0 */
      readonly offset?: number;
      /** @default blockBytes */
      readonly strideBytes?: number;
    },
  ): DescriptorList {
    const { blockBytes, offset = 0, strideBytes = blockBytes } = options;
    const fits = Math.floor((region.byteLength - offset - blockBytes) / strideBytes) + 1;
    const count = options.blockCount ?? Math.max(0, fits);
    const offsets = new Float64Array(count);
    for (let i = 0; i < count; i++) offsets[i] = offset + i * strideBytes;
    return new DescriptorList(new Uint32Array(count).fill(region.id), offsets, new Uint32Array(count).fill(blockBytes));
  }

  /** Its bytes in all. */
  get byteCount(): number {
    let sum = 0;
    for (let i = 0; i < this.count; i++) sum += this.lengths[i]!;
    return sum;
  }
}

/** Refuses a list that reaches outside what `lengthOf` says a region has; -1 means there is no such region. */
export function checkList(list: DescriptorList, lengthOf: (regionId: number) => number, name: string): void {
  if (list.count === 0 || list.count > MAX_TABLE_DESCRIPTORS) {
    throw new DynamoError(
      "transfer-out-of-bounds",
      `${name}: expected 1 to ${MAX_TABLE_DESCRIPTORS} descriptors, got ${list.count}`,
    );
  }
  let knownId = -1;
  let knownLength = 0;
  for (let i = 0; i < list.count; i++) {
    const id = list.regionIds[i]!;
    if (id !== knownId) {
      knownId = id;
      knownLength = lengthOf(id);
      if (knownLength < 0)
        throw new DynamoError("transfer-out-of-bounds", `${name}[${i}]: the memory is not registered`);
    }
    const offset = list.offsets[i]!;
    const length = list.lengths[i]!;
    if (!(Number.isSafeInteger(offset) && offset >= 0 && length > 0 && offset + length <= knownLength)) {
      throw new DynamoError("transfer-out-of-bounds", `${name}[${i}]: reaches outside the registered memory`, {
        diagnostic: `[${offset}, ${offset + length}) of ${knownLength} bytes`,
      });
    }
  }
}

/** What one transfer moves: pair i is descriptor i of both lists, of equal length. */
export interface DescriptorPairs {
  readonly local: DescriptorList;
  readonly remote: DescriptorList;
  readonly byteCount: number;
}

/**
 * Takes the named descriptors out of two prepared lists, side by side, and merges neighbours that lie next to each other
 * on both sides: a run of blocks becomes one descriptor. O(indices), four typed arrays and nothing else.
 */
export function gatherPairs(
  local: DescriptorList,
  remote: DescriptorList,
  localIndices: Uint32Array,
  remoteIndices: Uint32Array,
): DescriptorPairs {
  const count = localIndices.length;
  if (count === 0 || count !== remoteIndices.length) {
    throw new DynamoError(
      "transfer-out-of-bounds",
      `indices: expected as many local as remote ones, at least one; got ${count} and ${remoteIndices.length}`,
    );
  }
  const localRegions = new Uint32Array(count);
  const remoteRegions = new Uint32Array(count);
  const localOffsets = new Float64Array(count);
  const remoteOffsets = new Float64Array(count);
  const lengths = new Uint32Array(count);
  let last = -1;
  let byteCount = 0;
  for (let i = 0; i < count; i++) {
    const l = localIndices[i]!;
    const r = remoteIndices[i]!;
    if (l >= local.count || r >= remote.count) {
      throw new DynamoError("transfer-out-of-bounds", `indices[${i}]: outside the prepared table`, {
        diagnostic: `local ${l} of ${local.count}, remote ${r} of ${remote.count}`,
      });
    }
    const length = local.lengths[l]!;
    if (length !== remote.lengths[r]!) {
      throw new DynamoError("transfer-out-of-bounds", `indices[${i}]: local and remote descriptor differ in length`, {
        diagnostic: `${length} and ${remote.lengths[r]!} bytes`,
      });
    }
    byteCount += length;
    const localOffset = local.offsets[l]!;
    const remoteOffset = remote.offsets[r]!;
    if (
      last >= 0 &&
      localRegions[last] === local.regionIds[l] &&
      remoteRegions[last] === remote.regionIds[r] &&
      localOffsets[last]! + lengths[last]! === localOffset &&
      remoteOffsets[last]! + lengths[last]! === remoteOffset &&
      lengths[last]! + length <= MAX_DESCRIPTOR_BYTES
    ) {
      lengths[last] = lengths[last]! + length;
      continue;
    }
    last++;
    localRegions[last] = local.regionIds[l]!;
    remoteRegions[last] = remote.regionIds[r]!;
    localOffsets[last] = localOffset;
    remoteOffsets[last] = remoteOffset;
    lengths[last] = length;
  }
  const used = last + 1;
  if (used > MAX_TRANSFER_DESCRIPTORS) {
    throw new DynamoError(
      "transfer-full",
      `one transfer moves at most ${MAX_TRANSFER_DESCRIPTORS} separate pieces, got ${used}: split it`,
    );
  }
  const mergedLengths = lengths.subarray(0, used);
  return {
    local: new DescriptorList(localRegions.subarray(0, used), localOffsets.subarray(0, used), mergedLengths),
    remote: new DescriptorList(remoteRegions.subarray(0, used), remoteOffsets.subarray(0, used), mergedLengths),
    byteCount,
  };
}
