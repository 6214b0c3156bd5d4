import { DynamoError } from "../../errors/index.ts";
import type { TokenizerArtifact } from "../../model/index.ts";
import type { ChatRequest, GenerationOptions } from "../../protocol/openai/index.ts";
import { systemClock, type Clock } from "../../std/index.ts";
import { ChatTemplate } from "./chat-template.ts";
import { loadTokenizer, type Tokenizer } from "./tokenizer.ts";

/** What of a model's card bounds its prompts. */
export interface PromptBounds {
  readonly contextLength: number;
  readonly vocabularySize: number;
}

export interface ChatPrompt {
  /** The rendered template. */
  readonly text: string;
  readonly tokenIds: Uint32Array;
  readonly templateMs: number;
  readonly tokenizeMs: number;
}

/**
 * Requests to token ids for one model: template, tokenizer, and every check that needs the model, all before the first
 * byte of an answer. Made once per model and tokenizer; stateless but for the tokenizer's cache.
 *
 * The `...Sliced` twins do the same and give the event loop its turn every 2 ms; short texts they finish at once. Serving
 * uses those.
 */
export class Preprocessor {
  readonly tokenizer: Tokenizer;
  /** Of the model as it is served; another one when its workers change. */
  contextLength: number;
  readonly vocabularySize: number;
  readonly #template: ChatTemplate | undefined;
  readonly #clock: Clock;

  /** `cacheBytesMax` bounds the tokenizer's text cache, 0 = none. Throws `model-file-invalid`. */
  static async create(
    artifact: TokenizerArtifact,
    card: PromptBounds,
    clock: Clock = systemClock,
    cacheBytesMax = 0,
  ): Promise<Preprocessor> {
    const tokenizer = await loadTokenizer(artifact, clock, cacheBytesMax);
    const { chatTemplate, bosToken, eosToken } = artifact;
    const template =
      chatTemplate === undefined ? undefined : new ChatTemplate(chatTemplate, { bosToken, eosToken }, clock);
    return new Preprocessor(tokenizer, template, card, clock);
  }

  private constructor(tokenizer: Tokenizer, template: ChatTemplate | undefined, card: PromptBounds, clock: Clock) {
    this.#clock = clock;
    this.tokenizer = tokenizer;
    this.#template = template;
    this.contextLength = card.contextLength;
    this.vocabularySize = card.vocabularySize;
  }

  get hasChatTemplate(): boolean {
    return this.#template !== undefined;
  }

  /** Throws `template-failed`, `context-length`, `invalid-field`, or `unsupported-operation` without a template. */
  chat(request: ChatRequest): ChatPrompt {
    const startMs = this.#clock.monotonicMs();
    const text = this.render(request);
    const renderedMs = this.#clock.monotonicMs();
    const tokenIds = this.#checkPrompt(this.tokenizer.encode(text, RENDERED), "messages");
    return this.#chatPrompt(text, tokenIds, startMs, renderedMs);
  }

  async chatSliced(request: ChatRequest, signal?: AbortSignal): Promise<ChatPrompt> {
    const startMs = this.#clock.monotonicMs();
    const text = this.render(request);
    const renderedMs = this.#clock.monotonicMs();
    const tokenIds = this.#checkPrompt(await this.tokenizer.encodeSliced(text, RENDERED, signal), "messages");
    return this.#chatPrompt(text, tokenIds, startMs, renderedMs);
  }

  /** The text that the model will see; what `chat` tokenizes. */
  render(request: ChatRequest): string {
    if (this.#template === undefined) {
      throw new DynamoError("unsupported-operation", "the model has no chat template", { param: "messages" });
    }
    let chars = 0;
    for (const message of request.messages) chars += message.content.length;
    this.#refuseAbsurd(chars, "messages");
    const { messages, chatTemplateArgs: args } = request;
    const text = this.#template.render({ messages, addGenerationPrompt: true, args });
    this.#refuseAbsurd(text.length, "messages");
    return text;
  }

  /** A completion prompt: text, or token ids that are checked and taken as they are. */
  encodePrompt(prompt: string | Uint32Array): Uint32Array {
    if (typeof prompt !== "string") return this.#checkTokens(prompt);
    this.#refuseAbsurd(prompt.length, "prompt");
    return this.#checkPrompt(this.tokenizer.encode(prompt, PLAIN), "prompt");
  }

  async encodePromptSliced(prompt: string | Uint32Array, signal?: AbortSignal): Promise<Uint32Array> {
    if (typeof prompt !== "string") return this.#checkTokens(prompt);
    this.#refuseAbsurd(prompt.length, "prompt");
    return this.#checkPrompt(await this.tokenizer.encodeSliced(prompt, PLAIN, signal), "prompt");
  }

  /** The text of tokens, special ones included; for `echo` of a prompt that came as tokens. */
  decode(tokenIds: Uint32Array): string {
    return Buffer.concat(Array.from(tokenIds, (id) => this.tokenizer.tokenBytes(id))).toString("utf8");
  }

  /** The model's end tokens (unless ignored) and the client's own, each once. Throws `invalid-field`. */
  stopTokenIds(options: GenerationOptions): number[] {
    for (const id of options.stopTokenIds) this.#checkTokenId(id, "stop_token_ids");
    return [...new Set([...(options.ignoreEos ? [] : this.tokenizer.eosTokenIds), ...options.stopTokenIds])];
  }

  /**
   * How many tokens may be generated. Nothing requested: what the context holds (chat), or of that at most 16
   * (completions). Throws `context-length` when the request does not fit.
   */
  resolveMaxTokens(promptTokens: number, requested: number | undefined, isChat: boolean): number {
    const room = this.contextLength - promptTokens;
    if (room < 1) throw this.#promptTooLong(promptTokens, isChat ? "messages" : "prompt");
    if (requested === undefined) return isChat ? room : Math.min(room, COMPLETION_TOKENS_DEFAULT);
    if (requested <= room) return requested;
    const part = isChat ? "messages" : "prompt";
    throw new DynamoError(
      "context-length",
      `This model's maximum context length is ${this.contextLength} tokens. However, you requested ` +
        `${promptTokens + requested} tokens (${promptTokens} in the ${part}, ${requested} in the completion). ` +
        `Please reduce the length of the ${part} or completion.`,
      { param: part },
    );
  }

  #checkTokens(tokenIds: Uint32Array): Uint32Array {
    for (let index = 0; index < tokenIds.length; index++) this.#checkTokenId(tokenIds[index] as number, "prompt");
    return this.#checkPrompt(tokenIds, "prompt");
  }

  #checkTokenId(id: number, param: string): void {
    if (id < this.vocabularySize) return;
    const message = `${param}: expected token ids from 0 to ${this.vocabularySize - 1}, got ${id}`;
    throw new DynamoError("invalid-field", message, { param });
  }

  #checkPrompt(tokenIds: Uint32Array, param: "messages" | "prompt"): Uint32Array {
    if (tokenIds.length === 0) {
      throw new DynamoError("invalid-field", `${param}: expected at least one token, got none`, { param });
    }
    if (tokenIds.length >= this.contextLength) throw this.#promptTooLong(tokenIds.length, param);
    return tokenIds;
  }

  /** Before any work: a text with more characters than the context's tokens could ever stand for. */
  #refuseAbsurd(chars: number, param: "messages" | "prompt"): void {
    const tokensMin = Math.ceil(chars / this.tokenizer.unitsPerTokenMax);
    if (tokensMin >= this.contextLength) throw this.#promptTooLong(tokensMin, param, "at least ");
  }

  #chatPrompt(text: string, tokenIds: Uint32Array, startMs: number, renderedMs: number): ChatPrompt {
    const tokenizeMs = this.#clock.monotonicMs() - renderedMs;
    return { text, tokenIds, templateMs: renderedMs - startMs, tokenizeMs };
  }

  #promptTooLong(tokens: number, param: "messages" | "prompt", bound = ""): DynamoError {
    return new DynamoError(
      "context-length",
      `This model's maximum context length is ${this.contextLength} tokens. However, your ${param} resulted in ` +
        `${bound}${tokens} tokens. Please reduce the length of the ${param}.`,
      { param },
    );
  }
}

/** OpenAI's default for completions. */
const COMPLETION_TOKENS_DEFAULT = 16;
const RENDERED = { addSpecialTokens: false } as const;
const PLAIN = { addSpecialTokens: true } as const;
