/**
 * Stretches of text -> their tokens, so that the prompt prefixes, documents and messages that come again and again are
 * tokenized once. A stretch is looked up by its text in a `Map`: V8 hashes it with a seed of this process and compares it
 * whole, so a hit is always right and collisions cannot be crafted. Keys stay under the length up to which V8 hashes all
 * of a string (16,383 units).
 *
 * Bounded by bytes: entries live in two generations of half the budget each. A hit in the old one moves to the young one;
 * when the young one is full, the old one is dropped and the young one takes its place. So what was used within the last
 * half budget of new entries stays. A text is kept when it comes the second time: most are never seen again, and keeping
 * those would cost a copy each and push out what is shared.
 *
 * Owned by one tokenizer. Cost of a hit: 1 to 2 us per 4,096 units, for the hash and the comparison.
 */
export const KEPT_UNITS_MAX = 12_288;

/** What an entry costs beside its units and tokens: key, array and buffer objects, its place in the map. */
const ENTRY_BYTES = 320;
/** Fingerprints of texts that came once, by their own low bits: 64 KiB, a few hundred long prompts. */
const SEEN_SLOTS = 16_384;
/** Units that a fingerprint looks at. It only decides when a text is kept, so texts alike in them do no harm. */
const SAMPLES = 32;

/** Since the cache was made, for the metrics. */
export interface TextCacheUse {
  /** Texts (whole prompts) of which at least one stretch was found, and of which none was. */
  hits: number;
  misses: number;
  cachedTokens: number;
  uncachedTokens: number;
  /** Held now. */
  bytes: number;
}

export class TextCache {
  readonly use: TextCacheUse = { hits: 0, misses: 0, cachedTokens: 0, uncachedTokens: 0, bytes: 0 };
  readonly #generationBytesMax: number;
  #young = new Map<string, Uint32Array>();
  #youngBytes = 0;
  #old = new Map<string, Uint32Array>();
  #oldBytes = 0;
  readonly #seen = new Int32Array(SEEN_SLOTS);

  constructor(bytesMax: number) {
    this.#generationBytesMax = bytesMax / 2;
  }

  /** The tokens of exactly this text, not to be changed; at most `KEPT_UNITS_MAX` units. */
  find(text: string): Uint32Array | undefined {
    const young = this.#young.get(text);
    if (young !== undefined) return young;
    const old = this.#old.get(text);
    if (old !== undefined) {
      this.#old.delete(text);
      this.#oldBytes -= entryBytes(text, old);
      this.#keep(text, old);
    }
    return old;
  }

  /** A text that was not found, and its tokens, of which a copy is kept if the text came before. */
  offer(text: string, ids: Uint32Array): void {
    const fingerprint = fingerprintOf(text);
    const slot = fingerprint & (SEEN_SLOTS - 1);
    if (this.#seen[slot] !== fingerprint) this.#seen[slot] = fingerprint;
    // Another prompt that is being encoded may have brought it meanwhile.
    else if (!this.#young.has(text)) this.#keep(text, ids.slice());
  }

  #keep(text: string, ids: Uint32Array): void {
    const bytes = entryBytes(text, ids);
    if (bytes > this.#generationBytesMax) return;
    if (this.#youngBytes + bytes > this.#generationBytesMax) {
      this.#old = this.#young;
      this.#oldBytes = this.#youngBytes;
      this.#young = new Map();
      this.#youngBytes = 0;
    }
    this.#young.set(ownCopy(text), ids);
    this.#youngBytes += bytes;
    this.use.bytes = this.#youngBytes + this.#oldBytes;
  }
}

function isAscii(text: string): boolean {
  return Buffer.byteLength(text) === text.length;
}

function entryBytes(text: string, ids: Uint32Array): number {
  return ENTRY_BYTES + ids.byteLength + text.length * (isAscii(text) ? 1 : 2);
}

/** A slice of a string keeps the whole string alive; what is kept for long must not. */
function ownCopy(text: string): string {
  const encoding = isAscii(text) ? "latin1" : "utf16le";
  return Buffer.from(text, encoding).toString(encoding);
}

function fingerprintOf(text: string): number {
  let hash = text.length;
  const step = Math.max(1, text.length / SAMPLES);
  for (let at = 0; at < text.length; at += step) hash = Math.imul(hash ^ text.charCodeAt(at), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 15), 0x2c1b3c6d);
  // 0 marks a slot that was never used.
  return hash ^ (hash >>> 13) || 1;
}
