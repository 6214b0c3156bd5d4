import { NaiveVllmEventMapper } from "../src/engine-events/naive-vllm-event-mapper.ts";
import { VllmEventSource, decodeVllmBatch } from "../src/engine-events/index.ts";
import { MirroredBlocks } from "../src/engines/foreign/index.ts";
import { silentLogger } from "../src/observability/index.ts";
import type { KvEvent } from "../src/protocol/index.ts";
import { FlatKvIndex } from "../src/router/indexer/index.ts";
import { SeededRandom } from "../src/std/index.ts";
import { median, table } from "./harness.ts";
import { VllmFrames } from "./vllm-frames.ts";

/**
 * KV events of stock engines from the raw ZMQ frames to the router's index: decoded, put under our hashes, copies counted,
 * applied. The frames are what vLLM 0.29 publishes (maps, integer hashes, one event for each evicted block), made once;
 * what is measured is CPU time of this thread from `onFrames` on. A block operation is one block stored or removed. Aim:
 * 1 M block operations per second and core.
 */
const ENGINES = 16;
const BLOCKS_PER_ENGINE = 8_192;
const BLOCK_SIZES = [16, 64] as const;
const AIM_OPS_PER_SECOND = 1e6;
const ROUNDS = 7;
const REQUESTS = 4_000;

interface Load {
  readonly frames: readonly (readonly Buffer[])[];
  readonly engineOf: readonly number[];
  readonly blockOperations: number;
  readonly bytes: number;
}

/** Requests of conversations behind shared system prompts, spread over the engines; each engine has an LRU cache. */
function loadOf(blockSizeTokens: number, random: SeededRandom): Load {
  const engines = Array.from({ length: ENGINES }, (_, i) => new VllmFrames({ blockSizeTokens, totalBlocks: BLOCKS_PER_ENGINE, seed: i + 1 }));
  const frames: Buffer[][] = [];
  const engineOf: number[] = [];
  for (let i = 0; i < REQUESTS; i++) {
    const at = Math.floor(random.nextFloat() * ENGINES);
    const batch = engines[at]!.request(Math.floor(random.nextFloat() * 400), 1 + Math.floor(random.nextFloat() * 160));
    if (batch === undefined) continue;
    frames.push(batch);
    engineOf.push(at);
  }
  return {
    frames,
    engineOf,
    blockOperations: engines.reduce((sum, engine) => sum + engine.blockOperations, 0),
    bytes: frames.reduce((sum, batch) => sum + batch[2]!.length, 0),
  };
} // prettier-ignore

type Stage = "decoded and named" | "copies counted" | "into the index";

/** The plain mapper in front of the same rest: what the typed arrays are worth. */
function naiveRate({ frames, engineOf, blockOperations }: Load, blockSizeTokens: number): number {
  const index = new FlatKvIndex();
  const engines = Array.from({ length: ENGINES }, (_, i) => ({
    rank: index.rankOf(`worker-${i}`, 0),
    mapper: new NaiveVllmEventMapper({ blockSizeTokens }),
    mirror: new MirroredBlocks(),
  }));
  const before = process.threadCpuUsage();
  for (let i = 0; i < frames.length; i++) {
    const { rank, mapper, mirror } = engines[engineOf[i]!]!;
    const changed = mirror.apply(mapper.map(decodeVllmBatch(frames[i]![2]!)));
    for (const event of changed) index.apply(rank, event);
  }
  const { user, system } = process.threadCpuUsage(before);
  return blockOperations / (user + system);
}

/** Millions of block operations per CPU second. */
function rate({ frames, engineOf, blockOperations }: Load, blockSizeTokens: number, stage: Stage): number {
  const index = new FlatKvIndex();
  const ranks = Array.from({ length: ENGINES }, (_, i) => index.rankOf(`worker-${i}`, 0));
  const sources = ranks.map((rank) => {
    const mirror = new MirroredBlocks();
    const onEvents = (events: readonly KvEvent[]): void => {
      if (stage === "decoded and named") return;
      const changed = mirror.apply(events);
      if (stage === "into the index") for (const event of changed) index.apply(rank, event);
    };
    const source = new VllmEventSource({ blockSizeTokens, dpRank: 0, logger: silentLogger, onEvents });
    source.onConnected();
    return source;
  });
  const before = process.threadCpuUsage();
  for (let i = 0; i < frames.length; i++) sources[engineOf[i]!]!.onFrames(frames[i]!);
  const { user, system } = process.threadCpuUsage(before);
  for (const { counts, leftOut } of sources) {
    if (counts.malformed > 0 || leftOut.size > 0) throw new Error("the engine's own events were not understood");
  }
  return blockOperations / (user + system);
}

export async function run(): Promise<void> {
  for (const blockSizeTokens of BLOCK_SIZES) {
    const load = loadOf(blockSizeTokens, new SeededRandom(1));
    const measures: [string, () => number][] = [
      ["naive, into the index", () => naiveRate(load, blockSizeTokens)],
      ["decoded and named", () => rate(load, blockSizeTokens, "decoded and named")],
      ["copies counted", () => rate(load, blockSizeTokens, "copies counted")],
      ["into the index", () => rate(load, blockSizeTokens, "into the index")],
    ];
    const rows = measures.map(([stage, measure]) => {
      const rates = Array.from({ length: ROUNDS }, measure);
      return { stage, "M block operations/CPU-s": median(rates), least: Math.min(...rates), most: Math.max(...rates) };
    });
    const reached = rows.at(-1)!["M block operations/CPU-s"];
    console.log(
      `${ENGINES} engines, blocks of ${blockSizeTokens} tokens: ${load.frames.length} batches, ${load.blockOperations} block operations, ${(load.bytes / 1e6).toFixed(1)} MB`,
    );
    console.log(table(rows));
    console.log(`aim ${AIM_OPS_PER_SECOND / 1e6} M: ${reached >= AIM_OPS_PER_SECOND / 1e6 ? "met" : "missed"}\n`);
  }
}

if (import.meta.main) await run();
