import type { PreprocessedRequest } from "../../protocol/index.ts";
import { promptLengthOf } from "../../protocol/index.ts";
import { randomId64 } from "../../std/index.ts";
import type { EngineTransfer, TransferTicket } from "../base.ts";
import type { EngineFacts, TransferDialect } from "./answer.ts";
import type { ForeignStream, TransferLeg } from "./foreign-stream.ts";

/**
 * Disaggregated serving of a foreign engine: the two legs of a request as streams of the engine, and what the prefill engine
 * said for the decode engine, kept for the one turn in which the worker takes it. What is not taken then is dropped: the
 * engine's own lease frees the blocks.
 */
export interface ForeignTransferOptions {
  readonly dialect: TransferDialect;
  readonly facts: () => EngineFacts;
  readonly submit: (streamId: number, request: PreprocessedRequest, leg: TransferLeg) => void;
}

export class ForeignTransfer implements EngineTransfer {
  readonly #options: ForeignTransferOptions;
  readonly #tickets = new Map<number, TransferTicket>();
  #fetchedBlocks = 0;
  /** At the first scrape: what the engine had fetched for others. */
  #earlierBytes: number | undefined = undefined;
  #blockBytes = 0;
  /** Decode legs that have not ended. */
  #legsUnderWay = 0;

  constructor(options: ForeignTransferOptions) {
    this.#options = options;
  }

  get connector(): string {
    return this.#options.dialect.connector;
  }

  get roles(): EngineTransfer["roles"] {
    return this.#options.dialect.roles;
  }

  get leaseMs(): number {
    return this.#options.dialect.leaseMs;
  }

  get blockBytes(): number {
    return this.#blockBytes;
  }

  takesFirstToken(request: PreprocessedRequest): boolean {
    return this.#options.dialect.takesFirstToken(request, this.#options.facts());
  }

  refusal(request: PreprocessedRequest): string | undefined {
    return this.#options.dialect.refusal?.(request, this.#options.facts());
  }

  submitPrefill(streamId: number, request: PreprocessedRequest): TransferTicket | undefined {
    const { dialect, submit } = this.#options;
    const requestId = `${request.requestId}.${randomId64().toString(16)}`;
    submit(streamId, request, { kind: "prefill", requestId });
    const parameters = dialect.earlyParameters?.(request, requestId);
    return parameters === undefined ? undefined : { parameters, requestId, blockCount: this.#blocksOf(request) };
  }

  takeTicket(streamId: number): TransferTicket | undefined {
    const ticket = this.#tickets.get(streamId);
    this.#tickets.delete(streamId);
    return ticket;
  }

  submitDecode(streamId: number, request: PreprocessedRequest, ticket: TransferTicket): void {
    this.#options.submit(streamId, request, { kind: "decode", ticket });
    this.#legsUnderWay++;
  }

  // ---- From the engine ----

  /** A stream's final entry is written, and about to be told. */
  ended({ id, request, leg, transferred, newTokens, predictedCachedTokens }: ForeignStream): void {
    if (leg?.kind === "prefill" && transferred !== undefined && newTokens > 0) {
      const { requestId } = leg;
      this.#tickets.set(id, { parameters: transferred, requestId, blockCount: this.#blocksOf(request) });
    }
    if (leg?.kind === "decode") this.#legsUnderWay--;
    if (leg?.kind === "decode" && newTokens > 0) {
      const held = Math.floor(predictedCachedTokens / this.#options.facts().blockSizeTokens);
      this.#fetchedBlocks += Math.max(0, leg.ticket.blockCount - held);
    }
  }

  dropTickets(): void {
    this.#tickets.clear();
  }

  /** Bytes per block, from what the engine counts and what it was given. */
  onScrape(metricsText: string): void {
    const bytes = this.#options.dialect.fetchedBytes?.(metricsText);
    if (bytes === undefined) return;
    // Counters of a server that was started again begin at 0.
    if (this.#earlierBytes === undefined || bytes < this.#earlierBytes) {
      this.#earlierBytes = bytes;
      this.#fetchedBlocks = 0;
    }
    const own = bytes - this.#earlierBytes;
    if (own <= 0 || this.#fetchedBlocks === 0) return;
    const perBlock = Math.round(own / this.#fetchedBlocks);
    // The engine counts bytes before a leg's end counts its blocks: with legs under way it is too much, never too little.
    if (this.#legsUnderWay === 0 || perBlock < this.#blockBytes) this.#blockBytes = perBlock;
  }

  #blocksOf(request: PreprocessedRequest): number {
    const { dialect, facts } = this.#options;
    const known = facts();
    return dialect.blockCount?.(request, known) ?? Math.ceil(promptLengthOf(request) / known.blockSizeTokens);
  }
}
