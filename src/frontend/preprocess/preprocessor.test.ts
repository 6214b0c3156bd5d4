import assert from "node:assert/strict";
import { test } from "node:test";
import { byteArtifact, type TokenizerArtifact } from "../../model/index.ts";
import { GREEDY } from "../../protocol/index.ts";
import type { ChatRequest, GenerationOptions } from "../../protocol/openai/types.ts";
import { Preprocessor } from "./preprocessor.ts";

function someOptions(changes: Partial<GenerationOptions> = {}): GenerationOptions {
  return {
    sampling: GREEDY,
    maxTokens: undefined,
    minTokens: 0,
    stop: [],
    stopTokenIds: [],
    ignoreEos: false,
    n: 1,
    topLogprobs: -1,
    stream: false,
    includeUsage: false,
    ...changes,
  };
}

function aChat(content: string, changes: Partial<ChatRequest> = {}): ChatRequest {
  return {
    model: "m",
    messages: [{ role: "user", content }],
    options: someOptions(),
    chatTemplateArgs: {},
    ...changes,
  };
}

function aPreprocessor(contextLength = 100, changes: Partial<TokenizerArtifact> = {}): Promise<Preprocessor> {
  return Preprocessor.create({ ...byteArtifact(), ...changes }, { contextLength, vocabularySize: 259 });
}

test("a chat becomes the rendered template's tokens, without begin tokens of our own", async () => {
  const preprocessor = await aPreprocessor(100, { addBosToken: true, bosTokenId: 258 });
  const { text, tokenIds, templateMs, tokenizeMs } = preprocessor.chat(aChat("hé"));
  assert.equal(text, "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n");
  assert.deepEqual([...tokenIds], [256, ...Buffer.from("user\nhé"), 257, 0x0a, 256, ...Buffer.from("assistant\n")]);
  assert.equal(preprocessor.decode(tokenIds), text);
  assert.ok(templateMs >= 0 && tokenizeMs >= 0);
  assert.deepEqual((await preprocessor.chatSliced(aChat("hé"))).tokenIds, tokenIds);
});

test("a completion prompt gets the model's begin token; tokens are taken as they are", async () => {
  const preprocessor = await aPreprocessor(100, { addBosToken: true, bosTokenId: 258 });
  assert.deepEqual([...preprocessor.encodePrompt("a<|im_end|>")], [258, 0x61, 257]);
  assert.deepEqual([...(await preprocessor.encodePromptSliced("a"))], [258, 0x61]);
  const tokens = Uint32Array.of(0, 258, 7);
  assert.equal(preprocessor.encodePrompt(tokens), tokens);
  assert.equal(await preprocessor.encodePromptSliced(tokens), tokens);
});

test("an empty prompt is the begin token if the model has one, else refused", async () => {
  const withBegin = await aPreprocessor(100, { addBosToken: true, bosTokenId: 258 });
  assert.deepEqual([...withBegin.encodePrompt("")], [258]);
  const without = await aPreprocessor();
  const refused = { reason: "invalid-field", param: "prompt" };
  assert.throws(() => without.encodePrompt(""), refused);
  assert.throws(() => without.encodePrompt(new Uint32Array(0)), refused);
  await assert.rejects(without.encodePromptSliced(""), refused);
});

test("a token id outside the vocabulary is refused with the range", async () => {
  const preprocessor = await aPreprocessor();
  const message = "prompt: expected token ids from 0 to 258, got 259";
  assert.throws(() => preprocessor.encodePrompt(Uint32Array.of(1, 259)), { reason: "invalid-field", message });
  assert.throws(() => preprocessor.stopTokenIds(someOptions({ stopTokenIds: [300] })), {
    reason: "invalid-field",
    param: "stop_token_ids",
  });
});

test("a prompt that fills the context is refused in OpenAI's words", async () => {
  const preprocessor = await aPreprocessor(20);
  assert.equal(preprocessor.encodePrompt("x".repeat(19)).length, 19);
  assert.throws(() => preprocessor.encodePrompt("x".repeat(20)), {
    reason: "context-length",
    message:
      "This model's maximum context length is 20 tokens. However, your prompt resulted in 20 tokens. " +
      "Please reduce the length of the prompt.",
  });
  assert.throws(() => preprocessor.encodePrompt(new Uint32Array(25)), { reason: "context-length" });
  assert.throws(() => preprocessor.chat(aChat("hello")), { reason: "context-length", param: "messages" });
});

test("a text that can never fit is refused before it is rendered or tokenized", async () => {
  const preprocessor = await aPreprocessor(20);
  const started = performance.now();
  for (let round = 0; round < 20; round++) {
    const message = /at least \d+ tokens/;
    assert.throws(() => preprocessor.encodePrompt("x".repeat(10_000_000)), { reason: "context-length", message });
    assert.throws(() => preprocessor.chat(aChat("x".repeat(10_000_000))), { reason: "context-length", message });
  }
  assert.ok(performance.now() - started < 1_000, "no work was done on the texts");
});

test("max_tokens: the rest of the context for chats, 16 for completions, and no more than fits", async () => {
  const preprocessor = await aPreprocessor(100);
  assert.equal(preprocessor.resolveMaxTokens(40, undefined, true), 60);
  assert.equal(preprocessor.resolveMaxTokens(40, undefined, false), 16);
  assert.equal(preprocessor.resolveMaxTokens(90, undefined, false), 10);
  assert.equal(preprocessor.resolveMaxTokens(40, 60, true), 60);
  assert.throws(() => preprocessor.resolveMaxTokens(40, 61, true), {
    reason: "context-length",
    message:
      "This model's maximum context length is 100 tokens. However, you requested 101 tokens (40 in the messages, 61 in the " +
      "completion). Please reduce the length of the messages or completion.",
  });
  assert.throws(() => preprocessor.resolveMaxTokens(100, undefined, true), { reason: "context-length" });
});

test("stop tokens are the model's and the client's, each once; ignoring the end leaves the client's", async () => {
  const preprocessor = await aPreprocessor();
  assert.deepEqual(preprocessor.stopTokenIds(someOptions()), [257]);
  assert.deepEqual(preprocessor.stopTokenIds(someOptions({ stopTokenIds: [5, 257, 5] })), [257, 5]);
  assert.deepEqual(preprocessor.stopTokenIds(someOptions({ stopTokenIds: [5], ignoreEos: true })), [5]);
  assert.deepEqual(preprocessor.stopTokenIds(someOptions({ ignoreEos: true })), []);
});

test("a model without a template has no chat", async () => {
  const artifact: Record<string, unknown> = { ...byteArtifact() };
  delete artifact.chatTemplate;
  const preprocessor = await Preprocessor.create(artifact as unknown as TokenizerArtifact, {
    contextLength: 100,
    vocabularySize: 259,
  });
  assert.equal(preprocessor.hasChatTemplate, false);
  assert.throws(() => preprocessor.chat(aChat("x")), { reason: "unsupported-operation" });
});

test("a broken template stops the model from being served", async () => {
  await assert.rejects(aPreprocessor(100, { chatTemplate: "{% if %}" }), { reason: "model-file-invalid" });
});
