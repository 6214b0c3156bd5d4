import { createHash, type Hash } from "node:crypto";
import { open } from "node:fs/promises";
import type { EngineInfo } from "../../engines/index.ts";

/**
 * 64 bits that say whose KV blocks these are: the model's content, the engine that computed them, and their layout. Of the
 * file its size, first and last MiB and 256 pages spread over the rest are read (a few milliseconds): fine-tunes of one
 * model differ in all of their weights, and other quantizations in size. An engine without a file is told by its name and shape.
 */
const EDGE_BYTES = 1 << 20;
const SAMPLES = 256;
const SAMPLE_BYTES = 4_096;

export async function modelFingerprint(
  modelPath: string | undefined,
  info: EngineInfo,
): Promise<readonly [lo: number, hi: number]> {
  const hash = createHash("sha256");
  hash.update(
    JSON.stringify([info.engine, info.engineVersion, info.blockSizeTokens, info.blockBytes, info.vocabularySize]),
  );
  if (modelPath !== undefined) await addFile(hash, modelPath);
  const digest = hash.digest();
  return [digest.readUInt32LE(0), digest.readUInt32LE(4)];
}

async function addFile(hash: Hash, modelPath: string): Promise<void> {
  const file = await open(modelPath);
  try {
    const { size } = await file.stat();
    hash.update(String(size));
    const buffer = Buffer.alloc(EDGE_BYTES);
    const add = async (position: number, byteCount: number): Promise<void> => {
      const { bytesRead } = await file.read(buffer, 0, byteCount, Math.max(0, position));
      hash.update(buffer.subarray(0, bytesRead));
    };
    await add(0, EDGE_BYTES);
    for (let i = 1; i < SAMPLES; i++) await add(Math.floor((size * i) / SAMPLES), SAMPLE_BYTES);
    await add(size - EDGE_BYTES, EDGE_BYTES);
  } finally {
    await file.close();
  }
}
