import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { LlamaServerEngineConfig } from "../config.ts";
import type { EngineOptions } from "../load-engine.ts";
import {
  EngineQuestions,
  SlotCache,
  TokenBytes,
  attachEngine,
  launchEngine,
  parsePrometheus,
  sumOf,
  type AnswerReader,
  type AnswerSink,
  type CacheEstimate,
  type EngineDialect,
  type EngineHttp,
  type ForeignEngine,
  type ScrapedLoad,
} from "../foreign/index.ts";
import { LlamaServerAnswerReader, llamaServerErrorOf } from "./llama-server-answer.ts";
import {
  isLlamaServerNoise,
  llamaServerCommand,
  llamaServerPhaseOf,
  readLlamaServerArgs,
} from "./llama-server-launch.ts";
import { probeLlamaServer, type LlamaServerFacts, type LoadSource } from "./llama-server-probe.ts";
import { llamaServerCall, llamaServerRefusal } from "./llama-server-request.ts";

/** llama.cpp's server as an engine: one that runs already (`config.url`), or one that this worker starts and ends. */
export async function createLlamaServerEngine(
  config: LlamaServerEngineConfig,
  options: EngineOptions,
): Promise<ForeignEngine> {
  const dialect = new LlamaServerDialect(config);
  const { launch, apiKey } = config;
  if (launch === undefined) return attachEngine(config, options, (url) => ({ dialect, url, apiKey, feed: undefined }));
  const args = readLlamaServerArgs(launch.args);
  return launchEngine(config, options, async (ports) => {
    const port = await ports.http(args.port ?? launch.port, args.port === undefined ? "--engine-port" : "--port");
    return {
      name: "llama-server",
      dialect,
      url: `http://127.0.0.1:${port}`,
      apiKey: args.apiKey ?? apiKey,
      feed: undefined,
      command: llamaServerCommand(config, port, process.env),
      phaseOf: llamaServerPhaseOf,
      isNoise: isLlamaServerNoise,
    };
  });
}

const ASK_MS = 5_000;
const LOAD_METRICS = new Set([
  "llamacpp:requests_processing",
  "llamacpp:requests_deferred",
  "llamacpp:n_decode_total",
  "llamacpp:prompt_tokens_total",
]);
/** Where its load is, best first. */
const LOAD_PATHS: Readonly<Record<LoadSource, string>> = { metrics: "/metrics", slots: "/slots", health: "/health" };

class LlamaServerDialect implements EngineDialect {
  readonly name = "llama-server";
  readonly metricsPrefix = "llamacpp:";
  readonly #config: LlamaServerEngineConfig;
  readonly #vocabulary: TokenBytes;
  #source: LoadSource = "health";
  #slots = 0;
  /** Counters only grow in one life of a server: that is how a new one shows. */
  #life = 0;
  #counted = 0;

  constructor(config: LlamaServerEngineConfig) {
    this.#config = config;
    this.#vocabulary = new TokenBytes(config.tokenizer);
  }

  get metricsPath(): string {
    return LOAD_PATHS[this.#source];
  }

  async isUp(http: EngineHttp, signal: AbortSignal): Promise<boolean> {
    // 503 while it loads its model.
    return (await http.ask("GET", "/health", { timeoutMs: ASK_MS, signal })).status === 200;
  }

  async probe(http: EngineHttp, signal: AbortSignal): Promise<LlamaServerFacts> {
    this.#vocabulary.prepare();
    const facts = await probeLlamaServer(new EngineQuestions("llama.cpp", http, signal), this.#config);
    this.#source = facts.loadSource;
    this.#slots = facts.maxSequences;
    this.#life++;
    this.#counted = 0;
    return { ...facts, life: facts.loadSource === "metrics" ? this.#life : undefined };
  }

  refusal(request: PreprocessedRequest, facts: LlamaServerFacts): DynamoError | undefined {
    return llamaServerRefusal(request, facts);
  }

  call(request: PreprocessedRequest, facts: LlamaServerFacts): ReturnType<EngineDialect["call"]> {
    return llamaServerCall(request, facts);
  }

  read(request: PreprocessedRequest, _facts: LlamaServerFacts, sink: AnswerSink): AnswerReader {
    return new LlamaServerAnswerReader(request, this.#vocabulary, sink);
  }

  errorOf(status: number, text: string): DynamoError {
    return llamaServerErrorOf(status, text);
  }

  estimate(facts: LlamaServerFacts, dpRank: number): CacheEstimate {
    return new SlotCache({ blockSizeTokens: facts.blockSizeTokens, slots: facts.maxSequences, dpRank });
  }

  loadOf(text: string): ScrapedLoad {
    const nothing = { runningRequests: 0, waitingRequests: 0, kvUsage: undefined, steps: undefined, preemptions: 0, life: undefined };
    if (this.#source === "health") return nothing;
    if (this.#source === "slots") {
      const slots = JSON.parse(text) as readonly { readonly is_processing?: boolean }[];
      return { ...nothing, runningRequests: slots.filter((slot) => slot.is_processing === true).length };
    }
    const samples = parsePrometheus(text, LOAD_METRICS);
    const steps = sumOf(samples, "llamacpp:n_decode_total") ?? 0;
    const counted = steps + (sumOf(samples, "llamacpp:prompt_tokens_total") ?? 0);
    if (counted < this.#counted) this.#life++;
    this.#counted = counted;
    return {
      ...nothing,
      runningRequests: sumOf(samples, "llamacpp:requests_processing") ?? 0,
      waitingRequests: sumOf(samples, "llamacpp:requests_deferred") ?? 0,
      steps,
      life: this.#life,
    };
  }

  async clearCache(http: EngineHttp): Promise<boolean> {
    for (let slot = 0; slot < this.#slots; slot++) {
      const { status, text } = await http.ask("POST", `/slots/${slot}?action=erase`, { body: "{}", timeoutMs: ASK_MS });
      if (status === 501 || status === 404) {
        throw new DynamoError(
          "unsupported-operation",
          "the llama.cpp server does not let its slots be erased; it does with --slot-save-path FOLDER",
        );
      }
      if (status !== 200) throw llamaServerErrorOf(status, text);
    }
    return true;
  }
} // prettier-ignore
