import { rmSync, writeFileSync } from "node:fs";
import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";
import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { TrtllmEngineConfig } from "../config.ts";
import {
  PolledKvFeed,
  ZmqKvFeed,
  attachEngine,
  kvEndpointsOf,
  launchEngine,
  type AnswerReader,
  type AnswerSink,
  type DialectCall,
  type EngineDialect,
  type EngineHttp,
  type ForeignEngine,
  type KvFeed,
  type ScrapedLoad,
} from "../foreign/index.ts";
import type { EngineOptions } from "../load-engine.ts";
import { TrtllmAnswerReader, trtllmErrorOf } from "./trtllm-answer.ts";
import { isTrtllmNoise, readTrtllmArgs, trtllmLaunchPlan, trtllmPhaseOf } from "./trtllm-launch.ts";
import { probeTrtllm } from "./trtllm-probe.ts";
import { trtllmCall, trtllmRefusal, type TrtllmFacts } from "./trtllm-request.ts";
import { TrtllmTransfer } from "./trtllm-transfer.ts";

/**
 * A `trtllm-serve` as an engine: one that runs already (`config.url`), or one that this worker starts and ends. Loaded by
 * `loadEngine`; not started.
 */
export async function createTrtllmEngine(config: TrtllmEngineConfig, options: EngineOptions): Promise<ForeignEngine> {
  const { launch } = config;
  if (launch === undefined) {
    return attachEngine(config, options, (url, host) => {
      const feed = feedOf(config, options, host);
      return { dialect: new TrtllmDialect(config, feed), url, apiKey: config.apiKey, feed };
    });
  }
  const args = readTrtllmArgs(launch.args);
  return launchEngine(config, options, async (ports) => {
    const port = await ports.http(args.port ?? launch.port, args.port === undefined ? "--engine-port" : "--port");
    const path = join(tmpdir(), `dynamo-ts-trtllm-${userInfo().uid}-${port}.yaml`);
    const plan = trtllmLaunchPlan(config, args, port, path, process.env);
    if (plan.options !== undefined) writeFileSync(path, plan.options, { mode: 0o600 });
    const feed = feedOf(config, options, "127.0.0.1");
    const sizes = {
      contextLength: args.contextLength || config.contextLength,
      maxSequences: args.maxSequences || config.maxSequences,
      maxBatchedTokens: args.maxBatchedTokens || config.maxBatchedTokens,
    };
    return {
      name: "TensorRT-LLM",
      dialect: new TrtllmDialect({ ...config, ...sizes }, feed),
      command: plan.command,
      url: plan.url,
      apiKey: config.apiKey,
      feed,
      phaseOf: trtllmPhaseOf,
      isNoise: isTrtllmNoise,
      onStopped: () => rmSync(path, { force: true }),
    };
  });
}

/** Pushed where the server was told to, else fetched. */
function feedOf(config: TrtllmEngineConfig, options: EngineOptions, host: string): KvFeed | undefined {
  if (!config.kvEvents) return undefined;
  if (config.kvEventsConfig === undefined) return new PolledKvFeed(options);
  const kv = kvEndpointsOf(config.kvEventsConfig, host);
  return kv === undefined ? undefined : new ZmqKvFeed(kv, options);
}

const HEALTH_TIMEOUT_MS = 5_000;

/** Of one iteration of its loop. */
interface IterationStats {
  readonly iter?: number;
  readonly numActiveRequests?: number;
  readonly numQueuedRequests?: number;
  readonly kvCacheStats?: { readonly maxNumBlocks?: number; readonly usedNumBlocks?: number } | null;
}

class TrtllmDialect implements EngineDialect {
  readonly name = "trtllm";
  readonly metricsPrefix = "trtllm";
  metricsPath = "/metrics";
  readonly isLifeInEvents = true;
  readonly #config: TrtllmEngineConfig;
  readonly #feed: KvFeed | undefined;
  #newest: IterationStats | undefined;
  #emptyScrapes = 0;
  #life = 0;

  readonly transfer: TrtllmTransfer | undefined;

  constructor(config: TrtllmEngineConfig, feed: KvFeed | undefined) {
    const { role = "agg" } = config;
    this.transfer = role === "agg" ? undefined : new TrtllmTransfer(role);
    this.#config = config;
    this.#feed = feed;
  }

  /** The statistics are not in its Prometheus page. */
  get loadPath(): string | undefined {
    return this.metricsPath === "/metrics" ? undefined : "/metrics";
  }

  async isUp(http: EngineHttp, signal: AbortSignal): Promise<boolean> {
    return (await http.ask("GET", "/health", { timeoutMs: HEALTH_TIMEOUT_MS, signal })).status === 200;
  }

  async probe(http: EngineHttp, signal: AbortSignal): Promise<TrtllmFacts> {
    const polled = this.#feed instanceof PolledKvFeed ? this.#feed : undefined;
    const facts = await probeTrtllm({ config: this.#config, http, signal, polled, wantsKvEvents: this.#feed !== undefined }); // prettier-ignore
    this.metricsPath = facts.metricsPath;
    this.#newest = undefined;
    return { ...facts, life: this.#life };
  }

  refusal(request: PreprocessedRequest): DynamoError | undefined {
    return trtllmRefusal(request);
  }

  call(request: PreprocessedRequest, facts: TrtllmFacts): DialectCall {
    return trtllmCall(request, facts);
  }

  read(request: PreprocessedRequest, _facts: TrtllmFacts, sink: AnswerSink, isPrefill: boolean): AnswerReader {
    return new TrtllmAnswerReader(request, sink, isPrefill);
  }

  errorOf(status: number, text: string): DynamoError {
    return trtllmErrorOf(status, text);
  }

  /** The list has the iterations since it was asked for last; none = it stands still, or one takes long. */
  loadOf(metricsText: string, loadText = metricsText): ScrapedLoad {
    const newest = (JSON.parse(loadText) as IterationStats[]).at(-1);
    if (newest === undefined) this.#emptyScrapes++;
    else {
      this.#emptyScrapes = 0;
      // Another process counts from the beginning.
      if ((newest.iter ?? 0) < (this.#newest?.iter ?? 0)) this.#life++;
      this.#newest = newest;
    }
    const isIdle = this.#emptyScrapes > 1 || this.#newest === undefined;
    const { numActiveRequests: active = 0, numQueuedRequests: queued = 0, kvCacheStats, iter } = this.#newest ?? {};
    const { usedNumBlocks: used, maxNumBlocks: most } = kvCacheStats ?? {};
    return {
      runningRequests: isIdle ? 0 : active,
      waitingRequests: isIdle ? 0 : queued,
      kvUsage: used === undefined || most === undefined || most === 0 ? undefined : isIdle ? 0 : used / most,
      steps: iter,
      preemptions: 0,
      life: this.#life,
    };
  }

  clearCache(): Promise<boolean> {
    return Promise.reject(
      new DynamoError("unsupported-operation", "a TensorRT-LLM server does not let its cache be cleared"),
    );
  }
}
