import type { PreprocessedRequest } from "../../protocol/index.ts";
import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { randomId64 } from "../../std/index.ts";
import type { VllmEngineConfig } from "../config.ts";
import type { EngineOptions } from "../load-engine.ts";
import {
  ZmqKvFeed,
  attachEngine,
  kvEndpointsOf,
  launchEngine,
  parsePrometheus,
  sumOf,
  type AnswerReader,
  type AnswerSink,
  type EngineDialect,
  type EngineHttp,
  type ForeignEngine,
  type KvEndpoints,
  type ScrapedLoad,
} from "../foreign/index.ts";
import { VllmAnswerReader, vllmErrorOf } from "./vllm-answer.ts";
import { isVllmNoise, readVllmArgs, vllmLaunchPlan, vllmPhaseOf } from "./vllm-launch.ts";
import { judgeVllm, situationOfLaunch, situationOfRunning } from "./vllm-known-bad.ts";
import { probeVllm, type VllmFacts } from "./vllm-probe.ts";
import { vllmCall } from "./vllm-request.ts";
import { VllmTransfer, readKvTransfer, type VllmKvTransfer } from "./vllm-transfer.ts";

/**
 * A vLLM server as an engine: one that runs already (`config.url`), or one that this worker starts and ends. Loaded by
 * `loadEngine`; not started.
 */
export async function createVllmEngine(config: VllmEngineConfig, options: EngineOptions): Promise<ForeignEngine> {
  const { logger } = options;
  const feedOf = (kv: KvEndpoints | undefined) => (kv === undefined ? undefined : new ZmqKvFeed(kv, options));
  const { launch } = config;
  if (launch === undefined) {
    return attachEngine(config, options, (url, host) => {
      const given = config.kvEvents ? config.kvEventsConfig : undefined;
      const kv = given === undefined ? undefined : kvEndpointsOf(given, host);
      return {
        dialect: new VllmDialect(config, kv !== undefined, attachedTransfer(config), logger),
        url,
        apiKey: config.apiKey,
        feed: feedOf(kv),
      };
    });
  }
  const args = readVllmArgs(launch.args);
  return launchEngine(config, options, async (ports) => {
    const port = args.port ?? launch.port;
    const http =
      args.socketPath === undefined ? await ports.http(port, args.port === undefined ? "--engine-port" : "--port") : 0;
    const ranks = args.dataParallelSize;
    const sideChannel = config.role === undefined || config.role === "agg" ? 0 : await ports.free(ranks);
    const all = { http, events: await ports.free(ranks), replay: await ports.free(ranks), sideChannel };
    const topic = `dynamo-${randomId64().toString(16)}`;
    const { command, url, apiKey, kv, kvTransfer } = vllmLaunchPlan(config, args, all, process.env, topic);
    judgeVllm(await situationOfLaunch(config, command), config, logger);
    const sizes = {
      maxSequences: args.maxSequences || config.maxSequences,
      maxBatchedTokens: args.maxBatchedTokens || config.maxBatchedTokens,
    };
    return {
      name: "vLLM",
      dialect: new VllmDialect({ ...config, ...sizes }, kv !== undefined, kvTransfer, logger),
      command,
      url,
      apiKey,
      feed: feedOf(kv),
      phaseOf: vllmPhaseOf,
      isNoise: isVllmNoise,
    };
  });
}

/** What connector a server has, it does not tell: whoever started it does. */
function attachedTransfer({ role, kvTransferConfig }: VllmEngineConfig): VllmKvTransfer | undefined {
  if (role === undefined || role === "agg") return undefined;
  if (kvTransferConfig === undefined) {
    throw new DynamoError(
      "invalid-config",
      `--disaggregation-mode ${role} with --engine-url: give --kv-transfer-config as that server was started with (JSON), or start it by this worker`,
    );
  }
  return readKvTransfer({ role, given: kvTransferConfig, isCpu: false });
}

const HEALTH_TIMEOUT_MS = 5_000;
const CLEAR_TIMEOUT_MS = 30_000;
const LOAD_METRICS = new Set([
  "vllm:num_requests_running",
  "vllm:num_requests_waiting",
  "vllm:kv_cache_usage_perc",
  "vllm:gpu_cache_usage_perc",
  "vllm:iteration_tokens_total_count",
  "vllm:num_preemptions_total",
  "process_start_time_seconds",
]);

class VllmDialect implements EngineDialect {
  readonly name = "vllm";
  readonly metricsPrefix = "vllm:";
  readonly metricsPath = "/metrics";
  readonly transfer: VllmTransfer | undefined;
  readonly #config: VllmEngineConfig;
  readonly #wantsKvEvents: boolean;
  readonly #logger: Logger;

  constructor(
    config: VllmEngineConfig,
    wantsKvEvents: boolean,
    kvTransfer: VllmKvTransfer | undefined,
    logger: Logger,
  ) {
    this.transfer = kvTransfer === undefined ? undefined : new VllmTransfer(kvTransfer, config.modelPath);
    this.#config = config;
    this.#logger = logger;
    this.#wantsKvEvents = wantsKvEvents;
  }

  async isUp(http: EngineHttp, signal: AbortSignal): Promise<boolean> {
    return (await http.ask("GET", "/health", { timeoutMs: HEALTH_TIMEOUT_MS, signal })).status === 200;
  }

  async probe(http: EngineHttp, signal: AbortSignal): Promise<VllmFacts> {
    const { engineModel, maxSequences, maxBatchedTokens, blockSizeTokens, vocabularySize, tokenizerSamples } =
      this.#config;
    const facts = await probeVllm({
      http,
      signal,
      engineModel,
      maxSequences,
      maxBatchedTokens,
      blockSizeTokens,
      vocabularySize,
      tokenizerSamples,
      kvTransfer: this.#config.role === "prefill" ? this.transfer?.connector : undefined,
    });
    if (this.#config.launch === undefined) {
      const { engineVersion: version, blockSizeTokens, hasPrefixCache } = facts;
      const config = { ...this.#config, kvEvents: this.#wantsKvEvents };
      judgeVllm(await situationOfRunning(config, { version, blockSizeTokens, hasPrefixCache }), config, this.#logger);
    }
    return facts;
  }

  call(request: PreprocessedRequest, facts: VllmFacts): ReturnType<EngineDialect["call"]> {
    return vllmCall(request, facts, { route: facts.route, takesPriority: facts.takesPriority });
  }

  read(request: PreprocessedRequest, facts: VllmFacts, sink: AnswerSink, isPrefill: boolean): AnswerReader {
    // Its files are there when the answer is; it says nothing.
    if (isPrefill && this.transfer?.connector === "example") sink.transfer({});
    return new VllmAnswerReader(request, facts.route, sink);
  }

  errorOf(status: number, text: string): DynamoError {
    return vllmErrorOf(status, text);
  }

  loadOf(metricsText: string): ScrapedLoad {
    const samples = parsePrometheus(metricsText, LOAD_METRICS);
    const runningRequests = sumOf(samples, "vllm:num_requests_running") ?? 0;
    const waitingRequests = sumOf(samples, "vllm:num_requests_waiting") ?? 0;
    const usages = samples.filter(({ name }) => name.endsWith("_cache_usage_perc"));
    const usage = usages.reduce((sum, { value }) => sum + value, 0) / Math.max(1, usages.length);
    return {
      runningRequests,
      waitingRequests,
      // Gauges move with steps only: an idle server shows what its last step used.
      kvUsage: usages.length === 0 ? undefined : runningRequests + waitingRequests === 0 ? 0 : usage,
      steps: sumOf(samples, "vllm:iteration_tokens_total_count"),
      preemptions: sumOf(samples, "vllm:num_preemptions_total") ?? 0,
      life: sumOf(samples, "process_start_time_seconds"),
    };
  }

  async clearCache(http: EngineHttp): Promise<boolean> {
    const { status, text } = await http.ask("POST", "/reset_prefix_cache", { timeoutMs: CLEAR_TIMEOUT_MS });
    if (status === 404 || status === 405) {
      throw new DynamoError(
        "unsupported-operation",
        "the vLLM server does not let its cache be cleared; it does in development mode (VLLM_SERVER_DEV_MODE=1), which is not for a port that others reach",
      );
    }
    if (status !== 200) throw vllmErrorOf(status, text);
    // Versions before 0.2x answer without a body and do as if it had worked.
    return !/"success"\s*:\s*false/.test(text);
  }
}
