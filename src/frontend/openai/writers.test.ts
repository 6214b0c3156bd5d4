import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import OpenAI, { APIError, APIUserAbortError, BadRequestError, InternalServerError, NotFoundError } from "openai";
import { Compile } from "typebox/compile";
import { DynamoError } from "../../errors/index.ts";
import { DEFAULT_LIMITS } from "../config.ts";
import type { Exchange } from "../http/exchange.ts";
import type { Route } from "../http/server.ts";
import { RawClient, startServer } from "../http/testing.ts";
import type { LogprobEntry, ResponseWriter } from "../response-writer.ts";
import { ChatStreamWriter, ChatWholeWriter } from "./chat-writer.ts";
import { CompletionStreamWriter, CompletionWholeWriter } from "./completion-writer.ts";
import { chatAnswerSchema, chatChunkSchema, completionAnswerSchema, completionChunkSchema } from "./schemas.ts";
import { readChatRequest } from "./validate-chat.ts";
import { readCompletionRequest } from "./validate-completion.ts";

/** What a test makes the model do; the real validators, writers and server stand round it. */
type Script = (writer: ResponseWriter, exchange: Exchange) => void | Promise<void>;

const USAGE = { promptTokens: 7, completionTokens: 3, cachedTokens: 4 };
const checkers = {
  chatAnswer: Compile(chatAnswerSchema),
  chatChunk: Compile(chatChunkSchema),
  completionAnswer: Compile(completionAnswerSchema),
  completionChunk: Compile(completionChunkSchema),
};

function routes(script: () => Script): Route[] {
  const details = (
    exchange: Exchange,
    model: string,
  ): { exchange: Exchange; id: string; model: string; created: number } => ({
    exchange,
    id: "0123",
    model,
    created: 1_700_000_000,
  });
  const chat: Route = {
    method: "POST",
    path: "/v1/chat/completions",
    family: "openai",
    handle: (exchange) => {
      const { model, options } = readChatRequest(exchange.body, DEFAULT_LIMITS);
      const answer = { ...details(exchange, model), choices: options.n, includeUsage: options.includeUsage };
      return script()(options.stream ? new ChatStreamWriter(answer) : new ChatWholeWriter(answer), exchange);
    },
  };
  const completion: Route = {
    method: "POST",
    path: "/v1/completions",
    family: "openai",
    handle: (exchange) => {
      const { model, options, prompts } = readCompletionRequest(exchange.body, DEFAULT_LIMITS);
      const choices = options.n * prompts.length;
      const answer = { ...details(exchange, model), choices, includeUsage: options.includeUsage };
      return script()(
        options.stream ? new CompletionStreamWriter(answer) : new CompletionWholeWriter(answer),
        exchange,
      );
    },
  };
  return [chat, completion];
}

async function start(t: TestContext): Promise<{ client: OpenAI; port: number; play: (script: Script) => void }> {
  let current: Script = () => assert.fail("no script");
  const { port } = await startServer(
    t,
    routes(() => current),
  );
  const client = new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: "none", maxRetries: 0 });
  return { client, port, play: (script) => (current = script) };
}

const hello: Script = (writer) => {
  writer.delta(0, "Hello", undefined);
  writer.flush();
  writer.delta(0, ' "wörld" 😀\n', undefined);
  writer.flush();
  writer.finish(0, "stop");
  writer.flush();
  writer.complete(USAGE);
};
const HELLO = 'Hello "wörld" 😀\n';
const ask = { model: "m", messages: [{ role: "user" as const, content: "hi" }] };

function entry(token: string, logprob: number, top: readonly (readonly [string, number])[] = []): LogprobEntry {
  const bytes = (text: string): number[] => [...Buffer.from(text)];
  return {
    token,
    bytes: bytes(token),
    logprob,
    top: top.map(([text, value]) => ({ token: text, bytes: bytes(text), logprob: value })),
  };
}

test("chat: a whole answer as the openai client reads it", async (t) => {
  const { client, play } = await start(t);
  play(hello);
  const answer = await client.chat.completions.create(ask);
  assert.ok(checkers.chatAnswer.Check({ ...answer }));
  assert.equal(answer.id, "chatcmpl-0123");
  assert.equal(answer.object, "chat.completion");
  assert.equal(answer.created, 1_700_000_000);
  assert.deepEqual(answer.choices, [
    {
      index: 0,
      message: { role: "assistant", content: HELLO, refusal: null, annotations: [] },
      logprobs: null,
      finish_reason: "stop",
    },
  ]);
  assert.deepEqual(answer.usage, {
    prompt_tokens: 7,
    completion_tokens: 3,
    total_tokens: 10,
    prompt_tokens_details: { cached_tokens: 4 },
    completion_tokens_details: { reasoning_tokens: 0 },
  });
  assert.match(answer._request_id!, /^[0-9a-f-]{36}$/);
});

test("chat: a stream as the openai client reads it, on a connection that is used again", async (t) => {
  const { client, port, play } = await start(t);
  play(hello);
  for (let round = 0; round < 2; round++) {
    const chunks: OpenAI.ChatCompletionChunk[] = [];
    for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) chunks.push(chunk);
    for (const chunk of chunks) assert.ok(checkers.chatChunk.Check(chunk), JSON.stringify(chunk));
    assert.deepEqual(
      chunks.map(({ choices }) => choices[0]),
      [
        { index: 0, delta: { role: "assistant", content: "", refusal: null }, logprobs: null, finish_reason: null },
        { index: 0, delta: { content: "Hello" }, logprobs: null, finish_reason: null },
        { index: 0, delta: { content: ' "wörld" 😀\n' }, logprobs: null, finish_reason: null },
        { index: 0, delta: {}, logprobs: null, finish_reason: "stop" },
      ],
    );
    assert.ok(chunks.every((chunk) => !("usage" in chunk)));
  }
  const raw = await RawClient.open(t, port);
  const body = JSON.stringify({ ...ask, stream: true });
  for (let round = 0; round < 2; round++) {
    const answer = await raw.post("/v1/chat/completions", body).answer();
    assert.ok(answer.body.endsWith("data: [DONE]\n\n"));
  }
});

test("chat: include_usage adds a last chunk with the usage and null on the others", async (t) => {
  const { client, play } = await start(t);
  play(hello);
  const chunks: OpenAI.ChatCompletionChunk[] = [];
  const stream = await client.chat.completions.create({
    ...ask,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) chunks.push(chunk);
  const last = chunks.pop()!;
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage?.total_tokens, 10);
  assert.ok(checkers.chatChunk.Check(last));
  assert.equal(chunks.length, 4);
  assert.ok(chunks.every((chunk) => chunk.usage === null));
});

test("chat: several choices, each with its role first and its own end; the client's helper joins them", async (t) => {
  const { client, play } = await start(t);
  play((writer) => {
    writer.delta(1, "b", undefined);
    writer.delta(0, "a", undefined);
    writer.delta(1, "B", undefined);
    writer.delta(0, "", undefined);
    writer.flush();
    writer.finish(1, "length");
    // The third choice generated nothing.
    writer.finish(2, "stop");
    writer.finish(0, "stop");
    writer.complete(USAGE);
  });
  const final = await client.chat.completions.stream({ ...ask, n: 3 }).finalChatCompletion();
  assert.deepEqual(
    final.choices.map(({ index, message, finish_reason }) => [index, message.role, message.content, finish_reason]),
    [
      [0, "assistant", "a", "stop"],
      [1, "assistant", "bB", "length"],
      [2, "assistant", "", "stop"],
    ],
  );
  const whole = await client.chat.completions.create({ ...ask, n: 3 });
  assert.deepEqual(
    whole.choices.map(({ message, finish_reason }) => [message.content, finish_reason]),
    [
      ["a", "stop"],
      ["bB", "length"],
      ["", "stop"],
    ],
  );
});

test("chat: logprobs in OpenAI's form, whole and streamed", async (t) => {
  const { client, play } = await start(t);
  const first = entry("é", -0.5, [
    ["é", -0.5],
    ["\u0000", Number.NEGATIVE_INFINITY],
  ]);
  play((writer) => {
    writer.delta(0, "", [first]);
    writer.flush();
    writer.delta(0, "é!", [entry("!", -1)]);
    writer.finish(0, "stop");
    writer.complete(USAGE);
  });
  const expected = [
    {
      token: "é",
      logprob: -0.5,
      bytes: [195, 169],
      top_logprobs: [
        { token: "é", logprob: -0.5, bytes: [195, 169] },
        { token: "\u0000", logprob: -9999, bytes: [0] },
      ],
    },
    { token: "!", logprob: -1, bytes: [33], top_logprobs: [] },
  ];
  const whole = await client.chat.completions.create({ ...ask, logprobs: true, top_logprobs: 2 });
  assert.ok(checkers.chatAnswer.Check({ ...whole }));
  assert.deepEqual(whole.choices[0]!.logprobs, { content: expected, refusal: null });
  const content: unknown[] = [];
  for await (const chunk of await client.chat.completions.create({ ...ask, logprobs: true, stream: true })) {
    assert.ok(checkers.chatChunk.Check(chunk));
    content.push(...(chunk.choices[0]!.logprobs?.content ?? []));
  }
  assert.deepEqual(content, expected);
});

test("completions: whole and streamed, several prompts, logprobs with offsets in characters", async (t) => {
  const { client, play } = await start(t);
  play((writer) => {
    writer.delta(0, "😀", [entry("😀", Number.NaN)]);
    writer.delta(1, "x", [
      entry("x", -2, [
        ["__proto__", -3],
        ["x", -2],
      ]),
    ]);
    writer.flush();
    writer.delta(0, "yz", [entry("y", -1), entry("z", -4)]);
    writer.finish(0, "length");
    writer.finish(1, "stop");
    writer.complete(USAGE);
  });
  const first = {
    tokens: ["😀", "y", "z"],
    token_logprobs: [null, -1, -4],
    top_logprobs: [null, {}, {}],
    text_offset: [0, 1, 2],
  };
  const second = {
    tokens: ["x"],
    token_logprobs: [-2],
    top_logprobs: [JSON.parse('{"__proto__":-3,"x":-2}') as unknown],
    text_offset: [0],
  };
  const whole = await client.completions.create({ model: "m", prompt: ["a", "b"], logprobs: 2 });
  assert.ok(checkers.completionAnswer.Check({ ...whole }));
  assert.equal(whole.id, "cmpl-0123");
  assert.deepEqual(whole.choices, [
    { text: "😀yz", index: 0, logprobs: first, finish_reason: "length" },
    { text: "x", index: 1, logprobs: second, finish_reason: "stop" },
  ]);
  const texts = ["", ""];
  const offsets: number[] = [];
  let usage: unknown;
  const stream = await client.completions.create({
    model: "m",
    prompt: ["a", "b"],
    logprobs: 2,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    assert.ok(checkers.completionChunk.Check(chunk), JSON.stringify(chunk));
    for (const choice of chunk.choices) {
      texts[choice.index] += choice.text;
      if (choice.index === 0) offsets.push(...(choice.logprobs?.text_offset ?? []));
    }
    usage = chunk.usage;
  }
  assert.deepEqual(texts, ["😀yz", "x"]);
  assert.deepEqual(offsets, [0, 1, 2]);
  assert.deepEqual(usage, whole.usage);
});

test("errors: the openai client raises its own classes, with status, code and param", async (t) => {
  const { client, play } = await start(t);
  const create = (fields: object): Promise<unknown> => client.chat.completions.create({ ...ask, ...fields });
  await assert.rejects(create({ temperature: 9 }), (error: unknown) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.status, 400);
    assert.equal(error.param, "temperature");
    assert.equal(error.code, "invalid_value");
    assert.equal(error.message, "400 temperature: expected a number from 0 to 2, got 9 (number)");
    return true;
  });
  play((writer) => writer.fail(new DynamoError("model-not-found", "no model is called m", { param: "model" })));
  for (const stream of [false, true]) {
    await assert.rejects(create({ stream }), (error: unknown) => {
      assert.ok(error instanceof NotFoundError);
      assert.equal(error.code, "model_not_found");
      return true;
    });
  }
  play((writer) => writer.fail(new DynamoError("too-many-requests", "the queue is full", { retryAfterMs: 2_000 })));
  await assert.rejects(create({ stream: true }), (error: unknown) => {
    assert.ok(error instanceof InternalServerError);
    assert.equal(error.status, 529);
    assert.equal(error.headers.get("retry-after"), "2");
    return true;
  });
  // Pending text is dropped when the status can still tell.
  play((writer) => {
    writer.delta(0, "lost", undefined);
    writer.fail(new DynamoError("no-workers", "no worker serves m"));
  });
  await assert.rejects(
    create({ stream: true }),
    (error: unknown) => error instanceof InternalServerError && error.status === 503,
  );
});

test("errors: the client retries 529 by itself and does not retry 501", async (t) => {
  const { client, play } = await start(t);
  let attempts = 0;
  play((writer) => {
    attempts++;
    if (attempts === 1) writer.fail(new DynamoError("too-many-requests", "full", { retryAfterMs: 1 }));
    else void hello(writer, undefined as never);
  });
  const answer = await client.chat.completions.create(ask, { maxRetries: 2 });
  assert.equal(answer.choices[0]!.message.content, HELLO);
  assert.equal(attempts, 2);
  play((writer) => {
    attempts++;
    writer.fail(new DynamoError("unsupported-operation", "not offered"));
  });
  await assert.rejects(client.chat.completions.create(ask, { maxRetries: 2 }), /501 not offered/);
  assert.equal(attempts, 3);
});

test("errors: a stream that fails after its first byte raises in the client and has no [DONE]", async (t) => {
  const { client, port, play } = await start(t);
  play((writer) => {
    writer.delta(0, "par", undefined);
    writer.flush();
    writer.delta(0, "tial", undefined);
    writer.fail(new DynamoError("worker-lost", "the worker was lost – sorry"));
    writer.delta(0, "late", undefined);
    writer.flush();
    writer.complete(USAGE);
  });
  let text = "";
  await assert.rejects(
    async () => {
      for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
        text += chunk.choices[0]?.delta.content ?? "";
      }
    },
    (error: unknown) => {
      assert.ok(error instanceof APIError);
      assert.equal(error.code, "worker_lost");
      assert.match(error.message, /the worker was lost – sorry/);
      return true;
    },
  );
  assert.equal(text, "partial");
  const raw = await RawClient.open(t, port);
  for (let round = 0; round < 2; round++) {
    const answer = await raw.post("/v1/chat/completions", JSON.stringify({ ...ask, stream: true })).answer();
    assert.ok(answer.body.endsWith('"code":"worker_lost"}}\n\n'));
    assert.ok(!answer.body.includes("[DONE]"));
  }
});

test("errors: an answer without a finish reason is an error, never an empty success", async (t) => {
  const { client, play } = await start(t);
  play((writer) => {
    writer.delta(0, "a", undefined);
    writer.complete(USAGE);
  });
  await assert.rejects(client.chat.completions.create(ask), InternalServerError);
  await assert.rejects(client.chat.completions.create({ ...ask, stream: true }), InternalServerError);
});

test("abort: when the openai client aborts a stream, onGone comes and the writer goes quiet", async (t) => {
  const { client, play } = await start(t);
  const abort = new AbortController();
  const gone = new Promise<string>((resolve) => {
    play((writer, exchange) => {
      exchange.onGone = (reason) => {
        writer.delta(0, "b", undefined);
        writer.flush();
        writer.finish(0, "stop");
        writer.complete(USAGE);
        writer.fail(new DynamoError("client-gone", "gone"));
        resolve(`${reason} ${writer.bufferedBytes}`);
      };
      writer.delta(0, "a", undefined);
      writer.flush();
    });
  });
  const stream = await client.chat.completions.create({ ...ask, stream: true }, { signal: abort.signal });
  const read = async (): Promise<void> => {
    for await (const chunk of stream) if (chunk.choices[0]?.delta.content === "a") abort.abort();
  };
  await read().catch((error: unknown) => assert.ok(error instanceof APIUserAbortError));
  assert.equal(await gone, "client-gone 0");
});

test("abort: a client that leaves before a whole answer is noticed too", async (t) => {
  const { port, play } = await start(t);
  const arrived = Promise.withResolvers<Exchange>();
  play((_writer, exchange) => arrived.resolve(exchange));
  const raw = await RawClient.open(t, port);
  raw.post("/v1/chat/completions", JSON.stringify(ask));
  const exchange = await arrived.promise;
  const gone = new Promise<string>((resolve) => (exchange.onGone = resolve));
  raw.socket.end();
  assert.equal(await gone, "client-gone");
});
