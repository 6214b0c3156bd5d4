import { existsSync } from "node:fs";
import { join } from "node:path";
import {
  readTrace,
  renderReports,
  runReplay,
  summarizeTrace,
  syntheticTrace,
  type Trace,
} from "../src/replay/index.ts";
import { ROUTING_POLICIES, type RouterMode } from "../src/router/index.ts";
import { table } from "./harness.ts";

/**
 * Two questions. How fast does replay run: target, the 12,031 rows of the conversation trace on 16 workers within 20 s. And
 * what does KV-aware routing give, in simulated time, over round-robin and least-loaded: on that trace at its own pace and
 * near saturation, and where it cannot help (prompts that share nothing). Name the folder of the published traces in
 * DYN_TRACES; without it the committed 200 rows stand in, which are too few to fill a cache.
 *
 * Simulated: engines (default mocker: 1,048,576 tokens of KV cache each, default polynomials) and time. Real: router,
 * KV index, hashing. Left out: network and frontend.
 */
const TRACE_FILE = "mooncake_fast25_conversation_trace.jsonl";
const SAMPLE = join(import.meta.dirname, "..", "src", "replay", "fixtures", "mooncake-conversation-200.jsonl");
const MODES: readonly RouterMode[] = ["round-robin", "least-loaded", "kv", "stay-until-saturated"];

interface Case {
  readonly title: string;
  readonly trace: Trace;
  readonly workers: number;
  readonly speedup: number;
  /** The trace's arrivals are binned to about 3 s. */
  readonly smearMs: number;
}

async function cases(): Promise<Case[]> {
  const folder = process.env.DYN_TRACES ?? "";
  const path = folder !== "" && existsSync(join(folder, TRACE_FILE)) ? join(folder, TRACE_FILE) : SAMPLE;
  const trace = await readTrace(path);
  const workers = path === SAMPLE ? 4 : 16;
  const unique = syntheticTrace({ sessions: 3_000, inputTokens: 4_000, outputTokens: 200, intervalMs: 60, lengthSpread: 0.8 }); // prettier-ignore
  const turns = syntheticTrace({ sessions: 600, inputTokens: 4_000, outputTokens: 200, intervalMs: 500, turns: 6, turnTokens: 300, turnDelayMs: 5_000, sharedPrefixRatio: 0.5, groups: 30 }); // prettier-ignore
  return [
    { title: `${trace.name}, as recorded`, trace, workers, speedup: 1, smearMs: 3_000 },
    { title: `${trace.name}, 12 times as fast: near saturation`, trace, workers, speedup: 12, smearMs: 3_000 },
    { title: "chats of 6 turns, 30 system prompts", trace: turns, workers: 8, speedup: 1, smearMs: 0 },
    { title: "prompts that share nothing", trace: unique, workers: 8, speedup: 1, smearMs: 0 },
  ];
}

export async function run(): Promise<void> {
  const speeds: Record<string, string | number>[] = [];
  for (const { title, trace, workers, speedup, smearMs } of await cases()) {
    const { requests, newTokens, outputTokens, endlessCacheHitRate } = summarizeTrace(trace);
    console.log(
      `${title} (${workers} workers, ${requests} requests, ${newTokens} prompt and ${outputTokens} output tokens)`,
    );
    if (endlessCacheHitRate !== undefined) {
      console.log(`an endless cache would have ${(100 * endlessCacheHitRate).toFixed(1)} % of the blocks`);
    }
    const reports = [];
    for (const mode of MODES) {
      const startMs = performance.now();
      const arrivals = { kind: "schedule", speedup } as const;
      const report = await runReplay(trace, { policy: ROUTING_POLICIES[mode], workers, arrivals, smearMs });
      const seconds = (performance.now() - startMs) / 1_000;
      reports.push(report);
      speeds.push({ case: title, policy: mode, "took s": seconds, "times real time": Math.round(report.simulatedMs / 1_000 / seconds) }); // prettier-ignore
    }
    console.log(`\n${renderReports(reports)}`);
  }
  console.log(table(speeds));
}

if (import.meta.main) await run();
