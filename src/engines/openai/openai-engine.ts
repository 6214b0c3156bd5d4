import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { OpenAiEngineConfig } from "../config.ts";
import type { EngineOptions } from "../load-engine.ts";
import {
  TokenBytes,
  attachEngine,
  parsePrometheus,
  sumOf,
  type AnswerHeaders,
  type AnswerReader,
  type AnswerSink,
  type EngineDialect,
  type EngineHttp,
  type ForeignEngine,
  type ScrapedLoad,
} from "../foreign/index.ts";
import { OpenAiAnswerReader, openAiErrorOf } from "./openai-answer.ts";
import { probeOpenAi, refusalOf, type OpenAiFacts } from "./openai-probe.ts";
import { openAiCall, openAiRefusal } from "./openai-request.ts";

/** Any server with the OpenAI API, which runs already, as an engine. */
export function createOpenAiEngine(config: OpenAiEngineConfig, options: EngineOptions): ForeignEngine {
  const { origin, basePath } = splitBaseUrl(config.url ?? "");
  const { apiKey, headers } = config;
  const dialect = new OpenAiDialect(config, basePath, options.clock);
  const paced =
    config.metrics === undefined && config.metricsIntervalMs === undefined
      ? { ...config, metricsIntervalMs: MODELS_INTERVAL_MS }
      : config;
  return attachEngine({ ...paced, url: origin }, options, (url) => ({
    dialect,
    url,
    apiKey,
    ...(headers === undefined ? {} : { headers }),
    feed: undefined,
  }));
}

/** Where only its models can be asked for: to see that it is there. */
const MODELS_INTERVAL_MS = 10_000;
const ASK_MS = 10_000;

/** `http://host:port/openai/v1` as clients of the API write it; no path means `/v1`. Throws `invalid-config`. */
export function splitBaseUrl(url: string): { readonly origin: string; readonly basePath: string } {
  if (url.startsWith("unix:")) return { origin: url, basePath: "/v1" };
  const parsed = URL.parse(url);
  if (parsed === null || !["http:", "https:"].includes(parsed.protocol) || parsed.search !== "") {
    throw new DynamoError(
      "invalid-config",
      `--engine-url: expected http://host:port/v1 or https://host/v1, got ${url}`,
    );
  }
  const path = parsed.pathname.replace(/\/+$/, "");
  return { origin: parsed.origin, basePath: path === "" ? "/v1" : path };
}

class OpenAiDialect implements EngineDialect {
  readonly name = "openai";
  readonly metricsPrefix: string;
  readonly metricsPath: string;
  readonly #config: OpenAiEngineConfig;
  readonly #basePath: string;
  readonly #vocabulary: TokenBytes;
  readonly #wanted: ReadonlySet<string>;
  readonly #clock: EngineOptions["clock"];

  constructor(config: OpenAiEngineConfig, basePath: string, clock: EngineOptions["clock"]) {
    const { metrics } = config;
    this.#config = config;
    this.#basePath = basePath;
    this.#clock = clock;
    this.#vocabulary = new TokenBytes(config.tokenizer);
    this.metricsPath = metrics === undefined ? `${basePath}/models` : (metrics.path ?? "/metrics");
    // A prefix that no family has: what is not asked for is not passed on.
    this.metricsPrefix = metrics?.prefix ?? "\0";
    this.#wanted = new Set([metrics?.running, metrics?.waiting, metrics?.kvUsage].filter((name) => name !== undefined));
  }

  async isUp(http: EngineHttp, signal: AbortSignal): Promise<boolean> {
    const path = `${this.#basePath}/models`;
    const { status } = await http.ask("GET", path, { timeoutMs: ASK_MS, signal });
    if (status === 200) return true;
    const refusal = refusalOf(http.url, path, status);
    if (refusal !== undefined) throw refusal;
    return false;
  }

  probe(http: EngineHttp, signal: AbortSignal): Promise<OpenAiFacts> {
    this.#vocabulary.prepare();
    return probeOpenAi({ http, signal, config: this.#config, basePath: this.#basePath });
  }

  refusal(request: PreprocessedRequest, facts: OpenAiFacts): DynamoError | undefined {
    return openAiRefusal(request, facts);
  }

  call(request: PreprocessedRequest, facts: OpenAiFacts): ReturnType<EngineDialect["call"]> {
    return openAiCall(request, facts, this.#config.tokenizer);
  }

  read(request: PreprocessedRequest, facts: OpenAiFacts, sink: AnswerSink): AnswerReader {
    return new OpenAiAnswerReader(request, facts, this.#vocabulary, sink);
  }

  errorOf(status: number, text: string, headers: AnswerHeaders): DynamoError {
    return openAiErrorOf(status, text, headers, this.#clock.wallMs());
  }

  loadOf(text: string): ScrapedLoad {
    const { metrics } = this.#config;
    const samples = metrics === undefined ? [] : parsePrometheus(text, this.#wanted);
    const sum = (name: string | undefined): number | undefined => (name === undefined ? undefined : sumOf(samples, name));
    return {
      runningRequests: sum(metrics?.running) ?? 0,
      waitingRequests: sum(metrics?.waiting) ?? 0,
      kvUsage: sum(metrics?.kvUsage),
      steps: undefined,
      preemptions: 0,
      life: undefined,
    };
  }

  clearCache(): Promise<boolean> {
    return Promise.reject(
      new DynamoError("unsupported-operation", "the OpenAI API has no way to clear a server's cache"),
    );
  }
} // prettier-ignore
