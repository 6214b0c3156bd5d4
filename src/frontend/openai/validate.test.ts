import assert from "node:assert/strict";
import { test } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import type { ChatRequest, CompletionRequest } from "../../protocol/openai/index.ts";
import { DEFAULT_LIMITS } from "../config.ts";
import { parseJsonBody } from "../http/json-body.ts";
import { readChatRequest } from "./validate-chat.ts";
import { readCompletionRequest } from "./validate-completion.ts";

const MESSAGES = [{ role: "user", content: "hi" }];

/** Through JSON, as a client sends it. */
function chat(fields: object, messages: unknown = MESSAGES): ChatRequest {
  const body = JSON.stringify({ model: "m", messages, ...fields });
  return readChatRequest(parseJsonBody(Buffer.from(body)), DEFAULT_LIMITS);
}

function completion(fields: object, prompt: unknown = "hi"): CompletionRequest {
  return readCompletionRequest(JSON.parse(JSON.stringify({ model: "m", prompt, ...fields })), DEFAULT_LIMITS);
}

function refusal(read: () => unknown): DynamoError {
  try {
    read();
  } catch (thrown) {
    assert.ok(thrown instanceof DynamoError, String(thrown));
    return thrown;
  }
  assert.fail("the body was accepted");
}

test("chat body: defaults are OpenAI's", () => {
  assert.deepEqual(chat({}), {
    model: "m",
    messages: [{ role: "user", content: "hi" }],
    chatTemplateArgs: {},
    options: {
      sampling: {
        temperature: 1,
        topP: 1,
        topK: 0,
        minP: 0,
        presencePenalty: 0,
        frequencyPenalty: 0,
        repetitionPenalty: 1,
      },
      maxTokens: undefined,
      minTokens: 0,
      stop: [],
      stopTokenIds: [],
      ignoreEos: false,
      n: 1,
      topLogprobs: -1,
      stream: false,
      includeUsage: false,
    },
  });
});

test("chat body: every served field arrives", () => {
  const { options, chatTemplateArgs } = chat({
    temperature: 0,
    top_p: 0.5,
    top_k: 40,
    min_p: 0.1,
    presence_penalty: -2,
    frequency_penalty: 2,
    repetition_penalty: 1.1,
    seed: 7,
    logit_bias: { "5": -100, "50256": 1.5 },
    max_completion_tokens: 9,
    min_tokens: 2,
    stop: ["a", 3, "b"],
    stop_token_ids: [4],
    ignore_eos: true,
    n: 3,
    logprobs: true,
    top_logprobs: 5,
    stream: true,
    stream_options: { include_usage: true, include_obfuscation: false },
    chat_template_kwargs: { enable_thinking: false },
    reasoning_effort: "low",
  });
  assert.deepEqual(options, {
    sampling: {
      temperature: 0,
      topP: 0.5,
      topK: 40,
      minP: 0.1,
      presencePenalty: -2,
      frequencyPenalty: 2,
      repetitionPenalty: 1.1,
      seed: 7,
      logitBias: [
        [5, -100],
        [50256, 1.5],
      ],
    },
    maxTokens: 9,
    minTokens: 2,
    stop: ["a", "b"],
    stopTokenIds: [3, 4],
    ignoreEos: true,
    n: 3,
    topLogprobs: 5,
    stream: true,
    includeUsage: true,
  });
  assert.deepEqual(chatTemplateArgs, { reasoning_effort: "low", enable_thinking: false });
});

test("chat body: null means the default, edge values have their meaning", () => {
  const nulls = { temperature: null, n: null, stop: null, stream: null, stream_options: null, tools: null, seed: null };
  assert.deepEqual(chat(nulls), chat({}));
  assert.equal(chat({ top_k: -1 }).options.sampling.topK, 0);
  assert.ok(chat({ top_p: 0 }).options.sampling.topP > 0);
  assert.equal(chat({ seed: -1 }).options.sampling.seed, 0xffff_ffff);
  assert.equal(chat({ seed: 2 ** 40 + 5 }).options.sampling.seed, 5);
  assert.equal(chat({ logprobs: true }).options.topLogprobs, 0);
  assert.equal(chat({ logprobs: false, top_logprobs: 0 }).options.topLogprobs, -1);
  assert.deepEqual(chat({ stop: "x" }).options.stop, ["x"]);
  assert.equal(chat({ max_tokens: 4, max_completion_tokens: 4 }).options.maxTokens, 4);
});

test("chat body: hints without effect here are accepted", () => {
  const hints = {
    user: "u",
    metadata: { a: "b" },
    store: false,
    service_tier: "auto",
    parallel_tool_calls: true,
    prompt_cache_key: "k",
    prompt_cache_retention: "24h",
    safety_identifier: "s",
    tools: [],
    tool_choice: "none",
    response_format: { type: "text" },
    modalities: ["text"],
    verbosity: "medium",
  };
  assert.deepEqual(chat(hints), chat({}));
});

test("chat body: messages take text parts, our own answers, names and tool results", () => {
  const { messages } = chat({}, [
    { role: "system", content: "s" },
    {
      role: "developer",
      content: [
        { type: "text", text: "a" },
        { type: "text", text: "b" },
      ],
    },
    { role: "user", content: "", name: "ann" },
    {
      role: "assistant",
      content: null,
      refusal: null,
      annotations: [],
      audio: null,
      tool_calls: [],
      function_call: null,
    },
    { role: "assistant" },
    { role: "tool", content: "42", tool_call_id: "call_1" },
  ]);
  assert.deepEqual(messages, [
    { role: "system", content: "s" },
    { role: "developer", content: "a\nb" },
    { role: "user", content: "", name: "ann" },
    { role: "assistant", content: "" },
    { role: "assistant", content: "" },
    { role: "tool", content: "42" },
  ]);
});

test("chat body: an invalid field is named with what was expected and what came", () => {
  const cases: readonly (readonly [object, string])[] = [
    [{ temperature: "hot" }, 'temperature: expected a number from 0 to 2, got "hot" (string)'],
    [{ temperature: 2.5 }, "temperature: expected a number from 0 to 2, got 2.5 (number)"],
    [{ n: 1.5 }, "n: expected an integer from 1 to 16, got 1.5 (number)"],
    [{ n: 17 }, "n: expected an integer from 1 to 16, got 17 (number)"],
    [{ max_tokens: 0 }, "max_tokens: expected an integer of at least 1, got 0 (number)"],
    [
      { max_tokens: 4, max_completion_tokens: 5 },
      "max_completion_tokens: expected the same value as its other name (4), got 5 (number)",
    ],
    [{ min_tokens: 5, max_tokens: 4 }, "min_tokens: expected at most max_tokens (4), got 5 (number)"],
    [{ stream: "yes" }, 'stream: expected true or false, got "yes" (string)'],
    [{ stop: ["a", {}] }, "stop[1]: expected a string or a token id, got an object"],
    [{ stop: [""] }, 'stop[0]: expected a string of 1 to 1000 characters, got "" (string)'],
    [{ stop: "x".repeat(1_001) }, "stop: expected a string of 1 to 1000 characters, got a string of 1001 characters"],
    [
      { stop: Array.from({ length: 17 }, () => "a") },
      "stop: expected a string or an array of at most 16, got an array of 17",
    ],
    [{ logit_bias: { x: 1 } }, 'logit_bias: expected token ids as keys, got "x" (string)'],
    [{ logit_bias: { "1": 101 } }, "logit_bias.1: expected a number from -100 to 100, got 101 (number)"],
    [{ top_logprobs: 2 }, "top_logprobs: expected only together with logprobs: true"],
    [{ stream_options: {} }, "stream_options: expected only together with stream: true"],
    [{ repetition_penalty: 0 }, "repetition_penalty: expected a number above 0 and at most 2, got 0 (number)"],
    [{ model: 5 }, "model: expected a string of 1 to 512 characters, got 5 (number)"],
    [{ model: undefined }, "model: expected the name of a model, got nothing"],
    [{ messages: undefined }, "messages: expected an array of messages, got nothing"],
    [{ messages: [] }, "messages: expected an array of 1 to 2048 messages, got an array of 0"],
    [{ messages: "secret" }, "messages: expected an array of 1 to 2048 messages, got a string of 6 characters"],
    [{ messages: ["secret"] }, "messages[0]: expected an object, got a string of 6 characters"],
    [
      { messages: [...MESSAGES, { role: "bot", content: "" }] },
      'messages[1].role: expected one of "system", "developer", "user", "assistant", "tool", got "bot" (string)',
    ],
    [
      { messages: [{ role: "user" }] },
      "messages[0].content: expected a string or an array of 1 to 1024 text parts, got nothing",
    ],
    [
      { messages: [{ role: "user", content: [{ type: "text", text: 1 }] }] },
      "messages[0].content[0].text: expected a string, got 1 (number)",
    ],
    [
      { chat_template_kwargs: { messages: [] } },
      'chat_template_kwargs: expected no key that the request itself sets, got "messages" (string)',
    ],
    [
      { chat_template_kwargs: { a: "x".repeat(20_000) } },
      "chat_template_kwargs: expected at most 16384 characters of JSON, got 20008 (number)",
    ],
  ];
  for (const [fields, message] of cases) {
    const error = refusal(() => chat(fields));
    assert.equal(error.publicMessage, message);
    assert.equal(error.reason, "invalid-field");
    assert.equal(error.param, message.slice(0, message.indexOf(":")));
  }
  assert.equal(
    refusal(() => readChatRequest([], DEFAULT_LIMITS)).publicMessage,
    "body: expected a JSON object, got an array of 0",
  );
});

test("chat body: unknown fields are refused together, whatever their names", () => {
  const error = refusal(() => chat({ temprature: 1, foo: 2, model: 5 }));
  assert.equal(error.reason, "unknown-field");
  assert.equal(error.publicMessage, "unknown fields: temprature, foo");
  assert.equal(error.param, "temprature");
  assert.equal(
    refusal(() => chat({ stream: true, stream_options: { x: 1 } })).publicMessage,
    "unknown field: stream_options.x",
  );
  assert.equal(
    refusal(() => chat({}, [{ role: "user", content: "", tool_calls: [] }])).publicMessage,
    "unknown field: messages[0].tool_calls",
  );
  const hostile = Object.fromEntries(Array.from({ length: 5_000 }, (_, i) => [`k${i}`.padEnd(200, "x"), 1]));
  const { publicMessage } = refusal(() => chat(hostile));
  assert.match(publicMessage, / and 4984 more$/);
  assert.ok(publicMessage.length < 2_000);
});

test("chat body: __proto__ and constructor are unknown fields like others, and arguments cannot carry them", () => {
  for (const key of ["__proto__", "constructor", "toString", "hasOwnProperty"]) {
    const body = parseJsonBody(
      Buffer.from(`{"model":"m","messages":[{"role":"user","content":"x"}],"${key}":{"n":9}}`),
    );
    assert.equal(refusal(() => readChatRequest(body, DEFAULT_LIMITS)).publicMessage, `unknown field: ${key}`);
    const message = parseJsonBody(Buffer.from(`{"model":"m","messages":[{"role":"user","content":"x","${key}":1}]}`));
    assert.equal(
      refusal(() => readChatRequest(message, DEFAULT_LIMITS)).publicMessage,
      `unknown field: messages[0].${key}`,
    );
  }
  for (const args of ['{"__proto__":{"a":1}}', '{"a":{"b":[{"__proto__":1}]}}', '{"constructor":1}']) {
    const body = parseJsonBody(
      Buffer.from(`{"model":"m","messages":[{"role":"user","content":"x"}],"chat_template_kwargs":${args}}`),
    );
    assert.equal(refusal(() => readChatRequest(body, DEFAULT_LIMITS)).reason, "invalid-field");
  }
  assert.equal(({} as Record<string, unknown>).n, undefined);
});

test("chat body: forms of the answer are read, and checked", () => {
  assert.equal(chat({ response_format: { type: "text" } }).options.answerForm, undefined);
  assert.deepEqual(chat({ response_format: { type: "json_object" } }).options.answerForm, { kind: "json" });
  const schema = { type: "object" };
  const described = { name: "n", strict: true, schema };
  assert.deepEqual(chat({ response_format: { type: "json_schema", json_schema: described } }).options.answerForm, {
    kind: "json-schema",
    schema,
  });
  for (const format of [
    { type: "xml" },
    { type: "json_object", extra: 1 },
    { type: "json_schema" },
    { type: "json_schema", json_schema: { name: "n" } },
    { type: "json_schema", json_schema: { schema } },
  ]) {
    assert.equal(refusal(() => chat({ response_format: format })).class, "invalid-request", JSON.stringify(format));
  }
});

test("chat body: known fields that are not served say so with 501's class", () => {
  const cases: readonly object[] = [
    { tools: [{ type: "function", function: { name: "f" } }] },
    { functions: [{ name: "f" }] },
    { tool_choice: "required" },
    { function_call: { name: "f" } },
    { audio: { voice: "a" } },
    { modalities: ["text", "audio"] },
    { web_search_options: {} },
    { prediction: { type: "content", content: "" } },
    { store: true },
    { verbosity: "low" },
    { messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "data:" } }] }] },
    { messages: [{ role: "assistant", tool_calls: [{}] }] },
  ];
  for (const fields of cases) {
    const error = refusal(() => chat(fields));
    assert.equal(error.reason, "unsupported-field", JSON.stringify(fields));
    assert.equal(error.class, "not-implemented");
    assert.ok(error.publicMessage.startsWith(`${error.param!}: `));
  }
});

test("completion body: prompts come as text or token ids, one or many", () => {
  assert.deepEqual(completion({}, "a").prompts, ["a"]);
  assert.deepEqual(completion({}, ["a", "b"]).prompts, ["a", "b"]);
  assert.deepEqual(completion({}, [1, 2]).prompts, [Uint32Array.of(1, 2)]);
  assert.deepEqual(completion({}, [[1, 2], [3]]).prompts, [Uint32Array.of(1, 2), Uint32Array.of(3)]);
  const refused: readonly (readonly [unknown, string])[] = [
    [
      [],
      "prompt: expected a string, or a non-empty array of strings, of token ids or of arrays of token ids, got an array of 0",
    ],
    [
      null,
      "prompt: expected a string, or a non-empty array of strings, of token ids or of arrays of token ids, got null",
    ],
    ["", "prompt: expected a prompt that is not empty, got a string of 0 characters"],
    [[[]], "prompt[0]: expected at least one token id, got an array of 0"],
    [[1, "secret"], "prompt[1]: expected an integer of at least 0, got a string of 6 characters"],
    [["secret", 1], "prompt[1]: expected a string, got 1 (number)"],
    [[[1], "secret"], "prompt[1]: expected an array of token ids, got a string of 6 characters"],
    [[1, -1], "prompt[1]: expected an integer of at least 0, got -1 (number)"],
    [[1.5], "prompt[0]: expected an integer of at least 0, got 1.5 (number)"],
    [Array.from({ length: 257 }, () => "a"), "prompt: expected at most 256 prompts, got 257 (number)"],
  ];
  for (const [prompt, message] of refused) assert.equal(refusal(() => completion({}, prompt)).publicMessage, message);
});

test("completion body: 16 tokens by default, logprobs as a number, echo, best_of only as n", () => {
  const plain = completion({});
  assert.equal(plain.options.maxTokens, 16);
  assert.equal(plain.options.topLogprobs, -1);
  const rich = completion({ logprobs: 5, echo: true, n: 2, best_of: 2, suffix: null });
  assert.equal(rich.options.topLogprobs, 5);
  assert.equal(rich.echo, true);
  assert.equal(refusal(() => completion({ best_of: 3 })).reason, "unsupported-field");
  assert.equal(refusal(() => completion({ n: 2, best_of: 1 })).reason, "invalid-field");
  assert.equal(refusal(() => completion({ suffix: "x" })).reason, "unsupported-field");
  assert.equal(refusal(() => completion({ messages: [] })).publicMessage, "unknown field: messages");
  assert.equal(
    refusal(() =>
      completion(
        { n: 16 },
        Array.from({ length: 17 }, () => "a"),
      ),
    ).publicMessage,
    "n: expected at most 256 choices over all prompts, got 272",
  );
});
