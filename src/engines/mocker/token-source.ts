/**
 * The mock engine's answers. The next token is a pure function of the whole sequence before it, prompt and answer alike,
 * and of the seed when the request samples with one. So the same prompt always gets the same answer, on any worker, after
 * any restart; and a request that is sent on with the tokens it already has ("migrated") goes on exactly as it would have.
 * Two sequences with equal 32-bit states go on alike: harmless, and odds of 2^-32.
 *
 * Reasoning: the answer starts with the start token, and the end token comes when the asked share of the answer is over.
 * A prompt that ends with an answer of ours that is under way is recognised and goes on inside it.
 *
 * Cost: about 1 ns per prompt token, once, and 5 ns per generated token.
 */
export interface ReasoningSpan {
  readonly startTokenId: number;
  readonly endTokenId: number;
  /** Share of the answer that is reasoning, both marks included; 0 to 1. */
  readonly thinkingRatio: number;
}

export interface TokenSourceOptions {
  readonly vocabularySize: number;
  /** undefined = greedy: the prompt alone decides. */
  readonly seed?: number | undefined;
  readonly reasoning?: ReasoningSpan | undefined;
  /** Tokens still to come at most. */
  readonly maxTokens: number;
}

/** Up to this size ids are taken for bytes and the answer is lower-case letters and spaces. */
const BYTE_VOCABULARY = 512;
/** Else: a range that is plain text in the usual vocabularies, above bytes and special tokens. */
const FIRST_TEXT_TOKEN = 1_000;
const TEXT_TOKENS = 1_000;
const LETTERS = 26;

export class TokenSource {
  #state = 0x811c_9dc5;
  readonly #seedMix: number;
  readonly #isBytes: boolean;
  readonly #first: number;
  readonly #count: number;
  readonly #reasoning: ReasoningSpan | undefined;
  /** Position in the answer, counted from where it began, an earlier worker's part included; -1 = no reasoning here. */
  #position = -1;
  /** Position of the end token. */
  #reasoningEnd = -1;

  constructor(prompt: Uint32Array, options: TokenSourceOptions) {
    this.#seedMix = options.seed === undefined ? 0 : finish(options.seed ^ 0x9e37_79b9);
    this.#isBytes = options.vocabularySize <= BYTE_VOCABULARY;
    this.#count = this.#isBytes ? 32 : Math.min(TEXT_TOKENS, options.vocabularySize - 1);
    this.#first = this.#isBytes ? 0 : Math.min(FIRST_TEXT_TOKEN, options.vocabularySize - this.#count);
    this.#reasoning = options.reasoning;
    if (this.#reasoning === undefined) this.#state = absorbAll(this.#state, prompt);
    else this.#resume(prompt, this.#reasoning, options.maxTokens);
  }

  /**
   * The next token; it still has to be absorbed when it is really taken. `attempt` above 0 gives another one each time,
   * for callers that may not use the first.
   */
  peek(attempt = 0): number {
    if (attempt === 0 && this.#reasoning !== undefined) {
      if (this.#position === 0) return this.#reasoning.startTokenId;
      if (this.#position === this.#reasoningEnd) return this.#reasoning.endTokenId;
    }
    return this.#textToken(attempt);
  }

  absorb(tokenId: number): void {
    this.#state = absorb(this.#state, tokenId);
    if (this.#position >= 0) this.#position++;
  }

  #textToken(attempt: number): number {
    const index = (finish(this.#state ^ this.#seedMix) + attempt) % this.#count;
    if (!this.#isBytes) return this.#first + index;
    return index < LETTERS ? 97 + index : 32;
  }

  /** Absorbs the prompt and finds out whether it ends with a reasoning answer of ours. */
  #resume(prompt: Uint32Array, { startTokenId, endTokenId, thinkingRatio }: ReasoningSpan, maxTokens: number): void {
    let start = -1;
    let hasEnded = false;
    for (let i = 0; i < prompt.length; i++) {
      const token = prompt[i]!;
      if (token === startTokenId) {
        start = i;
        hasEnded = false;
      } else if (start >= 0 && token === endTokenId && !hasEnded) {
        hasEnded = true;
      } else if (start >= 0 && token !== this.#textToken(0)) {
        start = -1;
      }
      this.#state = absorb(this.#state, token);
    }
    this.#position = start < 0 ? 0 : prompt.length - start;
    const answerTokens = this.#position + maxTokens;
    this.#reasoningEnd = hasEnded && start >= 0 ? -1 : Math.max(1, Math.round(answerTokens * thinkingRatio) - 1);
  }
}

function absorb(state: number, tokenId: number): number {
  const mixed = Math.imul(state ^ tokenId, 0x9e37_79b1);
  return mixed ^ (mixed >>> 15);
}

function absorbAll(state: number, tokenIds: Uint32Array): number {
  for (let i = 0; i < tokenIds.length; i++) state = absorb(state, tokenIds[i]!);
  return state;
}

/** The finaliser of MurmurHash3: every bit of the state reaches every bit of the result. */
function finish(state: number): number {
  let z = state;
  z = Math.imul(z ^ (z >>> 16), 0x85eb_ca6b);
  z = Math.imul(z ^ (z >>> 13), 0xc2b2_ae35);
  return (z ^ (z >>> 16)) >>> 0;
}
