import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import {
  EngineOutput,
  decodeEngineOutput,
  encodePullItem,
  type PreprocessedRequest,
  type PullResult,
} from "../protocol/index.ts";
import type { ServerStream } from "../runtime/request-plane/index.ts";
import type { Clock, TimerHandle } from "../std/index.ts";
import type { EngineHandoffs, OpenOffer, TakenHandoff } from "./engine-handoffs.ts";

/**
 * One part of a request that is split over two engines which move the blocks themselves, on its worker:
 *
 *     prefill   engine ── first token (goes out, where the decode engine can go on behind it) ── handoff, leased ── claimed: end
 *     decode    claim ── engine, from the other one's blocks ── "pulled" in front of the first token ── tokens
 *                 │         └── failed, or nothing for too long, before a token: whole, without the blocks
 *                 └── not granted: the same
 *
 * A decode leg never fails for the sake of its blocks, and never uses them twice.
 */
export interface EngineLegOptions {
  readonly id: number;
  readonly request: PreprocessedRequest;
  readonly stream: ServerStream;
  readonly engine: Engine;
  readonly handoffs: EngineHandoffs;
  readonly clock: Clock;
  readonly flush: () => void;
  /** Not ended by somebody else. */
  readonly isActive: () => boolean;
  /** It leaves the service's streams; for when no engine has it. */
  readonly left: () => void;
}

type State = "prefill" | "claiming" | "fetching" | "computing" | "decoding" | "cancelled";

const OUTPUT = new EngineOutput();
/** The engine is well, it is the blocks that did not come. */
const TRANSFER_FAILED = "engine-failed";

export class EngineLeg {
  readonly #options: EngineLegOptions;
  #state: State;
  /** Of a prefill leg: its engine's token is not for the client. */
  #isSilent = false;
  #offered: OpenOffer | undefined = undefined;
  #taken: TakenHandoff | undefined = undefined;
  #timer: TimerHandle | undefined = undefined;
  /** Why the blocks are given up, while the engine is still being told. */
  #givenUp: string | undefined = undefined;

  constructor(options: EngineLegOptions) {
    this.#options = options;
    this.#state = options.request.prefillOnly === true ? "prefill" : "claiming";
  }

  begin(): void {
    if (this.#state === "prefill") this.#prefill();
    else void this.#decode();
  }

  cancel(): void {
    const { engine, id } = this.#options;
    this.#offered?.cancel();
    this.#timer?.cancel();
    const isWithEngine = this.#state !== "claiming";
    // A decode leg whose blocks were given up is ended like any other.
    this.#givenUp = undefined;
    this.#state = "cancelled";
    if (isWithEngine) engine.abort(id);
  }

  // ---- The first part ----

  #prefill(): void {
    const { handoffs, id, request, stream, flush } = this.#options;
    const { transfer } = handoffs;
    const refusal = transfer.refusal?.(request);
    if (refusal !== undefined) {
      this.#options.left();
      stream.end(new DynamoError("transfer-no-path", refusal));
      flush();
      return;
    }
    this.#isSilent = !transfer.takesFirstToken(request);
    const ticket = transfer.submitPrefill(id, request);
    if (ticket === undefined) return;
    this.#isSilent = true;
    this.#offered = handoffs.offer(ticket, stream);
    flush();
  }

  /** True: the entry is dealt with, and not for the stream. */
  takes(step: Uint8Array, start: number, end: number, isFinal: boolean): boolean {
    if (this.#state === "fetching") return this.#firstOfFetched(step, start, end, isFinal);
    return this.#state === "prefill" && this.#isSilent && !isFinal;
  }

  /** Of a final entry: its tokens are not for the client, or nobody listens any more. */
  hides(step: Uint8Array, start: number, end: number): boolean {
    if (this.#state !== "prefill" || !this.#isSilent) return false;
    if (this.#offered?.isOpen === false) return true;
    decodeEngineOutput(step, start, end, OUTPUT);
    return OUTPUT.finish === "length";
  }

  /** After the final entry: true when the stream is not to end with it. */
  ends(step: Uint8Array, start: number, end: number): boolean {
    this.#timer?.cancel();
    if (this.#state !== "prefill") return false;
    const { handoffs, id, stream } = this.#options;
    decodeEngineOutput(step, start, end, OUTPUT);
    if (OUTPUT.finish !== "length") {
      this.#offered?.cancel();
      return false;
    }
    // Offered before, and its stream ends with that.
    if (this.#offered !== undefined) return true;
    const ticket = handoffs.transfer.takeTicket(id);
    if (ticket === undefined) stream.end(new DynamoError("handoff-gone", "the engine kept no blocks of the prompt"));
    else this.#offered = handoffs.offer(ticket, stream);
    return true;
  }

  // ---- The second part ----

  async #decode(): Promise<void> {
    const { handoffs, request, isActive, left } = this.#options;
    let failure: DynamoError | undefined;
    try {
      this.#taken = await handoffs.take(request.handoff ?? "");
    } catch (thrown) {
      failure = toDynamoError(thrown);
    }
    // Ended meanwhile, with all others.
    if (!isActive()) return;
    if (this.#state === "cancelled") {
      if (this.#taken !== undefined) this.#tell(this.#result("cancelled"));
      left();
      return;
    }
    if (this.#taken === undefined) {
      this.#compute(failure!.reason);
      return;
    }
    this.#state = "fetching";
    const { clock, id } = this.#options;
    this.#timer = clock.setTimer(handoffs.timeoutMs, () => this.#giveUp("first-token-timeout"));
    this.#guarded(() => handoffs.transfer.submitDecode(id, plain(request), this.#taken!.ticket));
  }

  #firstOfFetched(step: Uint8Array, start: number, end: number, isFinal: boolean): boolean {
    decodeEngineOutput(step, start, end, OUTPUT);
    const { error, finish, tokenCount, hasFirst, cachedTokens } = OUTPUT;
    if (isFinal && this.#givenUp !== undefined) {
      this.#compute(this.#givenUp);
      return true;
    }
    if (error?.reason === TRANSFER_FAILED && tokenCount === 0) {
      this.#compute(error.reason);
      return true;
    }
    this.#timer?.cancel();
    this.#state = "decoding";
    if (error !== undefined || finish === "cancelled") return false;
    this.#tell(this.#result("pulled", hasFirst ? cachedTokens : 0));
    return false;
  }

  /** The engine is told to let go; what it says then brings `#compute`. */
  #giveUp(reason: string): void {
    if (this.#state !== "fetching") return;
    this.#givenUp = reason;
    this.#options.engine.abort(this.#options.id);
  }

  /** Whole, on this worker, as if there had been no blocks. */
  #compute(reason: string): void {
    const { engine, id, request } = this.#options;
    this.#timer?.cancel();
    this.#state = "computing";
    this.#tell(this.#result(reason));
    this.#guarded(() => engine.submit(id, plain(request)));
  }

  #guarded(submit: () => void): void {
    const { stream, left, flush } = this.#options;
    try {
      submit();
    } catch (thrown) {
      left();
      stream.end(toDynamoError(thrown));
      flush();
    }
  }

  #result(outcome: string, cachedTokens = 0): PullResult {
    const { handoffs, clock } = this.#options;
    const { connector, blockBytes } = handoffs.transfer;
    const blocks = outcome === "pulled" ? (this.#taken?.ticket.blockCount ?? 0) : 0;
    const heldBlocks = Math.min(blocks, Math.floor(cachedTokens / handoffs.blockSizeTokens));
    return {
      outcome,
      heldBlocks,
      pulledBlocks: blocks - heldBlocks,
      earlyBlocks: 0,
      byteCount: (blocks - heldBlocks) * blockBytes,
      milliseconds: this.#taken === undefined ? 0 : clock.monotonicMs() - this.#taken.sinceMs,
      backend: this.#taken === undefined ? "" : connector,
    };
  }

  #tell(result: PullResult): void {
    const { handoffs, request, stream, flush } = this.#options;
    handoffs.tell(request.requestId, this.#taken?.peer ?? "", result);
    if (result.outcome === "cancelled") return;
    stream.write(encodePullItem(result));
    flush();
  }
}

/** As an engine takes it that knows nothing of handoffs. */
function plain(request: PreprocessedRequest): PreprocessedRequest {
  const { handoff, ...rest } = request;
  return handoff === undefined ? request : rest;
}
