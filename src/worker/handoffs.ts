import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Logger, Metrics } from "../observability/index.ts";
import {
  decodeHandoffAsk,
  decodeRequest,
  encodeHandoff,
  encodeHandoffItem,
  type Handoff,
  promptLengthOf,
  type PreprocessedRequest,
  type PullResult,
} from "../protocol/index.ts";
import type { EndpointHandler, RequestPlaneClient, ServerStream } from "../runtime/request-plane/index.ts";
import { randomHexId, type Clock, type Random } from "../std/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import { TransferAgent, type Region, type TransferAgentOptions } from "../transfer/index.ts";
import { HandoffDraft } from "./handoff-draft.ts";
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
  readonly transfer?: Pick<
    TransferAgentOptions,
    "clusterSecret" | "tcp" | "shm" | "memory" | "slowPath" | "slowGigabytesPerSecond"
  >;
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
  /** By id. */
  readonly #drafts = new Map<string, HandoffDraft>();

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
   * For a prompt that was accepted and is not submitted yet: its blocks are copied out as they are computed. `stream` is told
   * when some are there and more are to come. Ends by `handOver` or `abandon`. undefined: this worker hands no blocks over.
   */
  draft(request: PreprocessedRequest, stream: ServerStream): HandoffDraft | undefined {
    const { engine, blockSizeTokens, blockBytes, random } = this.#options;
    const store = this.#store;
    if (store === undefined) return undefined;
    const prompt = request.tokenIds.subarray(0, promptLengthOf(request));
    const { cacheNamespace } = request;
    const { sequenceHashes, blockCount } = hashBlocks(prompt, blockSizeTokens, blockHashSeed({ cacheNamespace }));
    const id = randomHexId(random);
    const none = { id, firstBlock: 0, runs: new Uint32Array(0), blockCount: 0 };
    const onBegun = (): void => {
      const bytes = this.#encode({ ...none, draftId: id });
      stream.write(encodeHandoffItem({ isDraft: true, blockCount, blockBytes, bytes }));
    };
    const draft = new HandoffDraft({ id, engine, store, sequenceHashes, onBegun });
    this.#drafts.set(id, draft);
    return draft;
  }

  /**
   * The prompt is computed: its complete blocks, but for those that were fetched meanwhile, are leased and offered to
   * `stream`, the one that asked, which ends when they are gone. Throws `transfer-full`, `handoff-gone`, and `cancelled` when
   * nobody waits any more.
   */
  async handOver(draft: HandoffDraft, stream: ServerStream, signal: AbortSignal): Promise<void> {
    try {
      const finished = await draft.finish(signal, () => stream.end());
      const { id, firstBlock, blockCount } = finished;
      signal.addEventListener("abort", () => this.#store?.cancel(id), { once: true });
      const bytes = this.#encode({ ...finished, draftId: draft.hasParts ? draft.id : "" });
      const { blockBytes } = this.#options;
      stream.write(encodeHandoffItem({ isDraft: false, blockCount: firstBlock + blockCount, blockBytes, bytes }));
      if (blockCount === 0) stream.end();
    } finally {
      this.#drafts.delete(draft.id);
    }
  }

  abandon(draft: HandoffDraft): void {
    this.#drafts.delete(draft.id);
    draft.abandon();
  }

  #encode(what: Pick<Handoff, "id" | "draftId" | "firstBlock" | "runs" | "blockCount">): Buffer {
    const { address, endpoint, fingerprint, blockBytes, blockSizeTokens } = this.#options;
    const common = { address, endpoint, fingerprint, blockBytes, blockSizeTokens };
    return encodeHandoff({ ...common, ...what, regionId: this.#region!.id, metadata: this.#agent.metadata() });
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
    if ("watch" in question) {
      const draft = this.#drafts.get(question.watch);
      if (draft === undefined) throw new DynamoError("handoff-gone", "the prompt is not being computed (any more)");
      draft.watch(stream);
      return { onCancel: () => draft.unwatch() };
    }
    if ("claim" in question) store.claim(question.claim);
    else store.giveUp(question.release);
    stream.write(Buffer.from(JSON.stringify({ claimMs: store.claimMs })));
    stream.end();
    return { onCancel: () => undefined };
  };

  /** The endpoint `early_pull`: the parts of a draft are fetched as they come, and known to `pull` while the stream is open. */
  readonly handleEarlyPull: EndpointHandler = (_stream, payload) => {
    const abort = new AbortController();
    this.#puller.pullEarly(decodeRequest(payload), abort.signal);
    return { onCancel: () => abort.abort() };
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
    for (const draft of this.#drafts.values()) this.abandon(draft);
    this.#store?.close();
    await this.#agent.close();
  }
}
