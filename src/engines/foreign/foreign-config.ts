/** What all engines share that run as processes of their own; `cli/` fills it. */
export interface ForeignEngineConfig {
  /** The model as this side sees it: where its tokenizer is. */
  readonly modelPath?: string;
  /** The name that the model's file has, for clients that were given no other. */
  readonly modelName?: string;
  /** Highest token id and one; a prompt with another id does not reach the engine. */
  readonly vocabularySize: number;
  /** The engine's name for the model. @default the only one it serves */
  readonly engineModel?: string;
  /** A server that runs already: `http://host:port` or `unix:/path`; else one is started. */
  readonly url?: string;
  readonly apiKey?: string;
  readonly launch?: {
    /** First word the command, then arguments in front of all others: `vllm`, or `node fake.ts`. */
    readonly command: readonly string[];
    /** Behind ours: the user's, which win. */
    readonly args: readonly string[];
    /** On top of this process's environment. */
    readonly env: Readonly<Record<string, string>>;
    /** 0 = any free one. */
    readonly port: number;
    readonly logPath?: string;
  };
  readonly startTimeoutMs: number;
  /** @default 1,000 */
  readonly metricsIntervalMs?: number;
  /** A scrape that is older says nothing any more. @default 5,000 and what the interval makes of it */
  readonly metricsMaxAgeMs?: number;
  /** No answer to anything for so long: it hangs. @default 30,000 */
  readonly hangTimeoutMs?: number;
  /** Sizes the engine does not tell, when it is one that runs already. 0 = its default */
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly contextLength: number;
  readonly blockSizeTokens: number;
  /** Texts and their tokens by the tokenizer that frontends will use, which the engine's must agree with. */
  readonly tokenizerSamples?: readonly TokenizerSample[];
}

/** The tokenizer that frontends use, for engines whose answers are text. */
export interface EngineTokenizer {
  /** Highest id and one. */
  readonly vocabularySize: number;
  /** Without the model's begin and end tokens; special tokens that the text names become those tokens. */
  encode(text: string): Uint32Array;
  /** Raw bytes, maybe not whole characters. */
  tokenBytes(id: number): Uint8Array;
  isSpecial(id: number): boolean;
  /** The text of an answer loses one leading space (SentencePiece models). */
  readonly stripsLeadingSpace: boolean;
}

export interface TokenizerSample {
  readonly text: string;
  readonly tokenIds: readonly number[];
}
