import { parentPort, workerData } from "node:worker_threads";
import { OverlapScores } from "./base.ts";
import { FlatKvIndexReader } from "./flat-kv-index-reader.ts";
import type { FlatKvShare } from "./flat-kv-memory.ts";

/** A reader thread of the stress test: looks chains up until told to stop, and checks each answer against its rule. */
export interface ReaderTask {
  readonly share: FlatKvShare;
  /** Word 0: stop when 1. Word 1: counts readers that run. */
  readonly signals: Int32Array;
  readonly queries: readonly ReaderQuery[];
}

export interface ReaderQuery {
  readonly name: string;
  readonly chain: Uint32Array;
  /** All that the ranks may score in the device tier; a rank that is not listed scores 0. */
  readonly allowed: readonly { readonly rank: number; readonly scores: readonly number[] }[];
}

export interface ReaderReport {
  readonly lookups: number;
  readonly retries: number;
  readonly starved: number;
  readonly bytesSeen: number;
  readonly wrong: readonly string[];
}

const MAX_WRONG = 10;

function check(query: ReaderQuery, scores: OverlapScores, rankCount: number): string | undefined {
  for (let rank = 0; rank < rankCount; rank++) {
    const allowed = query.allowed.find((entry) => entry.rank === rank)?.scores ?? [0];
    const [device, host, disk] = [scores.device[rank]!, scores.host[rank]!, scores.disk[rank]!];
    if (!allowed.includes(device) || host !== 0 || disk !== 0 || scores.shared[rank] !== 0) {
      return `${query.name}: rank ${rank} scores ${device}/${host}/${disk}, allowed ${allowed.join()}`;
    }
  }
  return undefined;
}

function run({ share, signals, queries }: ReaderTask): ReaderReport {
  const reader = new FlatKvIndexReader(share);
  const scores = new OverlapScores();
  const wrong: string[] = [];
  let lookups = 0;
  let announced = false;
  while (Atomics.load(signals, 0) === 0 && wrong.length < MAX_WRONG) {
    const query = queries[lookups % queries.length]!;
    const starvedBefore = reader.starvedLookups;
    reader.findMatches(query.chain, query.chain.length / 2, scores);
    lookups++;
    // A starved lookup says so and claims nothing.
    const message = reader.starvedLookups === starvedBefore ? check(query, scores, reader.rankCount) : undefined;
    if (message !== undefined) wrong.push(message);
    if (!announced) {
      announced = true;
      Atomics.add(signals, 1, 1);
      Atomics.notify(signals, 1);
    }
  }
  return { lookups, retries: reader.retries, starved: reader.starvedLookups, bytesSeen: reader.stats().bytes, wrong };
}

parentPort!.postMessage(run(workerData as ReaderTask));
