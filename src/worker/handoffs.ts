import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Logger, Metrics } from "../observability/index.ts";
import {
  decodeHandoffAsk,
  encodeHandoff,
  promptLengthOf,
  type OfferedHandoff,
  type PreprocessedRequest,
  type PullResult,
} from "../protocol/index.ts";
import type { EndpointHandler, RequestPlaneClient, ServerStream } from "../runtime/request-plane/index.ts";
import type { Clock, Random } from "../std/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import { TransferAgent, type Region, type TransferAgentOptions } from "../transfer/index.ts";
import { HandoffPuller } from "./handoff-pull.ts";
import { HandoffStore } from "./handoff-store.ts";

/** Sizes and times of handoffs; `cli/` fills it. */
export interface HandoffConfig {
  /** Memory for blocks that wait to be fetched, and as much for blocks that are being fetched. */
  readonly memoryBytes: number;
  /** How long blocks wait to be claimed. */
  readonly leaseMs: number;
  /** For fetching them; then they are computed. */
  readonly pullTimeoutMs: number;
  /** Of the transfer agent. @default tcp on loopback, and shared memory where there is some */
  readonly transfer?: Pick<TransferAgentOptions, "clusterSecret" | "tcp" | "shm" | "memory" | "slowPath">;
}

export const DEFAULT_HANDOFF: HandoffConfig = {
  // 5,800 prompt tokens of SmolLM2-135M at a time.
  memoryBytes: 128 * 1024 * 1024,
  leaseMs: 30_000,
  pullTimeoutMs: 5_000,
};
/** A claim outlasts the reader's deadline, and the time its transfer has to let go. */
const CLAIM_EXTRA_MS = 10_000;

export interface WorkerHandoffsOptions {
  readonly config: HandoffConfig;
  /** Of the agent: unique in the cluster. */
  readonly name: string;
  readonly engine: Engine;
  readonly client: RequestPlaneClient;
  /** Where this worker is asked about its handoffs. */
  readonly address: string;
  readonly endpoint: string;
  readonly blockBytes: number;
  readonly blockSizeTokens: number;
  /** See `kvFingerprint`. */
  readonly fingerprint: string;
  readonly clock: Clock;
  readonly random: Random;
  readonly logger: Logger;
  readonly metrics: Metrics;
  /** Namespace, component, endpoint, worker id, model. */
  readonly labels: readonly [string, string, string, string, string];
}

/** Both ends of handoffs on one worker, on one transfer agent: it offers as a prefill worker and pulls as a decode worker. */
export class WorkerHandoffs {
  readonly #options: WorkerHandoffsOptions;
  readonly #agent: TransferAgent;
  readonly #puller: HandoffPuller;
  /** Made for the first role that offers. */
  #store: HandoffStore | undefined;
  #region: Region | undefined;

  /** Throws what opening the agent's back ends throws. */
  static async start(options: WorkerHandoffsOptions): Promise<WorkerHandoffs> {
    const { name, clock, logger, metrics, config } = options;
    const agent = await TransferAgent.start({ name, clock, logger, metrics, ...config.transfer });
    return new WorkerHandoffs(options, agent);
  }

  private constructor(options: WorkerHandoffsOptions, agent: TransferAgent) {
    this.#options = options;
    this.#agent = agent;
    const { config, labels, metrics } = options;
    this.#puller = new HandoffPuller({
      ...options,
      agent,
      fingerprint: () => options.fingerprint,
      timeoutMs: config.pullTimeoutMs,
      landingBytes: config.memoryBytes,
    });
    agent.onNotification(({ message }) => this.#onNotification(message));
    const held = metrics.gauge("dynamo_component_handoff_blocks").labels(...labels);
    metrics.onCollect(() => held.set(this.heldBlocks));
  }

  get agent(): TransferAgent {
    return this.#agent;
  }

  /** Blocks that wait to be fetched, or are being fetched. */
  get heldBlocks(): number {
    return this.#store?.heldBlocks ?? 0;
  }

  /** Bytes of handoffs that are being fetched here. */
  get landingBytes(): number {
    return this.#puller.landingBytes;
  }

  /** From now on it can offer. Throws `transfer-full` when there is not as much shared memory, `invalid-config` for less than a block. */
  async canOffer(): Promise<void> {
    if (this.#store !== undefined) return;
    const { config, blockBytes, clock, random, metrics, labels } = this.#options;
    const slotCount = Math.floor(config.memoryBytes / blockBytes);
    if (slotCount < 1) {
      throw new DynamoError(
        "invalid-config",
        `--handoff-memory-mb: expected room for at least one KV block of ${blockBytes} bytes, got ${config.memoryBytes}`,
      );
    }
    this.#region = await this.#agent.allocate(slotCount * blockBytes, { label: "handoffs", remoteAccess: "read" });
    const ended = metrics.counter("dynamo_component_handoffs_total");
    this.#store = new HandoffStore({
      bytes: this.#region.bytes,
      blockBytes,
      clock,
      random,
      leaseMs: config.leaseMs,
      claimMs: config.pullTimeoutMs + CLAIM_EXTRA_MS,
      onEnd: (outcome) => ended.labels(...labels, outcome).add(),
    });
  }

  /**
   * The prompt's complete blocks, copied out of the engine's cache and leased; `stream` is the one that asked, and ends
   * when they are gone. Throws `transfer-full`, `unsupported-operation`, and `cancelled` when nobody waits any more.
   */
  async offer(request: PreprocessedRequest, stream: ServerStream, signal: AbortSignal): Promise<OfferedHandoff> {
    const { engine, blockSizeTokens, blockBytes, address, endpoint, fingerprint } = this.#options;
    const store = this.#store;
    if (store === undefined) throw new DynamoError("unsupported-operation", "this worker hands no blocks over");
    const prompt = request.tokenIds.subarray(0, promptLengthOf(request));
    const { cacheNamespace } = request;
    const { sequenceHashes } = hashBlocks(prompt, blockSizeTokens, blockHashSeed({ cacheNamespace }));
    // No more than fits: the rest is computed again.
    const { data } = await engine.exportBlocks(sequenceHashes.subarray(0, 2 * store.freeBlocks));
    if (data.length === 0 && store.freeBlocks > 0) {
      throw new DynamoError("handoff-gone", "the engine's cache has lost the prompt's blocks already");
    }
    if (signal.aborted) throw new DynamoError("cancelled", "the caller cancelled the request");
    const { id, runs, blockCount } = store.offer(data, () => stream.end());
    signal.addEventListener("abort", () => store.cancel(id), { once: true });
    const regionId = this.#region!.id;
    const metadata = this.#agent.metadata();
    const bytes = encodeHandoff({
      id,
      address,
      endpoint,
      fingerprint,
      blockBytes,
      blockSizeTokens,
      regionId,
      runs,
      blockCount,
      metadata,
    });
    return { blockCount, blockBytes, bytes };
  }

  /** Fetches what a handoff offers and is not here. Never rejects. */
  async pull(request: PreprocessedRequest, signal: AbortSignal): Promise<PullResult> {
    const { metrics, labels, logger } = this.#options;
    const result = await this.#puller.pull(request, signal);
    metrics
      .counter("dynamo_component_handoff_pulls_total")
      .labels(...labels, result.outcome)
      .add();
    metrics
      .counter("dynamo_component_handoff_pulled_bytes_total")
      .labels(...labels)
      .add(result.byteCount);
    metrics
      .histogram("dynamo_component_handoff_pull_seconds")
      .labels(...labels)
      .observe(result.milliseconds / 1_000);
    const level = result.outcome === "pulled" || result.outcome === "cancelled" ? "debug" : "warn";
    logger[level]({ x_request_id: request.requestId, ...result }, `handoff: ${result.outcome}`);
    return result;
  }

  /** The endpoint `handoff`. */
  readonly handle: EndpointHandler = (stream, payload) => {
    const question = decodeHandoffAsk(payload);
    const store = this.#store;
    if (store === undefined) throw new DynamoError("handoff-gone", "this worker has handed no blocks over");
    if ("claim" in question) store.claim(question.claim);
    else store.release(question.release);
    stream.write(Buffer.from(JSON.stringify({ claimMs: store.claimMs })));
    stream.end();
    return { onCancel: () => undefined };
  };

  #onNotification(message: Uint8Array): void {
    try {
      const question = decodeHandoffAsk(message);
      if ("release" in question) this.#store?.release(question.release);
    } catch (thrown) {
      this.#options.logger.warn({ reason: toDynamoError(thrown).reason }, "a message about a handoff was dropped");
    }
  }

  async close(): Promise<void> {
    this.#store?.close();
    await this.#agent.close();
  }
}
