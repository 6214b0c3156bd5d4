import type { PreprocessedRequest } from "../../protocol/index.ts";
import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { randomId64 } from "../../std/index.ts";
import type { VllmEngineConfig } from "../config.ts";
import type { EngineOptions } from "../load-engine.ts";
import {
  EngineHttp,
  EngineServer,
  ForeignEngine,
  ZmqKvFeed,
  claimFreePorts,
  claimName,
  claimPort,
  kvEndpointsOf,
  parseEngineUrl,
  parsePrometheus,
  sumOf,
  type AnswerReader,
  type AnswerSink,
  type EngineDialect,
  type KvEndpoints,
  type PortClaim,
  type ScrapedLoad,
} from "../foreign/index.ts";
import { VllmAnswerReader, vllmErrorOf } from "./vllm-answer.ts";
import { isVllmNoise, readVllmArgs, vllmLaunchPlan, vllmPhaseOf, type VllmArgs } from "./vllm-launch.ts";
import { judgeVllm, situationOfLaunch, situationOfRunning } from "./vllm-known-bad.ts";
import { probeVllm, type VllmFacts } from "./vllm-probe.ts";
import { vllmCall } from "./vllm-request.ts";
import { VllmTransfer, readKvTransfer, type VllmKvTransfer } from "./vllm-transfer.ts";

/**
 * A vLLM server as an engine: one that runs already (`config.url`), or one that this worker starts and ends. Loaded by
 * `loadEngine`; not started.
 */
export async function createVllmEngine(config: VllmEngineConfig, options: EngineOptions): Promise<ForeignEngine> {
  if (config.launch === undefined) return attachedEngine(config, options);
  const args = readVllmArgs(config.launch.args);
  const claims: PortClaim[] = [];
  const release = (): void => {
    for (const claim of claims.splice(0)) claim.release();
  };
  try {
    return await supervisedEngine(config, config.launch, args, options, claims, release);
  } catch (thrown) {
    release();
    throw thrown;
  }
}

async function supervisedEngine(
  config: VllmEngineConfig,
  launch: NonNullable<VllmEngineConfig["launch"]>,
  args: VllmArgs,
  { clock, logger }: EngineOptions,
  claims: PortClaim[],
  release: () => void,
): Promise<ForeignEngine> {
  const claim = async (count: number): Promise<number> => {
    const taken = await claimFreePorts(HOST, count, Math.random);
    claims.push(taken);
    return taken.port;
  };
  const wanted = args.port ?? launch.port;
  let http = 0;
  if (args.socketPath === undefined && wanted !== 0) {
    claims.push(await claimPort(HOST, wanted, args.port === undefined ? "--engine-port" : "--port"));
    http = wanted;
  } else if (args.socketPath === undefined) http = await claim(1);
  const ranks = args.dataParallelSize;
  const sideChannel = config.role === undefined || config.role === "agg" ? 0 : await claim(ranks);
  const ports = { http, events: await claim(ranks), replay: await claim(ranks), sideChannel };
  const topic = `dynamo-${randomId64().toString(16)}`;
  const plan = vllmLaunchPlan(config, args, ports, process.env, topic);
  judgeVllm(await situationOfLaunch(config, plan.command), config, logger);
  const server = new EngineServer({
    name: "vLLM",
    launch: plan.command,
    clock,
    logger,
    phaseOf: vllmPhaseOf,
    isNoise: isVllmNoise,
    ...(launch.logPath === undefined ? {} : { logPath: launch.logPath }),
    onExit: (exit) => engine.onServerExit(exit),
  });
  const sizes = {
    maxSequences: args.maxSequences || config.maxSequences,
    maxBatchedTokens: args.maxBatchedTokens || config.maxBatchedTokens,
  };
  const engine: ForeignEngine = vllmEngine(
    { ...config, ...sizes },
    { clock, logger },
    { url: plan.url, apiKey: plan.apiKey, kv: plan.kv, kvTransfer: plan.kvTransfer, server, onStopped: release },
  );
  return engine;
}

const HOST = "127.0.0.1";

function attachedEngine(config: VllmEngineConfig, options: EngineOptions): ForeignEngine {
  const { url, kvEventsConfig, apiKey } = config;
  if (url === undefined) throw new DynamoError("internal", "a vLLM engine has an address or a command");
  const { origin, socketPath } = parseEngineUrl(url);
  const host = socketPath === undefined ? new URL(origin).hostname : HOST;
  const kv = config.kvEvents && kvEventsConfig !== undefined ? kvEndpointsOf(kvEventsConfig, host) : undefined;
  const claim = claimName(`attached-${url}`);
  if (typeof claim === "number") {
    throw new DynamoError(
      "address-in-use",
      `process ${claim} is a worker of the engine at ${url} already; a second one would count its load and its cache twice`,
    );
  }
  const kvTransfer = attachedTransfer(config);
  return vllmEngine(config, options, { url, apiKey, kv, kvTransfer, onStopped: claim });
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

interface Place {
  readonly url: string;
  readonly apiKey: string | undefined;
  readonly kv: KvEndpoints | undefined;
  readonly kvTransfer: VllmKvTransfer | undefined;
  readonly server?: EngineServer;
  readonly onStopped?: () => void;
}

function vllmEngine(
  config: VllmEngineConfig,
  { clock, logger }: EngineOptions,
  { url, apiKey, kv, kvTransfer, server, onStopped }: Place,
): ForeignEngine {
  return new ForeignEngine({
    dialect: new VllmDialect(config, kv !== undefined, kvTransfer, logger),
    http: new EngineHttp({ url, ...(apiKey === undefined ? {} : { apiKey }) }),
    feed: kv === undefined ? undefined : new ZmqKvFeed(kv, { clock, logger }),
    ...(server === undefined ? {} : { server }),
    ...(onStopped === undefined ? {} : { onStopped }),
    clock,
    logger,
    vocabularySize: config.vocabularySize,
    startTimeoutMs: config.startTimeoutMs,
    metricsIntervalMs: config.metricsIntervalMs,
    metricsMaxAgeMs: config.metricsMaxAgeMs,
    hangTimeoutMs: config.hangTimeoutMs,
  });
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
