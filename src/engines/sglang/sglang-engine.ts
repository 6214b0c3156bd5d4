import type { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import { randomId64 } from "../../std/index.ts";
import type { SglangEngineConfig } from "../config.ts";
import {
  ZmqKvFeed,
  attachEngine,
  launchEngine,
  parsePrometheus,
  sumOf,
  type AnswerReader,
  type AnswerSink,
  type DialectCall,
  type EngineDialect,
  type EngineHttp,
  type ForeignEngine,
  type KvEndpoints,
  type ScrapedLoad,
} from "../foreign/index.ts";
import type { EngineOptions } from "../load-engine.ts";
import { SglangAnswerReader, sglangErrorOf } from "./sglang-answer.ts";
import { isSglangNoise, readSglangArgs, sglangKvEndpoints, sglangLaunchPlan, sglangPhaseOf } from "./sglang-launch.ts";
import { probeSglang } from "./sglang-probe.ts";
import { sglangCall, type SglangFacts } from "./sglang-request.ts";
import { SglangTransfer, canaryCall, isCanary, transferBackendOf, wholeRefusal } from "./sglang-transfer.ts";

/**
 * An SGLang server as an engine: one that runs already (`config.url`), or one that this worker starts and ends. Loaded by
 * `loadEngine`; not started.
 */
export async function createSglangEngine(config: SglangEngineConfig, options: EngineOptions): Promise<ForeignEngine> {
  const feedOf = (kv: KvEndpoints | undefined) => (kv === undefined ? undefined : new ZmqKvFeed(kv, options));
  const { launch } = config;
  if (launch === undefined) {
    return attachEngine(config, options, (url, host) => {
      const given = config.kvEvents ? config.kvEventsConfig : undefined;
      const kv = given === undefined ? undefined : sglangKvEndpoints(given, host);
      return {
        dialect: new SglangDialect(config, kv !== undefined, host),
        url,
        apiKey: config.apiKey,
        feed: feedOf(kv),
      };
    });
  }
  const args = readSglangArgs(launch.args, config.kvEvents);
  return launchEngine(config, options, async (ports) => {
    const http = await ports.http(args.port ?? launch.port, args.port === undefined ? "--engine-port" : "--port");
    const ranks = args.dataParallelSize;
    const topic = `dynamo-${randomId64().toString(16)}`;
    const bootstrap = config.role === "prefill" ? await ports.free(1) : 0;
    const all = { http, bootstrap, events: await ports.free(ranks), replay: await ports.free(ranks) };
    const { command, url, apiKey, kv } = sglangLaunchPlan(config, args, all, process.env, topic);
    return {
      name: "SGLang",
      dialect: new SglangDialect(config, kv !== undefined, new URL(url).hostname),
      command,
      url,
      apiKey,
      feed: feedOf(kv),
      phaseOf: sglangPhaseOf,
      isNoise: isSglangNoise,
    };
  });
}

/** A healthy server takes a second or two: it generates a token for the answer, behind the prompts that run. */
const HEALTH_TIMEOUT_MS = 20_000;
const CLEAR_TIMEOUT_MS = 30_000;
/** With `_` in place of `:` in some versions. */
const NAMES = [
  "prompt_tokens_total",
  "generation_tokens_total",
  "num_retracted_reqs",
  "num_retractions_total",
] as const;
const METRICS = new Set(NAMES.flatMap((name) => [`sglang:${name}`, `sglang_${name}`]));

/** A rank in `/v1/loads`, or in the older `/get_load`, which counts the waiting ones twice and has no use of memory. */
interface RankLoad {
  readonly num_running_reqs?: number;
  readonly num_reqs?: number;
  readonly num_waiting_reqs?: number;
  readonly num_used_tokens?: number;
  readonly num_tokens?: number;
  readonly max_total_num_tokens?: number;
}

class SglangDialect implements EngineDialect {
  readonly name = "sglang";
  readonly metricsPrefix = "sglang";
  readonly metricsPath = "/metrics";
  readonly isLifeInEvents = true;
  loadPath: string | undefined;
  readonly #config: SglangEngineConfig;
  readonly #wantsKvEvents: boolean;
  #totalTokens = 0;
  /** Its metrics do not tell when the server started: counters that fell are those of another life. */
  #life = 0;
  #counted = 0;

  readonly transfer: SglangTransfer | undefined;
  /** Where decode servers reach this one. */
  readonly #host: string;

  constructor(config: SglangEngineConfig, wantsKvEvents: boolean, host: string) {
    const { role = "agg", kvTransferConfig } = config;
    this.#host = host;
    this.transfer = role === "agg" ? undefined : new SglangTransfer(role, transferBackendOf(kvTransferConfig));
    this.#config = config;
    this.#wantsKvEvents = wantsKvEvents;
  }

  async isUp(http: EngineHttp, signal: AbortSignal): Promise<boolean> {
    // One that does not answer for so long hangs, by the user's own word.
    const timeoutMs = Math.min(HEALTH_TIMEOUT_MS, this.#config.hangTimeoutMs ?? HEALTH_TIMEOUT_MS);
    return (await http.ask("GET", "/health", { timeoutMs, signal })).status === 200;
  }

  async probe(http: EngineHttp, signal: AbortSignal): Promise<SglangFacts> {
    const facts = await probeSglang({ config: this.#config, http, signal, wantsKvEvents: this.#wantsKvEvents });
    this.loadPath = facts.loadPath;
    if (this.transfer !== undefined) this.transfer.bootstrap = { host: this.#host, port: facts.bootstrapPort };
    this.#totalTokens = facts.totalBlocks * facts.blockSizeTokens;
    this.#counted = 0;
    return { ...facts, life: this.#life };
  }

  refusal(request: PreprocessedRequest, _facts: SglangFacts, isWhole: boolean): DynamoError | undefined {
    if (!isWhole || this.transfer === undefined || isCanary(request)) return undefined;
    return wholeRefusal(this.transfer.roles[0]!);
  }

  call(request: PreprocessedRequest, facts: SglangFacts): DialectCall {
    return this.transfer === undefined ? sglangCall(request, facts) : canaryCall(request, facts);
  }

  read(request: PreprocessedRequest, facts: SglangFacts, sink: AnswerSink): AnswerReader {
    return new SglangAnswerReader(request, facts.isIncremental, sink);
  }

  errorOf(status: number, text: string): DynamoError {
    return sglangErrorOf(status, text);
  }

  loadOf(metricsText: string, loadText = "[]"): ScrapedLoad {
    const samples = parsePrometheus(metricsText, METRICS);
    const count = (name: (typeof NAMES)[number]): number =>
      (sumOf(samples, `sglang:${name}`) ?? 0) + (sumOf(samples, `sglang_${name}`) ?? 0);
    const counted = count("prompt_tokens_total") + count("generation_tokens_total");
    if (counted < this.#counted) this.#life++;
    this.#counted = counted;
    const ranks = ranksOf(loadText);
    const sum = (of: (rank: RankLoad) => number): number => ranks.reduce((total, rank) => total + of(rank), 0);
    const waitingRequests = sum(({ num_waiting_reqs: waiting = 0 }) => waiting);
    return {
      runningRequests: sum(({ num_running_reqs: running, num_reqs: all = 0, num_waiting_reqs: waiting = 0 }) => running ?? all - waiting),
      waitingRequests,
      kvUsage: this.#usageOf(ranks),
      steps: undefined,
      preemptions: count("num_retractions_total") || count("num_retracted_reqs"),
      life: this.#life,
    };
  } // prettier-ignore

  #usageOf(ranks: readonly RankLoad[]): number | undefined {
    const used = ranks.reduce((total, { num_used_tokens: now, num_tokens: all }) => total + (now ?? all ?? 0), 0);
    const there = ranks.reduce((total, { max_total_num_tokens: most = this.#totalTokens }) => total + most, 0);
    return there === 0 ? undefined : Math.min(1, used / there);
  }

  async clearCache(http: EngineHttp): Promise<boolean> {
    const { status, text } = await http.ask("POST", "/flush_cache", { timeoutMs: CLEAR_TIMEOUT_MS });
    if (status === 200) return true;
    // Requests run or wait.
    if (status === 400) return false;
    throw sglangErrorOf(status, text);
  }
}

function ranksOf(text: string): readonly RankLoad[] {
  const body = JSON.parse(text) as readonly RankLoad[] | { readonly loads?: readonly RankLoad[] };
  return Array.isArray(body) ? (body as readonly RankLoad[]) : ((body as { readonly loads?: readonly RankLoad[] }).loads ?? []);
} // prettier-ignore
