/** Which engine to load and how; `cli/` fills it from flags, environment and file, `loadEngine` takes it. */
export type EngineConfig = LlamaEngineConfig | EchoEngineConfig;

export interface LlamaEngineConfig {
  readonly kind: "llama";
  /** A GGUF file. */
  readonly modelPath: string;
  /** Longest sequence; 0 = what the model was trained for. */
  readonly contextLength: number;
  /** Tokens the KV cache holds for all sequences together; rounded down to blocks. */
  readonly kvCacheTokens: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly blockSizeTokens: number;
  /** Compute threads. Over all workers of a machine never more than its cores. */
  readonly threads: number;
}

/** Answers with the prompt's own tokens, over and over, at once: for measuring and testing everything but an engine. */
export interface EchoEngineConfig {
  readonly kind: "echo";
  readonly contextLength: number;
  readonly maxSequences: number;
  readonly blockSizeTokens: number;
  /** Pause between two steps, 0 = the next loop turn. */
  readonly stepMs: number;
  /** A model file whose tokenizer to use; undefined = bytes as tokens. */
  readonly modelPath?: string;
}
