/**
 * The shape of Hugging Face's `tokenizer.json`, as far as a tokenizer needs it. The file format is foreign, so names are
 * exactly as on disk. Model files of other kinds (GGUF) are converted to it, so that there is one format to encode with.
 * `checkTokenizerJson` is the edge: whoever holds a `HfTokenizerJson` may rely on what it checked.
 */
export type HfMerge = string | readonly [string, string];

export interface HfBpeModel {
  readonly type: "BPE";
  /** Token text (byte-level characters for byte-level models) to id. Ids are unique; special tokens may be missing here. */
  readonly vocab: Readonly<Record<string, number>>;
  /** In order of rank; either `"left right"` or `["left", "right"]`, one kind for all. */
  readonly merges: readonly HfMerge[];
  readonly unk_token?: string | null;
  readonly fuse_unk?: boolean;
  readonly byte_fallback?: boolean;
  /** A piece that is a token as a whole is taken without merging. */
  readonly ignore_merges?: boolean;
  readonly continuing_subword_prefix?: string | null;
  readonly end_of_word_suffix?: string | null;
  readonly dropout?: number | null;
}

export interface HfUnigramModel {
  readonly type: "Unigram";
  /** `[text, score]` by id. */
  readonly vocab: readonly (readonly [string, number])[];
  readonly unk_id?: number | null;
  readonly byte_fallback?: boolean;
}

export interface HfWordModel {
  readonly type: "WordPiece" | "WordLevel";
  readonly vocab: Readonly<Record<string, number>>;
  readonly unk_token?: string;
  readonly continuing_subword_prefix?: string;
  readonly max_input_chars_per_word?: number;
}

export type HfModel = HfBpeModel | HfUnigramModel | HfWordModel;

export interface HfAddedToken {
  readonly id: number;
  readonly content: string;
  readonly single_word?: boolean;
  readonly lstrip?: boolean;
  readonly rstrip?: boolean;
  readonly normalized?: boolean;
  /** Left out of text that is shown. */
  readonly special?: boolean;
}

/** Normalizers, pre-tokenizers, decoders and post-processors: a `type` and settings that depend on it. */
export interface HfStep {
  readonly type: string;
  readonly [setting: string]: unknown;
}

export interface HfTokenizerJson {
  readonly version?: string;
  readonly added_tokens: readonly HfAddedToken[];
  readonly normalizer: HfStep | null;
  readonly pre_tokenizer: HfStep | null;
  readonly post_processor: HfStep | null;
  readonly decoder: HfStep | null;
  readonly model: HfModel;
}
