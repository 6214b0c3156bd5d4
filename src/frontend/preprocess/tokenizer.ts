import type { TokenizerArtifact } from "../../model/index.ts";
import { systemClock, type Clock } from "../../std/index.ts";
import { BpeTokenizer } from "./bpe-tokenizer.ts";
import type { TextCacheUse } from "./text-cache.ts";

export interface EncodeOptions {
  /** Put the model's begin (and end) token around the text, as its artifact says. Not for rendered chat templates. */
  readonly addSpecialTokens: boolean;
}

/**
 * Text to tokens and tokens to bytes for one model. Special tokens inside the text become those tokens, in rendered
 * templates and in client prompts alike, as the reference library and vLLM do. Lone surrogates count as U+FFFD.
 */
export interface Tokenizer {
  /** Highest known id + 1; the model's own vocabulary may be padded beyond it. */
  readonly vocabularySize: number;
  readonly bosTokenId: number | undefined;
  readonly eosTokenIds: readonly number[];
  /**
   * No token stands for more UTF-16 units of the input than this; Infinity where nothing is known. So a text of n units
   * has at least n / unitsPerTokenMax tokens, which refuses absurd prompts before the work is done. (What a model drops
   * without a token, such as control characters that its vocabulary lacks, counts as if it had one.)
   */
  readonly unitsPerTokenMax: number;
  /** The text of an answer loses one leading space (SentencePiece models). */
  readonly stripsLeadingSpace: boolean;
  /** What its text cache did so far; undefined where there is none. */
  readonly cacheUse: TextCacheUse | undefined;

  /** On the caller's time. Throws `invalid-field` over the limits of `encode-limits.ts`. */
  encode(text: string, options: EncodeOptions): Uint32Array;
  /** The same, taking 2 ms of each turn of the event loop for all its texts together; short texts are done at once. */
  encodeSliced(text: string, options: EncodeOptions, signal?: AbortSignal): Promise<Uint32Array>;
  /** Raw bytes, maybe not whole characters; a special token's are its text. Empty for ids that are no token. A view. */
  tokenBytes(id: number): Uint8Array;
  isSpecial(id: number): boolean;
}

/**
 * The artifact was checked (`decodeArtifact`). Own byte-level BPE where it fits, the library for every other kind.
 * `cacheBytesMax` bounds the text cache (`text-cache.ts`); 0 = none.
 * Throws `model-file-invalid`.
 */
export async function loadTokenizer(
  artifact: TokenizerArtifact,
  clock: Clock = systemClock,
  cacheBytesMax = 0,
): Promise<Tokenizer> {
  const own = BpeTokenizer.tryCreate(artifact, clock, cacheBytesMax);
  if (own !== undefined) return own;
  const { LibraryTokenizer } = await import("./library-tokenizer.ts");
  return LibraryTokenizer.create(artifact);
}
