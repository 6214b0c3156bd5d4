import { availableParallelism } from "node:os";
import { basename } from "node:path";
import { DynamoError } from "../errors/index.ts";
import type { FrontendConfig, RouterConfig } from "../frontend/index.ts";
import { DEFAULT_MODEL, ModelStore, unknownModel, type StoredModel } from "../model/index.ts";
import type { RouterServiceConfig } from "../router-service/index.ts";
import type { EngineConfig, HandoffConfig, WorkerConfig } from "../worker/index.ts";
import { kvTiersConfig } from "./kv-tiers-config.ts";
import { isEngineCommand, type CommandName, type EngineCommandName, type OptionValues } from "./options.ts";

/** Options as the roles' own configurations. Units change here: the command line has seconds and MiB, the code ms and bytes. */
export function frontendConfig(values: OptionValues, routerMode: string = values["router-mode"]): FrontendConfig {
  return {
    namespace: values.namespace,
    httpHost: values["http-host"],
    httpPort: values["http-port"],
    // With a router service the mode is only for when none answers, and that must not need what only a service knows.
    routerMode: values["router-service"] ? "round-robin" : routerMode,
    router: routerConfig(values),
    routerReplicaSync: values["router-replica-sync"],
    ...(values["router-service"]
      ? { routerService: { answerTimeoutMs: milliseconds(values["router-service-timeout-secs"]) } }
      : {}),
    ...(values["admin-key"] === undefined ? {} : { adminKey: values["admin-key"] }),
    drainTimeoutMs: milliseconds(values["graceful-shutdown-timeout-secs"]),
    lingerMs: milliseconds(values["graceful-shutdown-grace-period-secs"]),
    migration: {
      limit: values["migration-limit"],
      maxSequenceTokens: values["migration-max-seq-len"] ?? Infinity,
    },
    stallLimitMs: milliseconds(values["worker-stall-timeout-secs"]),
    disagg: values.disagg,
    handoffTimeoutMs: milliseconds(values["handoff-timeout-secs"]),
    decodeWaitMs: milliseconds(values["disagg-wait-secs"]),
    limits: {
      bodyBytes: values["http-body-limit-mb"] * 1024 * 1024,
      headersTimeoutMs: milliseconds(values["http-headers-timeout-secs"]),
      bodyTimeoutMs: milliseconds(values["http-body-timeout-secs"]),
      messages: values["max-messages"],
      n: values["max-choices"],
      stopStrings: values["max-stop-strings"],
      prompts: values["max-prompts"],
      concurrentRequests: values["max-concurrent-requests"],
      concurrentPerModel: values["max-concurrent-requests-per-model"],
      capacityShare: 1,
      queuedRequests: values["max-queued-requests"],
      requestTimeoutMs: milliseconds(values["request-timeout-secs"]),
      queueTimeoutMs: milliseconds(values["queue-timeout-secs"]),
      firstTokenTimeoutMs: milliseconds(values["first-token-timeout-secs"]),
      idleTimeoutMs: milliseconds(values["stream-idle-timeout-secs"]),
      responseBufferBytes: values["response-buffer-kb"] * 1024,
      connections: values["http-connections"],
      tokenizerCacheBytes: values["tokenizer-cache-bytes"],
    },
  };
}

export function routerServiceConfig(
  values: OptionValues,
  routerMode: string = values["router-mode"],
): RouterServiceConfig {
  return {
    namespace: values.namespace,
    routerMode,
    router: routerConfig(values),
    replicaSync: values["router-replica-sync"],
    systemPort: values["system-port"],
  };
}

export function routerConfig(values: OptionValues): Partial<RouterConfig> {
  const blocks = values["active-decode-blocks-threshold"];
  const tokens = values["active-prefill-tokens-threshold"];
  const fraction = values["active-prefill-tokens-threshold-frac"];
  return {
    overlapScoreCredit: values["router-kv-overlap-score-credit"],
    overlapScoreCreditDecay: values["router-kv-overlap-score-credit-decay"],
    prefillLoadScale: values["router-prefill-load-scale"],
    hostCacheHitWeight: values["router-host-cache-hit-weight"],
    diskCacheHitWeight: values["router-disk-cache-hit-weight"],
    sharedCacheMultiplier: values["shared-cache-multiplier"],
    decodeActiveRequestWeight: values["router-decode-active-request-weight"],
    temperature: values["router-temperature"],
    maxImbalance: values["router-max-imbalance"],
    kvEvents: values["router-kv-events"],
    ttlMs: milliseconds(values["router-ttl-secs"]),
    predictedTtlMs: optionalMilliseconds(values["router-predicted-ttl-secs"]),
    trackActiveBlocks: values["router-track-active-blocks"],
    trackOutputBlocks: values["router-track-output-blocks"],
    trackPrefillTokens: values["router-track-prefill-tokens"],
    assumeKvReuse: values["router-assume-kv-reuse"],
    queueThreshold: values["router-queue-threshold"],
    queuePolicy: values["router-queue-policy"],
    queueLimit: values["router-queue-limit"],
    overlapRefreshAfterMs: milliseconds(values["router-overlap-refresh-after-secs"]),
    sessionAffinityTtlMs: optionalMilliseconds(values["router-session-affinity-ttl-secs"]),
    busyThresholds: {
      ...(blocks === undefined ? {} : { activeDecodeBlocks: blocks }),
      ...(tokens === undefined ? {} : { activePrefillTokens: tokens }),
      ...(fraction === undefined ? {} : { activePrefillTokensFrac: fraction }),
    },
  };
}

function optionalMilliseconds(seconds: number | undefined): number | undefined {
  return seconds === undefined ? undefined : milliseconds(seconds);
}

/**
 * Throws `model-unavailable` when the model is not on this machine: a worker does not pull. `foreign`: of an engine that is a
 * process of its own, which has its own ways to a model.
 */
export function workerConfig(
  values: OptionValues,
  store: ModelStore,
  env: NodeJS.ProcessEnv,
  foreign?: EngineConfig,
): WorkerConfig {
  const model = foreign === undefined ? storedModel(values, store) : undefined;
  const kvTiers = kvTiersConfig(values, env);
  return {
    namespace: values.namespace,
    component: values.component,
    engine: foreign ?? engineConfig(values, model),
    modelName: foreign === undefined ? servedName(values, model) : foreignName(values, foreign),
    ...(values["custom-jinja-template"] === undefined ? {} : { chatTemplatePath: values["custom-jinja-template"] }),
    ...(kvTiers === undefined ? {} : { kvTiers }),
    engineStallMs: milliseconds(values["engine-stall-timeout-secs"]),
    ...(values["engine-request-limit"] === undefined ? {} : { maxEngineRequests: values["engine-request-limit"] }),
    maxQueuedRequests: values["request-queue-limit"],
    role: values["disaggregation-mode"],
    handoff: handoffConfig(values),
    drainTimeoutMs: milliseconds(values["graceful-shutdown-timeout-secs"]),
    systemPort: values["system-port"],
  };
}

/** The transfer plane listens where the request plane does, on a port of its own. */
export function handoffConfig(values: OptionValues): HandoffConfig {
  const advertiseHost = values["tcp-rpc-advertise-host"];
  const clusterSecret = values["cluster-secret"];
  return {
    memoryBytes: values["handoff-memory-mb"] * 1024 * 1024,
    leaseMs: milliseconds(values["handoff-lease-secs"]),
    pullTimeoutMs: milliseconds(values["handoff-timeout-secs"]),
    transfer: {
      ...(values["transfer-backend"] === "tcp" ? { shm: false as const } : {}),
      // Messages go over the socket of either.
      ...(values["transfer-backend"] === "shm" ? { shm: {} } : {}),
      tcp: { host: values["tcp-rpc-host"], ...(advertiseHost === undefined ? {} : { advertiseHost }) },
      ...(clusterSecret === undefined ? {} : { clusterSecret }),
      slowPath: values["transfer-slow-path"],
      slowGigabytesPerSecond: values["transfer-slow-gbps"],
    },
  };
}

function engineConfig(values: OptionValues, model: StoredModel | undefined): EngineConfig {
  const maxSequences = values["max-num-seqs"];
  const blockSizeTokens = values["kv-cache-block-size"];
  if (values.engine === "echo" || model === undefined) {
    return {
      kind: "echo",
      contextLength: values["context-length"] === 0 ? ECHO_CONTEXT_LENGTH : values["context-length"],
      maxSequences,
      blockSizeTokens,
      stepMs: values["echo-step-ms"],
      ...(model === undefined ? {} : { modelPath: model.path }),
    };
  }
  if (maxSequences > MAX_LLAMA_SEQUENCES) {
    throw new DynamoError(
      "invalid-config",
      `--max-num-seqs: expected at most ${MAX_LLAMA_SEQUENCES} with --engine llama, got ${maxSequences}`,
    );
  }
  return {
    kind: "llama",
    modelPath: model.path,
    contextLength: values["context-length"],
    kvCacheTokens: values["kv-cache-tokens"],
    maxSequences,
    maxBatchedTokens: values["max-num-batched-tokens"],
    blockSizeTokens,
    threads: values.threads === 0 ? availableParallelism() : values.threads,
    batchInvariant: values["batch-invariant"] === "on",
  };
}

const ECHO_CONTEXT_LENGTH = 8_192;
/** libllama's own bound on sequences of one context; some are kept for cached prefixes. */
const MAX_LLAMA_SEQUENCES = 256;

/** One that is a process of its own. */
export function isForeignEngine(engine: OptionValues["engine"]): boolean {
  return engine !== "llama" && engine !== "echo";
}

/** One that is spoken to in tokens, with the tokenizer of its model's folder. */
export function isTokenEngine(engine: OptionValues["engine"]): engine is EngineCommandName {
  return isEngineCommand(engine as CommandName);
}

/** The name clients use, of the model of an engine that is a process of its own. */
export function foreignName(
  values: OptionValues,
  { modelPath, modelName }: { readonly modelPath?: string; readonly modelName?: string },
): string {
  return values["model-name"] ?? values["engine-model"] ?? modelName ?? basename(modelPath ?? "model");
}

/** The name of `--model`, or of the model that is served when none is named; undefined for echo without a model. */
export function wantedModel(values: OptionValues): string | undefined {
  return values.model ?? (values.engine === "echo" ? undefined : DEFAULT_MODEL);
}

export function servedName(values: OptionValues, model: StoredModel | undefined): string {
  return values["model-name"] ?? model?.name ?? "echo";
}

function storedModel(values: OptionValues, store: ModelStore): StoredModel | undefined {
  const wanted = wantedModel(values);
  if (wanted === undefined) return undefined;
  const stored = store.resolve(wanted);
  if (stored !== undefined) return stored;
  if (!store.canPull(wanted)) throw unknownModel(wanted);
  throw new DynamoError(
    "model-unavailable",
    `${wanted} is not in ${store.folder}; run "dynamo model pull ${wanted}" first`,
  );
}

/** The store that `--model-dir` names. */
export function openStore(values: OptionValues, env: NodeJS.ProcessEnv): ModelStore {
  const folder = values["model-dir"];
  return new ModelStore({ env: folder === undefined ? env : { ...env, DYN_MODEL_DIR: folder } });
}

export function milliseconds(seconds: number): number {
  return Math.round(seconds * 1_000);
}
