import type { AnswerForm, SamplingOptions } from "../request.ts";

/**
 * OpenAI requests after validation, in our own terms: every default filled in, nothing left to check but what needs the
 * model (context length, token ids under the vocabulary size). `frontend/openai/` makes them from JSON.
 */
export interface GenerationOptions {
  readonly sampling: SamplingOptions;
  /** undefined = as much as the context holds (chat) or 16 (completions, as OpenAI does). */
  readonly maxTokens: number | undefined;
  readonly minTokens: number;
  readonly stop: readonly string[];
  readonly stopTokenIds: readonly number[];
  readonly ignoreEos: boolean;
  readonly n: number;
  /** -1 none, 0 to 20 alternatives. */
  readonly topLogprobs: number;
  /** @default any */
  readonly answerForm?: AnswerForm;
  readonly stream: boolean;
  readonly includeUsage: boolean;
}

export interface ChatMessage {
  readonly role: string;
  /** Text parts of a content array are joined. */
  readonly content: string;
  readonly name?: string;
}

export interface ChatRequest {
  readonly model: string;
  readonly messages: readonly ChatMessage[];
  readonly options: GenerationOptions;
  /** Passed to the template as variables. */
  readonly chatTemplateArgs: Readonly<Record<string, unknown>>;
}

export interface CompletionRequest {
  readonly model: string;
  /** Text, or token ids as given. */
  readonly prompts: readonly (string | Uint32Array)[];
  readonly echo: boolean;
  readonly options: GenerationOptions;
}

export interface Usage {
  readonly promptTokens: number;
  readonly completionTokens: number;
  readonly cachedTokens: number;
  /** Tokens of ours for the text of an engine that has others. @default false */
  readonly isEstimated?: boolean;
}
