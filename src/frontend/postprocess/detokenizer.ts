import type { Tokenizer } from "../preprocess/tokenizer.ts";

/**
 * Token ids to text as they come, never half a character. Most tokens are whole UTF-8 and cost one look-up in a table
 * that all streams of a model share; the bytes of the others go through WHATWG's UTF-8 decoder, kept as five numbers per
 * stream. So bytes become U+FFFD only when nothing that follows could complete them, and all pushes and the flush together
 * are exactly the decoding of all bytes at once. Special tokens give no text and do not part the bytes around them. One
 * instance per stream. Cost: 10 to 25 ns per token of English, 50 to 90 ns of mixed scripts (`benchmarks/tokenizer.ts`).
 */
export class Detokenizer {
  readonly #table: TextTable;
  #stripsSpace: boolean;
  /** The unfinished character: bits so far, continuation bytes to come (0 = none), and the range of the next one. */
  #codePoint = 0;
  #bytesNeeded = 0;
  #lower = 0x80;
  #upper = 0xbf;

  constructor(tokenizer: Tokenizer, _options: { readonly skipSpecialTokens: true }) {
    this.#table = tableOf(tokenizer);
    this.#stripsSpace = tokenizer.stripsLeadingSpace;
  }

  /** The text that the `count` ids from index `from` on complete. */
  push(tokenIds: Uint32Array, count: number, from = 0): string {
    const { entries } = this.#table;
    const end = from + count;
    let text = "";
    for (let index = from; index < end; index++) {
      const id = tokenIds[index] as number;
      const entry = id < entries.length ? (entries[id] ?? this.#table.fill(id)) : "";
      if (typeof entry !== "string") text += this.#decode(entry);
      // A whole text begins with no continuation byte, so a pending character stays unfinished.
      else text += this.#bytesNeeded === 0 || entry === "" ? entry : this.#breakOff() + entry;
    }
    return this.#stripsSpace && text !== "" ? this.#stripSpace(text) : text;
  }

  /** What is left when the stream ends: U+FFFD for an unfinished character. */
  flush(): string {
    return this.#bytesNeeded === 0 ? "" : this.#breakOff();
  }

  #decode(bytes: Uint8Array): string {
    let text = "";
    for (let index = 0; index < bytes.length; index++) {
      const byte = bytes[index] as number;
      if (this.#bytesNeeded > 0) {
        if (byte >= this.#lower && byte <= this.#upper) {
          this.#lower = 0x80;
          this.#upper = 0xbf;
          this.#codePoint = (this.#codePoint << 6) | (byte & 0x3f);
          if (--this.#bytesNeeded === 0) text += String.fromCodePoint(this.#codePoint);
          continue;
        }
        text += this.#breakOff();
      }
      if (byte < 0x80) text += String.fromCharCode(byte);
      else if (byte >= 0xc2 && byte <= 0xdf) this.#begin(1, byte & 0x1f, 0x80, 0xbf);
      // The second byte's range depends on the first (Unicode standard, table 3-7).
      else if (byte >= 0xe0 && byte <= 0xef) {
        this.#begin(2, byte & 0x0f, byte === 0xe0 ? 0xa0 : 0x80, byte === 0xed ? 0x9f : 0xbf);
      } else if (byte >= 0xf0 && byte <= 0xf4) {
        this.#begin(3, byte & 0x07, byte === 0xf0 ? 0x90 : 0x80, byte === 0xf4 ? 0x8f : 0xbf);
      } else text += REPLACEMENT;
    }
    return text;
  }

  #begin(bytesNeeded: number, codePoint: number, lower: number, upper: number): void {
    this.#bytesNeeded = bytesNeeded;
    this.#codePoint = codePoint;
    this.#lower = lower;
    this.#upper = upper;
  }

  #breakOff(): string {
    this.#bytesNeeded = 0;
    return REPLACEMENT;
  }

  #stripSpace(text: string): string {
    this.#stripsSpace = false;
    return text.startsWith(" ") ? text.slice(1) : text;
  }
}

const REPLACEMENT = "\uFFFD";
/** Without ignoreBOM the decoder would swallow a token that is U+FEFF. */
const strictDecoder = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

/** By id, filled as tokens come up: the text of a token that is whole UTF-8, the bytes of any other. */
class TextTable {
  readonly entries: (string | Uint8Array | undefined)[];
  readonly #tokenizer: Tokenizer;

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
    this.entries = Array.from<string | Uint8Array | undefined>({ length: tokenizer.vocabularySize });
  }

  fill(id: number): string | Uint8Array {
    const entry = this.#tokenizer.isSpecial(id) ? "" : textOrBytes(this.#tokenizer.tokenBytes(id));
    this.entries[id] = entry;
    return entry;
  }
}

const tables = new WeakMap<Tokenizer, TextTable>();

function tableOf(tokenizer: Tokenizer): TextTable {
  let table = tables.get(tokenizer);
  if (table === undefined) tables.set(tokenizer, (table = new TextTable(tokenizer)));
  return table;
}

function textOrBytes(bytes: Uint8Array): string | Uint8Array {
  try {
    return strictDecoder.decode(bytes);
  } catch {
    return bytes;
  }
}
