import type { EngineTransfer, TransferTicket } from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import type { Logger, Metrics } from "../observability/index.ts";
import {
  decodeEngineClaim,
  decodeEngineHandoff,
  decodeHandoffAsk,
  encodeEngineClaim,
  encodeEngineHandoff,
  encodeHandoffItem,
  type EngineHandoff,
  type PullResult,
  type TransferPairReport,
} from "../protocol/index.ts";
import {
  ask,
  type EndpointHandler,
  type RequestPlaneClient,
  type ServerStream,
} from "../runtime/request-plane/index.ts";
import { randomHexId, type Clock, type Random, type TimerHandle } from "../std/index.ts";
import type { HandoffOutcome } from "./handoff-store.ts";

/**
 * Handoffs between engines that move the blocks themselves (`EngineTransfer`): what this worker does is to keep, and to give
 * out once, what its engine said.
 *
 *     offered ──claim──► gone: the decode engine has it, and reads
 *        │ the stream that asked ended, or the lease is over: gone, the engine frees the blocks when its own lease ends
 *
 * Single use and lease are enforced here, at the owner and by its own clock, because engines enforce neither; what the
 * engine said goes from worker to worker and is seen by no frontend and no client.
 */
export interface EngineHandoffsOptions {
  readonly transfer: EngineTransfer;
  /** `namespace.component.instance`, for reports. */
  readonly name: string;
  readonly client: RequestPlaneClient;
  readonly address: string;
  readonly endpoint: string;
  readonly fingerprint: string;
  readonly blockSizeTokens: number;
  /** At most: the engine's own lease counts if it is shorter. */
  readonly leaseMs: number;
  /** For a claim; and for a decode engine's first token, from which its blocks are known to be there. */
  readonly timeoutMs: number;
  readonly clock: Clock;
  readonly random: Random;
  readonly logger: Logger;
  readonly metrics: Metrics;
  /** Namespace, component, endpoint, worker id, model. */
  readonly labels: readonly [string, string, string, string, string];
}

interface Held {
  readonly ticket: TransferTicket;
  readonly stream: ServerStream;
  /** Nothing is given out from then on, whenever the timer's turn comes. */
  readonly endMs: number;
  readonly timer: TimerHandle;
}

/** What a decode worker was given; `sinceMs` is when it asked. */
export interface TakenHandoff {
  readonly ticket: TransferTicket;
  readonly sinceMs: number;
  readonly peer: string;
}

export interface OpenOffer {
  /** It may still be claimed; else its stream has ended. */
  readonly isOpen: boolean;
  cancel(): void;
}

interface Pair {
  readonly report: { -readonly [Field in keyof TransferPairReport]: TransferPairReport[Field] };
  /** Of all its handoffs that went well. */
  milliseconds: number;
}

export class EngineHandoffs {
  readonly #options: EngineHandoffsOptions;
  readonly #held = new Map<string, Held>();
  /** By prefill worker. */
  readonly #pairs = new Map<string, Pair>();

  constructor(options: EngineHandoffsOptions) {
    this.#options = options;
    const { metrics, labels } = options;
    const held = metrics.gauge("dynamo_component_handoff_blocks").labels(...labels);
    metrics.onCollect(() => held.set(this.heldBlocks));
  }

  get transfer(): EngineTransfer {
    return this.#options.transfer;
  }

  get blockSizeTokens(): number {
    return this.#options.blockSizeTokens;
  }

  get timeoutMs(): number {
    return this.#options.timeoutMs;
  }

  /** Blocks that wait to be claimed; the engine's own count has those that are being read, too. */
  get heldBlocks(): number {
    let blocks = 0;
    for (const { ticket } of this.#held.values()) blocks += ticket.blockCount;
    return blocks;
  }

  // ---- The prefill worker ----

  /** Offers what the engine keeps for this prompt to `stream`, which ends when it is claimed, or nobody may claim it any more. */
  offer(ticket: TransferTicket, stream: ServerStream): OpenOffer {
    const { clock, random, name, address, endpoint, fingerprint, transfer } = this.#options;
    const leaseMs = Math.min(this.#options.leaseMs, transfer.leaseMs);
    const id = randomHexId(random);
    const timer = clock.setTimer(leaseMs, () => this.#expire(id));
    this.#held.set(id, { ticket, stream, endMs: clock.monotonicMs() + leaseMs, timer });
    const { blockCount } = ticket;
    const { blockBytes, connector } = transfer;
    const bytes = encodeEngineHandoff({
      id,
      peer: name,
      address,
      endpoint,
      fingerprint,
      connector,
      blockCount,
      blockBytes,
      leaseMs,
    });
    stream.write(encodeHandoffItem({ isDraft: false, blockCount, blockBytes, bytes }));
    const held = this.#held;
    return {
      get isOpen() {
        return held.has(id);
      },
      cancel: () => void this.#end(id, "cancelled"),
    };
  }

  #expire(id: string): void {
    this.#end(id, "expired")?.stream.end(
      new DynamoError("handoff-gone", "nobody claimed the handed-off blocks in time"),
    );
  }

  #end(id: string, outcome: HandoffOutcome): Held | undefined {
    const held = this.#held.get(id);
    if (held === undefined) return undefined;
    const { metrics, labels } = this.#options;
    this.#held.delete(id);
    held.timer.cancel();
    metrics
      .counter("dynamo_component_handoffs_total")
      .labels(...labels, outcome)
      .add();
    return held;
  }

  /** The endpoint `handoff`. */
  readonly handle: EndpointHandler = (stream, payload) => {
    const question = decodeHandoffAsk(payload);
    if ("watch" in question) throw new DynamoError("handoff-gone", "this worker's engine offers no parts of a prompt");
    if ("release" in question) this.#end(question.release, "released")?.stream.end();
    else stream.write(this.#claimed(question.claim));
    stream.end();
    return { onCancel: () => undefined };
  };

  /** Throws `handoff-gone`. */
  #claimed(id: string): Buffer {
    const held = this.#held.get(id);
    // A timer may come late, after the process was stopped for a while; the engine's clock went on.
    if (held !== undefined && this.#options.clock.monotonicMs() >= held.endMs) this.#expire(id);
    const ended = this.#end(id, "fetched");
    if (ended === undefined) {
      throw new DynamoError("handoff-gone", "the handed-off blocks were claimed before, or are not kept any more");
    }
    ended.stream.end();
    const { parameters, requestId } = ended.ticket;
    return encodeEngineClaim({ parameters, requestId });
  }

  // ---- The decode worker ----

  /** Claims what a handoff offers. Throws `malformed-frame`, `handoff-mismatch`, `handoff-gone` and what asking throws. */
  async take(handoff: string): Promise<TakenHandoff> {
    const { client, clock, timeoutMs } = this.#options;
    const sinceMs = clock.monotonicMs();
    const offered = decodeEngineHandoff(Buffer.from(handoff, "base64"));
    this.#checkOurs(offered);
    const answer = await ask(client, offered.address, Buffer.from(JSON.stringify({ claim: offered.id })), {
      endpoint: offered.endpoint,
      requestId: "handoff",
      traceparent: "",
      timeoutMs,
    });
    const { parameters, requestId } = decodeEngineClaim(answer);
    const { blockCount, peer } = offered;
    return { ticket: { parameters, requestId, blockCount }, sinceMs, peer };
  }

  #checkOurs({ fingerprint, connector }: EngineHandoff): void {
    const { transfer } = this.#options;
    if (fingerprint === this.#options.fingerprint && connector === transfer.connector) return;
    throw new DynamoError("handoff-mismatch", "the handed-off blocks are of another model, engine or connector", {
      diagnostic: `${connector}, ${fingerprint}; here ${transfer.connector}, ${this.#options.fingerprint}`,
    });
  }

  /** How it went, told to metrics and to whoever looks at pairs of workers. */
  tell(requestId: string, peer: string, result: PullResult): void {
    const { metrics, labels, logger } = this.#options;
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
    logger[level]({ x_request_id: requestId, ...result }, `handoff: ${result.outcome}`);
    if (peer !== "") this.#count(peer, result);
  }

  #count(peer: string, { outcome, byteCount, milliseconds }: PullResult): void {
    const { connector } = this.#options.transfer;
    const pair: Pair = this.#pairs.get(peer) ?? {
      milliseconds: 0,
      report: {
        peer,
        backend: connector,
        operation: "read",
        reason: "the engine's own connector; times are to the first token",
        isSlowPath: false,
        isSlow: false,
        transferCount: 0,
        byteCount: 0,
        errorCount: 0,
        lastGigabytesPerSecond: 0,
        meanGigabytesPerSecond: 0,
      },
    };
    this.#pairs.set(peer, pair);
    const { report } = pair;
    if (outcome !== "pulled") {
      if (outcome !== "cancelled") report.errorCount++;
      return;
    }
    report.transferCount++;
    report.byteCount += byteCount;
    pair.milliseconds += milliseconds;
    report.lastGigabytesPerSecond = milliseconds > 0 ? byteCount / milliseconds / 1e6 : 0;
    report.meanGigabytesPerSecond = pair.milliseconds > 0 ? report.byteCount / pair.milliseconds / 1e6 : 0;
  }

  /** As `TransferAgent` tells it. */
  telemetry(): TransferPairReport[] {
    return [...this.#pairs.values()].map(({ report }) => report);
  }

  close(): void {
    for (const id of this.#held.keys()) this.#end(id, "cancelled");
  }
}
