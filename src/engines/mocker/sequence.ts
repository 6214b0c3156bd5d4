import type { HashPair } from "../../tokens/index.ts";
import { BlockChain } from "./block-chain.ts";
import { BlockTable } from "./kv-pool.ts";
import { TokenSource, type ReasoningSpan } from "./token-source.ts";

/**
 * One request inside a scheduler.
 *
 *     known     prompt and generated tokens
 *     computed  of these, how many have their KV cache: the rest is what passes still have to work on
 *
 * When computed reaches known the pass yields the next token. Preemption sets computed back to 0; known stays.
 */
export interface SequenceOptions {
  readonly id: number;
  /** length = prompt tokens, at least 1; not kept. */
  readonly tokenIds: Uint32Array;
  /** At least 1; what the context allows at most. */
  readonly maxTokens: number;
  readonly minTokens?: number;
  readonly stopTokenIds?: readonly number[];
  readonly priority?: number;
  /** undefined = greedy. */
  readonly seed?: number | undefined;
  readonly hashSeed: HashPair;
  /** False: every prompt token is computed, though its blocks are shared. @default true */
  readonly usesPrefixCache?: boolean;
  readonly blockSizeTokens: number;
  readonly vocabularySize: number;
  readonly reasoning?: ReasoningSpan | undefined;
  readonly arrivedMs: number;
}

export type SequenceEnd = "stop" | "length" | "cancelled";

export class Sequence {
  readonly id: number;
  readonly promptTokens: number;
  readonly maxTokens: number;
  readonly minTokens: number;
  readonly stopTokenIds: readonly number[];
  readonly priority: number;
  readonly usesPrefixCache: boolean;
  readonly arrivedMs: number;
  readonly chain: BlockChain;
  readonly table = new BlockTable();
  readonly #source: TokenSource;

  computedTokens = 0;
  generatedTokens = 0;
  /** Of the current pass. */
  scheduledTokens = 0;
  /** Prompt tokens that came from the cache when it first ran. */
  cachedTokens = 0;
  /** Its prompt's KV cache comes from elsewhere. A preempted one computes for itself. */
  awaitsTransfer = false;
  /** It did: all but the last prompt token came over the link. */
  wasTransferred = false;
  /** First admitted; -1 = still waiting for that. */
  startedMs = -1;
  firstTokenMs = -1;
  lastTokenMs = -1;
  preemptions = 0;
  cancelled = false;

  constructor(options: SequenceOptions) {
    this.id = options.id;
    this.promptTokens = options.tokenIds.length;
    this.maxTokens = options.maxTokens;
    this.minTokens = options.minTokens ?? 0;
    this.stopTokenIds = options.stopTokenIds ?? [];
    this.priority = options.priority ?? 0;
    this.usesPrefixCache = options.usesPrefixCache ?? true;
    this.arrivedMs = options.arrivedMs;
    this.chain = new BlockChain(options.tokenIds, options.blockSizeTokens, options.hashSeed);
    this.#source = new TokenSource(options.tokenIds, options);
  }

  get knownTokens(): number {
    return this.promptTokens + this.generatedTokens;
  }

  get remainingTokens(): number {
    return this.promptTokens + this.generatedTokens - this.computedTokens;
  }

  /** One token from the end of what was computed before, here or elsewhere: what its next pass does is decode. */
  get isDecoding(): boolean {
    return this.remainingTokens === 1 && (this.generatedTokens > 0 || this.wasTransferred);
  }

  /** Takes the next token; -1 when it is a stop token, which is not part of the output. */
  generate(): number {
    let token = this.#source.peek();
    if (this.stopTokenIds.length > 0 && this.stopTokenIds.includes(token)) {
      if (this.generatedTokens >= this.minTokens) return -1;
      token = this.#allowedToken();
    }
    this.#source.absorb(token);
    this.chain.append(token);
    this.generatedTokens++;
    return token;
  }

  /** Too early to stop: the next token of the source that does not; when all do, the lowest id that does not. */
  #allowedToken(): number {
    for (let attempt = 1; attempt <= 32; attempt++) {
      const token = this.#source.peek(attempt);
      if (!this.stopTokenIds.includes(token)) return token;
    }
    let lowest = 0;
    while (this.stopTokenIds.includes(lowest)) lowest++;
    return lowest;
  }
}
