import type { EngineTokenizer } from "./foreign-config.ts";

/**
 * Text of an engine as tokens of ours, piece by piece as it comes: the frontend's detokenizer makes exactly that text of
 * them again, to the byte. Pieces are taken as they come, which mostly are the engine's own tokens; a character that is cut
 * between two pieces (half a surrogate pair) waits for its other half. Tokens that the tokenizer would take for special ones
 * (`<|im_end|>` as plain text) are spelled out in others, because special tokens give no text.
 *
 * One of `TokenBytes` per tokenizer, one of `TextTokens` per answer.
 */
export class TextTokens {
  readonly #vocabulary: TokenBytes;
  #isFirst = true;
  /** The first half of a surrogate pair. */
  #half = "";

  constructor(vocabulary: TokenBytes, isBegun = false) {
    this.#vocabulary = vocabulary;
    this.#isFirst = !isBegun;
  }

  /** Throws when the tokenizer has no tokens for it. */
  push(text: string): readonly number[] {
    let whole = this.#half + text;
    this.#half = "";
    const last = whole.charCodeAt(whole.length - 1);
    if (last >= 0xd800 && last <= 0xdbff) {
      this.#half = whole.slice(-1);
      whole = whole.slice(0, -1);
    }
    return this.#encode(whole);
  }

  /** What is left at the end: half a character, which is U+FFFD. */
  flush(): readonly number[] {
    const half = this.#half;
    this.#half = "";
    return this.#encode(half);
  }

  #encode(text: string): readonly number[] {
    if (text === "") return [];
    // What the detokenizer takes away in front of an answer.
    const stripped = this.#isFirst && this.#vocabulary.stripsLeadingSpace ? " " : "";
    this.#isFirst = false;
    return this.#vocabulary.tokensOf(text, stripped);
  }
}

/**
 * Which tokens stand for which bytes. Made on the first need, or by `prepare` before anybody waits: some 100 ms of a core for a
 * vocabulary of 50,000. Pieces of text are remembered: an engine says the same tokens again and again.
 */
export class TokenBytes {
  readonly #tokenizer: EngineTokenizer;
  /** Bytes as latin1, by lowest id; special tokens left out. */
  #ids: Map<string, number> | undefined;
  #longest = 0;
  readonly #pieces = new Map<string, readonly number[]>();

  constructor(tokenizer: EngineTokenizer) {
    this.#tokenizer = tokenizer;
  }

  get stripsLeadingSpace(): boolean {
    return this.#tokenizer.stripsLeadingSpace;
  }

  tokenBytes(id: number): Uint8Array {
    return this.#tokenizer.tokenBytes(id);
  }

  prepare(): void {
    this.#idsByBytes();
  }

  /** Tokens whose bytes are those of `text` behind `before`, the tokenizer's own for `text` where those are. */
  tokensOf(text: string, before: string): readonly number[] {
    const known = before === "" ? this.#pieces.get(text) : undefined;
    if (known !== undefined) return known;
    const bytes = Buffer.from(before + text.toWellFormed(), "utf8");
    const own = this.#tokenizer.encode(text);
    const tokens = this.#say(own, bytes) ? [...own] : this.#longestFirst(bytes);
    if (before !== "" || text.length > MAX_PIECE) return tokens;
    if (this.#pieces.size === MAX_PIECES) this.#pieces.clear();
    this.#pieces.set(text, tokens);
    return tokens;
  }

  /** `count` tokens whose bytes are `bytes`, if there are any: what stands for a character in pieces. */
  split(bytes: Buffer, count: number): number[] | undefined {
    if (count === 0) return bytes.length === 0 ? [] : undefined;
    if (count > bytes.length) return undefined;
    const ids = this.#idsByBytes();
    for (let length = Math.min(this.#longest, bytes.length - count + 1); length >= 1; length--) {
      const id = ids.get(bytes.toString("latin1", 0, length));
      const rest = id === undefined ? undefined : this.split(bytes.subarray(length), count - 1);
      if (rest !== undefined) return [id!, ...rest];
    }
    return undefined;
  }

  #say(tokenIds: Uint32Array, bytes: Buffer): boolean {
    let at = 0;
    for (const id of tokenIds) {
      if (this.#tokenizer.isSpecial(id)) return false;
      const own = this.#tokenizer.tokenBytes(id);
      if (bytes.compare(own, 0, own.length, at, Math.min(bytes.length, at + own.length)) !== 0) return false;
      at += own.length;
    }
    return at === bytes.length;
  }

  #longestFirst(bytes: Buffer): number[] {
    const ids = this.#idsByBytes();
    const tokens: number[] = [];
    for (let at = 0; at < bytes.length;) {
      let length = Math.min(this.#longest, bytes.length - at);
      let id: number | undefined;
      while (length > 0 && (id = ids.get(bytes.toString("latin1", at, at + length))) === undefined) length--;
      if (id === undefined) {
        throw new Error(`the tokenizer has no token for byte 0x${bytes[at]!.toString(16)}: give the engine's own tokenizer as --model`);
      }
      tokens.push(id);
      at += length;
    }
    return tokens;
  } // prettier-ignore

  #idsByBytes(): Map<string, number> {
    if (this.#ids !== undefined) return this.#ids;
    const ids = new Map<string, number>();
    for (let id = 0; id < this.#tokenizer.vocabularySize; id++) {
      if (this.#tokenizer.isSpecial(id)) continue;
      const bytes = this.#tokenizer.tokenBytes(id);
      if (bytes.length === 0) continue;
      this.#longest = Math.max(this.#longest, bytes.length);
      const key = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("latin1");
      if (!ids.has(key)) ids.set(key, id);
    }
    this.#ids = ids;
    return ids;
  }
}

/** A few MB at most. */
const MAX_PIECES = 32_768;
const MAX_PIECE = 64;
