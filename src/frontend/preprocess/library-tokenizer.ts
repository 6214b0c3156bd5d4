import { toDynamoError } from "../../errors/index.ts";
import type { HfStep, TokenizerArtifact } from "../../model/index.ts";
import { checkTextUnits } from "./encode-limits.ts";
import type { EncodeOptions, Tokenizer } from "./tokenizer.ts";

/** What is used of the library; its own declarations do not resolve under Node's rules. */
interface LibraryEncoder {
  encode(text: string, options: { add_special_tokens: boolean }): { readonly ids: readonly number[] };
  get_vocab(withAddedTokens: boolean): ReadonlyMap<string, number>;
}

interface LibraryModule {
  readonly Tokenizer: new (tokenizerJson: object, config: object) => LibraryEncoder;
}

/**
 * Every kind of tokenizer that is not byte-level BPE, through Hugging Face's library: SentencePiece (Llama 2, Mistral,
 * Gemma), WordPiece and the rest. About 30 times slower than our own and in one go: `encodeSliced` yields once, before.
 */
export class LibraryTokenizer implements Tokenizer {
  readonly vocabularySize: number;
  readonly bosTokenId: number | undefined;
  readonly eosTokenIds: readonly number[];
  readonly unitsPerTokenMax = Infinity;
  readonly cacheUse = undefined;
  readonly stripsLeadingSpace: boolean;

  readonly #library: LibraryEncoder;
  readonly #prefix: readonly number[];
  readonly #suffix: readonly number[];
  readonly #special: ReadonlySet<number>;
  readonly #bytes: Uint8Array[];

  /** Throws `model-file-invalid`. */
  static async create(artifact: TokenizerArtifact): Promise<LibraryTokenizer> {
    const { Tokenizer: Library } = (await import("@huggingface/tokenizers")) as unknown as LibraryModule;
    try {
      // The artifact says which tokens go around a text; the library's post-processor stays out of it.
      const library = new Library({ ...artifact.tokenizerJson, post_processor: null }, {});
      return new LibraryTokenizer(artifact, library);
    } catch (thrown) {
      throw toDynamoError(thrown, "model-file-invalid");
    }
  }

  private constructor(artifact: TokenizerArtifact, library: LibraryEncoder) {
    const json = artifact.tokenizerJson;
    this.#library = library;
    this.bosTokenId = artifact.bosTokenId;
    this.eosTokenIds = artifact.eosTokenIds;
    this.#prefix = artifact.addBosToken && artifact.bosTokenId !== undefined ? [artifact.bosTokenId] : [];
    this.#suffix = artifact.addEosToken ? artifact.eosTokenIds.slice(0, 1) : [];
    this.#special = new Set(json.added_tokens.filter((token) => token.special === true).map((token) => token.id));
    const steps = flatten(json.decoder);
    this.stripsLeadingSpace = steps.some(
      (step) => (step.type === "Strip" && step.content === " " && step.start === 1) || step.type === "Metaspace",
    );
    const addedIds = new Set(json.added_tokens.map((token) => token.id));
    this.#bytes = [];
    for (const [text, id] of library.get_vocab(true)) {
      this.#bytes[id] = Buffer.from(addedIds.has(id) ? text : "");
      if (!addedIds.has(id)) this.#bytes[id] = decodedBytes(text, steps);
    }
    this.vocabularySize = this.#bytes.length;
  }

  encode(text: string, options: EncodeOptions): Uint32Array {
    checkTextUnits(text);
    const ids = this.#encode(text.toWellFormed());
    if (!options.addSpecialTokens) return Uint32Array.from(ids);
    return Uint32Array.from([...this.#prefix, ...ids, ...this.#suffix]);
  }

  /** The library takes a file's steps as they come and trips over a wrong one only here. */
  #encode(text: string): readonly number[] {
    try {
      return this.#library.encode(text, { add_special_tokens: false }).ids;
    } catch (thrown) {
      throw toDynamoError(thrown, "model-file-invalid");
    }
  }

  encodeSliced(text: string, options: EncodeOptions): Promise<Uint32Array> {
    return new Promise((resolve, reject) => {
      setImmediate(() => {
        try {
          resolve(this.encode(text, options));
        } catch (thrown) {
          reject(toDynamoError(thrown));
        }
      });
    });
  }

  tokenBytes(id: number): Uint8Array {
    return this.#bytes[id] ?? EMPTY;
  }

  isSpecial(id: number): boolean {
    return this.#special.has(id);
  }
}

const EMPTY = new Uint8Array(0);

function flatten(step: HfStep | null): HfStep[] {
  if (step === null) return [];
  return step.type === "Sequence" && Array.isArray(step.decoders)
    ? (step.decoders as HfStep[]).flatMap(flatten)
    : [step];
}

/** What one token of the vocabulary adds to the text, by the decoders that work token by token. */
function decodedBytes(token: string, steps: readonly HfStep[]): Uint8Array {
  let text = token;
  for (const step of steps) {
    if (step.type === "ByteFallback") {
      const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(text)?.[1];
      if (byte !== undefined) return Uint8Array.of(Number.parseInt(byte, 16));
    } else if (step.type === "Metaspace") {
      text = text.replaceAll(typeof step.replacement === "string" ? step.replacement : "▁", " ");
    } else if (step.type === "Replace" && typeof step.content === "string") {
      const pattern = step.pattern as { String?: unknown } | undefined;
      if (typeof pattern?.String === "string") text = text.replaceAll(pattern.String, step.content);
    } else if (step.type === "WordPiece") {
      const prefix = typeof step.prefix === "string" ? step.prefix : "##";
      text = text.startsWith(prefix) ? text.slice(prefix.length) : ` ${text}`;
    }
  }
  return Buffer.from(text);
}
