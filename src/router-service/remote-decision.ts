import type { RestoredBlocks } from "../protocol/index.ts";
import { renderRestored, type DecisionExplanation, type RequestEnd, type RoutingDecision } from "../router/index.ts";
import type { ClientStream } from "../runtime/request-plane/index.ts";
import {
  ADD_OUTPUT_ENDPOINT,
  FREE_ENDPOINT,
  PREFILL_DONE_ENDPOINT,
  encodeJson,
  type DecisionMessage,
} from "./messages.ts";
import type { RouterServiceClient } from "./router-service-client.ts";

/**
 * A decision that a router service made: tells it when the prompt is computed, of generated tokens if it counts them, and
 * of the end. The booking hangs on the stream it came by, so it ends on every path: by `free`, or by the stream's end
 * when `free` does not arrive. A service that goes away in between changes nothing for the request.
 */
export class RemoteDecision implements RoutingDecision {
  readonly instanceId: string;
  readonly address: string;
  readonly dpRank: number;
  readonly policy: string;
  readonly reason: string;
  readonly candidateCount: number;
  readonly overlapBlocks: number;
  readonly queuedMs: number;
  readonly #link: RouterServiceClient;
  readonly #service: string;
  readonly #stream: ClientStream;
  readonly #message: DecisionMessage;
  readonly #startMs: number;
  #isHeld = true;
  #isServiceGone = false;
  #firstTokenMs = -1;
  #cachedTokens = 0;
  #restored: RestoredBlocks | undefined = undefined;
  #outputTokens = 0;
  /** Of those, not told yet. */
  #untoldTokens = 0;
  #durationMs = -1;
  #outcome: string | null = null;

  /** `service` is the address of the service; `stream` the one the decision came by, still open. */
  constructor(link: RouterServiceClient, service: string, stream: ClientStream, message: DecisionMessage) {
    this.#link = link;
    this.#service = service;
    this.#stream = stream;
    this.#message = message;
    this.#startMs = link.planes.clock.monotonicMs();
    this.instanceId = message.instanceId;
    this.address = message.address;
    this.dpRank = message.dpRank;
    this.policy = message.policy;
    this.reason = message.reason;
    this.candidateCount = message.candidateCount;
    this.overlapBlocks = message.overlapBlocks;
    this.queuedMs = message.queuedMs;
  }

  firstToken(cachedTokens: number): void {
    if (!this.#isHeld) return;
    if (this.#firstTokenMs < 0) this.#firstTokenMs = this.#sinceStartMs();
    this.#cachedTokens = cachedTokens;
    this.#tell(PREFILL_DONE_ENDPOINT, {
      cachedTokens,
      ...(this.#restored === undefined ? {} : { restored: this.#restored }),
    });
  }

  restored(blocks: RestoredBlocks): void {
    if (this.#isHeld) this.#restored = blocks;
  }

  addTokens(count: number): void {
    if (!this.#isHeld) return;
    this.#outputTokens += count;
    this.#untoldTokens += count;
    const { outputStepTokens } = this.#message;
    if (outputStepTokens === 0 || this.#untoldTokens < outputStepTokens) return;
    this.#tell(ADD_OUTPUT_ENDPOINT, { tokens: this.#untoldTokens });
    this.#untoldTokens = 0;
  }

  release(end?: RequestEnd): void {
    if (!this.#isHeld) return;
    this.#isHeld = false;
    this.#durationMs = this.#sinceStartMs();
    this.#outcome = end?.outcome ?? "finished";
    this.#tell(FREE_ENDPOINT, { outcome: this.#outcome, tokens: this.#untoldTokens });
    // In order behind it: frees the booking when a service that is leaving takes no new word.
    if (!this.#isServiceGone) this.#stream.cancel();
  }

  onServiceGone(): void {
    this.#isServiceGone = true;
  }

  /** undefined when the explanation was not asked for. */
  explain(): DecisionExplanation | undefined {
    const { explanation } = this.#message;
    if (explanation === undefined || this.#firstTokenMs < 0) return explanation;
    return {
      ...explanation,
      actual: {
        cached_blocks: Math.floor(this.#cachedTokens / explanation.prompt.block_size),
        cached_tokens: this.#cachedTokens,
        restored: renderRestored(this.#restored),
        first_token_ms: rounded(this.#firstTokenMs),
        output_tokens: this.#outputTokens,
        duration_ms: this.#durationMs < 0 ? null : rounded(this.#durationMs),
        outcome: this.#outcome,
      },
    };
  }

  #sinceStartMs(): number {
    return this.#link.planes.clock.monotonicMs() - this.#startMs;
  }

  #tell(endpoint: string, update: Record<string, unknown>): void {
    if (this.#isServiceGone) return;
    this.#link.tell(this.#service, endpoint, encodeJson({ booking: this.#message.booking, ...update }));
  }
}

function rounded(milliseconds: number): number {
  return Math.round(milliseconds * 100) / 100;
}
