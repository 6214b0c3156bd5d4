import type { Tokenizer } from "../preprocess/tokenizer.ts";

/**
 * Token ids to text as they come, never half a character. Most tokens are whole UTF-8 and cost one look-up in a table
 * that all streams of a model share; the others go through a buffer of at most 3 pending bytes. Bytes become U+FFFD only
 * when nothing that follows could complete them, one per broken sequence as WHATWG's decoder does, so all pushes and the
 * flush together are exactly the decoding of all bytes. Special tokens give no text. One instance per stream.
 */
export class Detokenizer {
  readonly #table: TextTable;
  /** The begin of a character: a lead byte and continuations, still possible. */
  readonly #pending = new Uint8Array(4);
  #pendingCount = 0;
  #stripsSpace: boolean;

  constructor(tokenizer: Tokenizer, _options: { readonly skipSpecialTokens: true }) {
    this.#table = tableOf(tokenizer);
    this.#stripsSpace = tokenizer.stripsLeadingSpace;
  }

  /** The text that the first `count` ids complete. */
  push(tokenIds: Uint32Array, count: number): string {
    const { texts } = this.#table;
    let text = "";
    for (let index = 0; index < count; index++) {
      const id = tokenIds[index] as number;
      const whole = id < texts.length ? texts[id] : "";
      if (whole !== undefined && whole !== null && this.#pendingCount === 0) text += whole;
      else text += this.#pushSlow(id);
    }
    return this.#stripsSpace && text !== "" ? this.#stripSpace(text) : text;
  }

  /** What is left when the stream ends: U+FFFD for an unfinished character. */
  flush(): string {
    if (this.#pendingCount === 0) return "";
    this.#pendingCount = 0;
    return REPLACEMENT;
  }

  #pushSlow(id: number): string {
    const whole = this.#table.textOf(id);
    // A skipped special token does not part the bytes around it.
    if (whole === "") return "";
    // A whole text begins with no continuation byte, so the pending character stays unfinished.
    if (whole !== null) return this.flush() + whole;
    const bytes = this.#table.bytesOf(id);
    const joined = new Uint8Array(this.#pendingCount + bytes.length);
    joined.set(this.#pending.subarray(0, this.#pendingCount));
    joined.set(bytes, this.#pendingCount);
    const end = joined.length - unfinishedBytes(joined);
    this.#pendingCount = joined.length - end;
    this.#pending.set(joined.subarray(end));
    return decoder.decode(joined.subarray(0, end));
  }

  #stripSpace(text: string): string {
    this.#stripsSpace = false;
    return text.startsWith(" ") ? text.slice(1) : text;
  }
}

const REPLACEMENT = "\uFFFD";
/** Without ignoreBOM the decoder would swallow a token that is U+FEFF. */
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const strictDecoder = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });

/** Text per token of one model, filled as tokens come up: a string, null for a token that is not whole UTF-8. */
class TextTable {
  readonly texts: (string | null | undefined)[];
  readonly #tokenizer: Tokenizer;

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
    this.texts = Array.from<string | null | undefined>({ length: tokenizer.vocabularySize });
  }

  textOf(id: number): string | null {
    const known = this.texts[id];
    if (known !== undefined) return known;
    if (id >= this.texts.length) return "";
    const text = this.#tokenizer.isSpecial(id) ? "" : wholeText(this.#tokenizer.tokenBytes(id));
    this.texts[id] = text;
    return text;
  }

  bytesOf(id: number): Uint8Array {
    return this.#tokenizer.tokenBytes(id);
  }
}

const tables = new WeakMap<Tokenizer, TextTable>();

function tableOf(tokenizer: Tokenizer): TextTable {
  let table = tables.get(tokenizer);
  if (table === undefined) tables.set(tokenizer, (table = new TextTable(tokenizer)));
  return table;
}

function wholeText(bytes: Uint8Array): string | null {
  try {
    return strictDecoder.decode(bytes);
  } catch {
    return null;
  }
}

/**
 * How many bytes at the end begin a character that more bytes could complete: 0 to 3. The second byte's range depends on
 * the first (Unicode standard, table 3-7); a sequence outside it is broken already.
 */
export function unfinishedBytes(bytes: Uint8Array): number {
  for (let count = 1; count <= 3 && count <= bytes.length; count++) {
    const lead = bytes[bytes.length - count] as number;
    if (lead < 0x80) return 0;
    if (lead < 0xc0) continue;
    const length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    if (count >= length) return 0;
    if (count === 1) return 1;
    const second = bytes[bytes.length - count + 1] as number;
    const from = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
    const to = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
    return second >= from && second <= to ? count : 0;
  }
  return 0;
}
