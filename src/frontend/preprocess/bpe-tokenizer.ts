import { DynamoError } from "../../errors/index.ts";
import type { HfAddedToken, HfBpeModel, HfStep, HfTokenizerJson, TokenizerArtifact } from "../../model/index.ts";
import { AddedTokenSplitter } from "./added-token-splitter.ts";
import { LongMerge, SHORT_PIECE_BYTES_MAX, mergeShort } from "./bpe-merge.ts";
import { BpeVocabulary } from "./bpe-vocabulary.ts";
import { ENCODE_LIMITS, checkTextUnits } from "./encode-limits.ts";
import { CACHED_UNITS_MAX, PieceCache } from "./piece-cache.ts";
import { createPreTokenizer, pieceLengths, scanDigitSegment, type PreTokenizer } from "./pre-tokenizer.ts";
import { systemClock, type Clock } from "../../std/index.ts";
import { KEPT_UNITS_MAX, TextCache, type TextCacheUse } from "./text-cache.ts";
import { CUT_BEFORE, findCut } from "./text-cut.ts";
import { TokenSink } from "./token-sink.ts";
import type { EncodeOptions, Tokenizer } from "./tokenizer.ts";
import { TurnShare } from "../turn-share.ts";

/**
 * Byte-level BPE as GPT-2, Llama 3, Qwen and SmolLM use it, giving exactly the ids of Hugging Face's `tokenizers` (tests
 * compare with its JavaScript sibling). One instance per model, owned by the event loop that serves; `encode` is
 * synchronous, `encodeSliced` interleaves with others because only the caches are shared.
 *
 * Text goes into code units once; scanners cut it into pieces; a piece that was seen before costs one hash look-up and no
 * string. Measured (Node 26): see `benchmarks/tokenizer.ts`. Hostile: 100,000 equal letters take 20 to 60 ms, in slices.
 */
export class BpeTokenizer implements Tokenizer {
  readonly vocabularySize: number;
  readonly bosTokenId: number | undefined;
  readonly eosTokenIds: readonly number[];
  readonly unitsPerTokenMax: number;
  readonly stripsLeadingSpace = false;

  readonly #turnShare: TurnShare;
  readonly #vocabulary: BpeVocabulary;
  readonly #preTokenizer: PreTokenizer;
  readonly #cache = new PieceCache();
  /** Of stretches of a prompt; undefined where the text cannot be cut safely, or by configuration. */
  readonly #textCache: TextCache | undefined;
  readonly #composes: boolean;
  readonly #ignoresMerges: boolean;
  readonly #unknownId: number;
  readonly #fusesUnknown: boolean;
  /** Matched in the text as it came, and in the normalised text. */
  readonly #rawTokens: AddedTokenSplitter;
  readonly #normalizedTokens: AddedTokenSplitter;
  readonly #special: Uint8Array;
  readonly #prefix: readonly number[];
  readonly #suffix: readonly number[];
  /** Of an encoding that ended, for the next one. */
  #spareSink: TokenSink | undefined;
  readonly #bytes = new Uint8Array(SHORT_PIECE_BYTES_MAX);
  readonly #pieceIds = new Int32Array(SHORT_PIECE_BYTES_MAX);

  /** undefined when the tokenizer is of another kind or uses a setting that is not supported here. */
  static tryCreate(
    artifact: TokenizerArtifact,
    clock: Clock = systemClock,
    cacheBytesMax = 0,
  ): BpeTokenizer | undefined {
    const { tokenizerJson: json } = artifact;
    const { model } = json;
    if (model.type !== "BPE" || !isPlainBpe(model) || !isByteLevelDecoder(json.decoder)) return undefined;
    const composes = composesText(json.normalizer);
    const preTokenizer = createPreTokenizer(json.pre_tokenizer);
    if (composes === undefined || preTokenizer === undefined) return undefined;
    return new BpeTokenizer(artifact, json, model, composes, preTokenizer, clock, cacheBytesMax);
  }

  private constructor(
    artifact: TokenizerArtifact,
    json: HfTokenizerJson,
    model: HfBpeModel,
    composes: boolean,
    preTokenizer: PreTokenizer,
    clock: Clock,
    cacheBytesMax: number,
  ) {
    this.#turnShare = new TurnShare(clock);
    this.#vocabulary = new BpeVocabulary(model, json.added_tokens);
    this.vocabularySize = this.#vocabulary.size;
    this.bosTokenId = artifact.bosTokenId;
    this.eosTokenIds = artifact.eosTokenIds;
    this.#prefix = artifact.addBosToken && artifact.bosTokenId !== undefined ? [artifact.bosTokenId] : [];
    this.#suffix = artifact.addEosToken ? artifact.eosTokenIds.slice(0, 1) : [];
    this.#preTokenizer = preTokenizer;
    this.#composes = composes;
    this.#ignoresMerges = model.ignore_merges === true;
    this.#unknownId = typeof model.unk_token === "string" ? (model.vocab[model.unk_token] ?? -1) : -1;
    this.#fusesUnknown = model.fuse_unk === true;
    const normalized = json.added_tokens.filter((token) => token.normalized ?? token.special !== true);
    this.#rawTokens = new AddedTokenSplitter(json.added_tokens.filter((token) => !normalized.includes(token)));
    this.#normalizedTokens = new AddedTokenSplitter(normalized);
    if (cacheBytesMax > 0 && preTokenizer.cutsSafely && normalized.every(outlivesCuts)) {
      this.#textCache = new TextCache(cacheBytesMax);
    }
    this.#special = new Uint8Array(this.vocabularySize);
    for (const token of json.added_tokens) if (token.special === true) this.#special[token.id] = 1;
    // Composing to NFC leaves at least a byte for every three units.
    this.unitsPerTokenMax = this.#vocabulary.maxTokenBytes * (this.#composes ? 3 : 1);
  }

  get cacheUse(): TextCacheUse | undefined {
    return this.#textCache?.use;
  }

  encode(text: string, options: EncodeOptions): Uint32Array {
    checkTextUnits(text);
    const sink = this.#takeSink();
    const steps = this.#steps(text, options, sink);
    while (steps.next().done !== true);
    return this.#finish(sink);
  }

  async encodeSliced(text: string, options: EncodeOptions, signal?: AbortSignal): Promise<Uint32Array> {
    if (text.length <= STRETCH_UNITS) return this.encode(text, options);
    checkTextUnits(text);
    const sink = this.#takeSink();
    const steps = this.#steps(text, options, sink);
    const isLong = text.length > LONG_TEXT_UNITS;
    if (isLong || !this.#turnShare.tryFinish(steps)) await this.#turnShare.finish(steps, signal);
    return this.#finish(sink);
  }

  #takeSink(): TokenSink {
    const sink = this.#spareSink ?? new TokenSink(SINK_TOKENS);
    this.#spareSink = undefined;
    return sink;
  }

  #finish(sink: TokenSink): Uint32Array {
    const ids = sink.take();
    const use = this.#textCache?.use;
    if (use !== undefined) {
      if (sink.cachedCount > 0) use.hits++;
      else use.misses++;
      use.cachedTokens += sink.cachedCount;
      use.uncachedTokens += sink.length - sink.cachedCount;
    }
    sink.reset();
    if (sink.ids.length <= SPARE_TOKENS_MAX) this.#spareSink = sink;
    return ids;
  }

  tokenBytes(id: number): Uint8Array {
    return this.#vocabulary.tokenBytes(id);
  }

  isSpecial(id: number): boolean {
    return this.#special[id] === 1;
  }

  /** The whole encoding, in steps of well under a millisecond. */
  *#steps(text: string, options: EncodeOptions, sink: TokenSink): Generator<void, void> {
    if (options.addSpecialTokens) for (const id of this.#prefix) sink.push(id);
    const wellFormed = text.toWellFormed();
    for (let done = 0; done < wellFormed.length;) {
      const match = this.#rawTokens.find(wellFormed, done);
      const end = match?.start ?? wellFormed.length;
      if (end > done)
        yield* this.#sectionSteps(done === 0 && match === undefined ? wellFormed : wellFormed.slice(done, end), sink);
      if (match !== undefined) sink.push(match.id);
      done = match?.end ?? end;
    }
    if (options.addSpecialTokens) for (const id of this.#suffix) sink.push(id);
  }

  /** What stands between two added tokens: from the cache as far as it is there. */
  *#sectionSteps(section: string, sink: TokenSink): Generator<void, void> {
    const cache = this.#textCache;
    if (cache === undefined || section.length < CACHED_TEXT_UNITS_MIN) return yield* this.#uncachedSteps(section, sink);
    for (let done = 0; done < section.length;) {
      let end = section.length;
      for (let searched = done + STRETCH_UNITS; searched < section.length; searched += STRETCH_UNITS) {
        const cut = findCut(section, searched, Math.min(searched + STRETCH_UNITS, section.length));
        if (cut >= 0) {
          end = cut;
          break;
        }
        yield;
      }
      const stretch = section.slice(done, end);
      done = end;
      const known = stretch.length <= KEPT_UNITS_MAX ? cache.find(stretch) : undefined;
      if (known !== undefined) {
        sink.append(known);
        sink.cachedCount += known.length;
        yield;
        continue;
      }
      const from = sink.length;
      yield* this.#uncachedSteps(stretch, sink);
      if (stretch.length <= KEPT_UNITS_MAX) cache.offer(stretch, sink.ids.subarray(from, sink.length));
    }
  }

  *#uncachedSteps(section: string, sink: TokenSink): Generator<void, void> {
    let text = section;
    if (this.#composes) {
      text = "";
      for (let done = 0; done < section.length;) {
        const end = composedCut(section, done);
        text += section.slice(done, end).normalize("NFC");
        done = end;
        yield;
      }
    }
    for (let done = 0; done < text.length;) {
      const match = this.#normalizedTokens.find(text, done);
      const end = match?.start ?? text.length;
      if (end > done) yield* this.#textSteps(text.slice(done, end), sink);
      if (match !== undefined) sink.push(match.id);
      done = match?.end ?? end;
    }
  }

  *#textSteps(text: string, sink: TokenSink): Generator<void, void> {
    const buffer = Buffer.allocUnsafe(text.length * 2);
    buffer.write(text, "utf16le");
    const units = new Uint16Array(buffer.buffer, buffer.byteOffset, text.length);
    const { scan, digitsApart, patterns } = this.#preTokenizer;
    for (let start = 0; start < units.length;) {
      const end = digitsApart ? scanDigitSegment(units, start, units.length) : units.length;
      if (scan === undefined) {
        let sinceYield = 0;
        for (const length of pieceLengths(text.slice(start, end), patterns)) {
          if (!this.#encodePiece(units, start, start + length, sink))
            yield* this.#longPieceSteps(units, start, start + length, sink);
          start += length;
          if ((sinceYield += length) < STEP_UNITS) continue;
          sinceYield = 0;
          yield;
        }
      } else {
        // The pieces of the segment in runs of STEP_UNITS; a long piece interrupts the run.
        for (let stepEnd = start; start < end;) {
          stepEnd = Math.min(end, start + STEP_UNITS);
          let pieceEnd = start;
          while (start < stepEnd) {
            pieceEnd = scan(units, start, end);
            if (!this.#encodePiece(units, start, pieceEnd, sink)) break;
            start = pieceEnd;
          }
          if (start < stepEnd) {
            yield* this.#longPieceSteps(units, start, pieceEnd, sink);
            start = pieceEnd;
          }
          if (start < end) yield;
        }
      }
      start = end;
    }
  }

  /** False when the piece is too long for the scratch arrays and was not encoded. */
  #encodePiece(units: Uint16Array, start: number, end: number, sink: TokenSink): boolean {
    const length = end - start;
    if (length * 3 > SHORT_PIECE_BYTES_MAX) return false;
    const cache = this.#cache;
    const cacheable = length <= CACHED_UNITS_MAX;
    const hash = cacheable ? PieceCache.hash(units, start, end) : 0;
    if (cacheable && cache.find(units, start, end, hash)) {
      const { ids, idStart, idEnd } = cache;
      if (sink.length + idEnd - idStart > sink.ids.length) sink.room(idEnd - idStart);
      const out = sink.ids;
      let at = sink.length;
      for (let index = idStart; index < idEnd; index++) out[at++] = ids[index] as number;
      sink.length = at;
      return true;
    }
    const from = sink.length;
    this.#mergePiece(units, start, end, sink);
    if (cacheable) cache.add(units, start, end, hash, sink.ids, from, sink.length);
    return true;
  }

  #mergePiece(units: Uint16Array, start: number, end: number, sink: TokenSink): void {
    const bytes = this.#bytes;
    const byteCount = writeUtf8(units, start, end, bytes);
    const whole = this.#ignoresMerges ? this.#vocabulary.find(bytes, 0, byteCount) : -1;
    if (whole >= 0) {
      sink.push(whole);
      return;
    }
    const ids = this.#pieceIds;
    const { mergeTable, mergeMask } = this.#vocabulary;
    const count = mergeShort(ids, this.#startIds(bytes, byteCount, ids), mergeTable, mergeMask);
    sink.room(count);
    for (let index = 0; index < count; index++) sink.ids[sink.length++] = ids[index] as number;
  }

  *#longPieceSteps(units: Uint16Array, start: number, end: number, sink: TokenSink): Generator<void, void> {
    // Merges never reach across the cuts if there are none.
    const chunkUnits = this.#vocabulary.hasMerges ? end - start : STEP_UNITS;
    for (let from = start; from < end; from += chunkUnits) {
      const text = Buffer.from(units.buffer, units.byteOffset + from * 2, Math.min(chunkUnits, end - from) * 2);
      // Chunks may cut a pair in half; without merges each byte stands alone, so the cut moves to the pair's end.
      const cut = splitsPair(units, from + chunkUnits, end) ? 1 : 0;
      const bytes = new Uint8Array((text.length / 2 + cut) * 3);
      const byteCount = writeUtf8(units, from, from + text.length / 2 + cut, bytes);
      from += cut;
      if (this.#vocabulary.hasMerges && byteCount > ENCODE_LIMITS.pieceBytes) throw pieceTooLong(byteCount);
      const isWhole = chunkUnits === end - start;
      const whole = this.#ignoresMerges && isWhole ? this.#vocabulary.find(bytes, 0, byteCount) : -1;
      if (whole >= 0) {
        sink.push(whole);
        continue;
      }
      yield;
      const ids = new Int32Array(byteCount);
      const merge = new LongMerge(ids.subarray(0, this.#startIds(bytes, byteCount, ids)), this.#vocabulary);
      while (!merge.step(STEP_MERGES)) yield;
      let sinceYield = 0;
      for (const id of merge.tokens()) {
        sink.push(id);
        if (++sinceYield % STEP_UNITS === 0) yield;
      }
    }
  }

  /** One token per byte; a byte that is no token is unknown, or dropped where the model has no unknown token. */
  #startIds(bytes: Uint8Array, count: number, ids: Int32Array): number {
    const { byteIds } = this.#vocabulary;
    let length = 0;
    for (let index = 0; index < count; index++) {
      let id = byteIds[bytes[index] as number] as number;
      if (id < 0) {
        id = this.#unknownId;
        if (id < 0 || (this.#fusesUnknown && length > 0 && ids[length - 1] === id)) continue;
      }
      ids[length++] = id;
    }
    return length;
  }
}

/** Units per step: 0.1 ms of known words, about 1 ms of unknown ones. */
const STEP_UNITS = 4_096;
/** A new sink's size, and the largest that is used again: 1 MiB. */
const SINK_TOKENS = 4_096;
const SPARE_TOKENS_MAX = 262_144;
/** Stretches that the cache keeps are about this long: a shared prefix is found up to its last whole one. */
const STRETCH_UNITS = 4_096;
/** Longer texts wait for their turn even when there is time left in this one. */
const LONG_TEXT_UNITS = 65_536;
/** Shorter texts take less than 10 us to encode: not worth an entry. */
const CACHED_TEXT_UNITS_MIN = 512;
/** Merges of a long piece per step: about 1 ms. */
const STEP_MERGES = 8_192;

/** A token that is looked for in the stretches: none may lie across a cut, or look beyond one. */
function outlivesCuts(token: HfAddedToken): boolean {
  const looksAround = token.lstrip === true || token.rstrip === true || token.single_word === true;
  return !looksAround && !CUT_BEFORE.some((character) => token.content.includes(character, 1));
}

function isPlainBpe(model: HfBpeModel): boolean {
  return (
    model.byte_fallback !== true &&
    (model.dropout ?? 0) === 0 &&
    (model.continuing_subword_prefix ?? "") === "" &&
    (model.end_of_word_suffix ?? "") === ""
  );
}

function isByteLevelDecoder(decoder: HfStep | null): boolean {
  if (decoder?.type === "Sequence" && Array.isArray(decoder.decoders) && decoder.decoders.length === 1) {
    return isByteLevelDecoder(decoder.decoders[0] as HfStep);
  }
  return decoder?.type === "ByteLevel";
}

/** Whether the normalizer is NFC (true), nothing (false), or something else (undefined). */
function composesText(normalizer: HfStep | null): boolean | undefined {
  if (normalizer === null) return false;
  if (normalizer.type === "NFC") return true;
  if (normalizer.type !== "Sequence" || !Array.isArray(normalizer.normalizers)) return undefined;
  const steps = (normalizer.normalizers as HfStep[]).map(composesText);
  return steps.includes(undefined) ? undefined : steps.includes(true);
}

/**
 * Where a part of about 64k units may end so that normalising the parts gives the normalised whole: before an ASCII
 * character, which never composes with what stands before it. Falls back to the end of the text.
 */
function composedCut(text: string, from: number): number {
  for (let index = from + 65_536; index < text.length; index++) if (text.charCodeAt(index) < 0x80) return index;
  return text.length;
}

function splitsPair(units: Uint16Array, cut: number, end: number): boolean {
  return cut < end && ((units[cut] as number) & 0xfc00) === 0xdc00;
}

/** `into` holds 3 bytes per unit. Returns the number of bytes. */
function writeUtf8(units: Uint16Array, start: number, end: number, into: Uint8Array): number {
  let at = 0;
  for (let index = start; index < end; index++) {
    const unit = units[index] as number;
    if (unit < 0x80) {
      into[at++] = unit;
    } else if (unit < 0x800) {
      into[at++] = 0xc0 | (unit >> 6);
      into[at++] = 0x80 | (unit & 0x3f);
    } else if ((unit & 0xf800) === 0xd800) {
      const codePoint = 0x10000 + ((unit - 0xd800) << 10) + ((units[++index] as number) - 0xdc00);
      into[at++] = 0xf0 | (codePoint >> 18);
      into[at++] = 0x80 | ((codePoint >> 12) & 0x3f);
      into[at++] = 0x80 | ((codePoint >> 6) & 0x3f);
      into[at++] = 0x80 | (codePoint & 0x3f);
    } else {
      into[at++] = 0xe0 | (unit >> 12);
      into[at++] = 0x80 | ((unit >> 6) & 0x3f);
      into[at++] = 0x80 | (unit & 0x3f);
    }
  }
  return at;
}

function pieceTooLong(bytes: number): DynamoError {
  return new DynamoError(
    "invalid-field",
    `prompt: expected no run of more than ${ENCODE_LIMITS.pieceBytes} bytes without a break, got ${bytes}`,
    { param: "prompt" },
  );
}
