import { Type, type TSchema } from "typebox";
import type { FrontendLimits } from "../config.ts";

/**
 * The shapes of requests and answers for `/openapi.json`. The hand-written validators decide what is accepted; a test
 * feeds both the same bodies, field by field. What a schema cannot say (rules between fields, sizes over a whole
 * object) stands in a description. Loaded only when the document is asked for: typebox is not part of the hot path.
 */
const MAX_INT = 0x7fff_ffff;

function nullable<T extends TSchema>(schema: T): TSchema {
  return Type.Union([schema, Type.Null()]);
}

function optional(schema: TSchema, description?: string): TSchema {
  return Type.Optional(description === undefined ? nullable(schema) : { ...nullable(schema), description });
}

function words(...values: readonly string[]): TSchema {
  return Type.Union(values.map((value) => Type.Literal(value)));
}

function strictObject(properties: Record<string, TSchema>, options: object = {}): TSchema {
  return Type.Object(properties, { additionalProperties: false, ...options });
}

const number = (minimum: number, maximum: number): TSchema => Type.Number({ minimum, maximum });
const integer = (minimum: number, maximum = MAX_INT): TSchema => Type.Integer({ minimum, maximum });
const text = (minLength: number, maxLength: number): TSchema => Type.String({ minLength, maxLength });
const label = text(0, 1_024);
/** Known fields that are not served: empty, or not at all. */
const notServed = Type.Array(Type.Unknown(), { maxItems: 0 });

const nvext = strictObject({
  agent_hints: optional(
    strictObject({
      priority: optional(integer(-(2 ** 31)), "a head start in the router's queue, seconds"),
      strict_priority: optional(integer(0, 2 ** 32 - 1), "larger first, before anything else"),
      osl: optional(integer(1), "tokens expected in the answer"),
    }),
  ),
  extra_fields: optional(
    Type.Array(words("routing", "worker_id"), { maxItems: 16 }),
    "what the answer's nvext shall carry; for operators",
  ),
  backend_instance_id: optional(Type.String({ pattern: "^[0-9a-f]{16}$" }), "the worker to use; for operators"),
  cache_salt: optional(text(1, 256), "requests share cached prefixes only with those of the same salt"),
  request_timeout_ms: optional(integer(1), "for the whole request, if shorter than the server's own limit"),
});

function generationFields(limits: FrontendLimits): Record<string, TSchema> {
  return {
    model: text(1, 512),
    temperature: optional(number(0, 2)),
    top_p: optional(number(0, 1)),
    top_k: optional(integer(-1), "0 and -1 = off"),
    min_p: optional(number(0, 1)),
    presence_penalty: optional(number(-2, 2)),
    frequency_penalty: optional(number(-2, 2)),
    repetition_penalty: optional(Type.Number({ exclusiveMinimum: 0, maximum: 2 })),
    seed: optional(Type.Integer({ minimum: -(2 ** 63), maximum: 2 ** 63 })),
    logit_bias: optional(
      Type.Object(
        {},
        {
          patternProperties: { "^(0|[1-9][0-9]{0,8})$": number(-100, 100) },
          additionalProperties: false,
          maxProperties: 1_024,
        },
      ),
      "token id to bias",
    ),
    n: optional(integer(1, limits.n)),
    max_tokens: optional(integer(1)),
    min_tokens: optional(integer(0), "at most max_tokens"),
    stop: optional(
      Type.Union([
        text(1, 1_000),
        Type.Array(Type.Union([text(1, 1_000), integer(0)]), { maxItems: limits.stopStrings }),
      ]),
      "texts, or token ids as integers",
    ),
    stop_token_ids: optional(Type.Array(integer(0), { maxItems: 64 })),
    ignore_eos: optional(Type.Boolean()),
    stream: optional(Type.Boolean()),
    stream_options: optional(
      strictObject({ include_usage: optional(Type.Boolean()), include_obfuscation: optional(Type.Boolean()) }),
      "only together with stream: true",
    ),
    nvext: optional(nvext, "Dynamo's extensions"),
    user: optional(label),
    safety_identifier: optional(label),
    prompt_cache_key: optional(label),
    metadata: optional(Type.Record(Type.String(), label, { maxProperties: 16 })),
    service_tier: optional(words("auto", "default", "flex", "scale", "priority", "fast")),
    store: optional(Type.Literal(false)),
  };
}

const textPart = strictObject({ type: Type.Literal("text"), text: Type.String() });
const content = Type.Union([Type.String(), Type.Array(textPart, { minItems: 1, maxItems: 1_024 })]);
const author = optional(text(1, 256));

const message = Type.Union([
  strictObject({ role: words("system", "developer", "user"), content, name: author }),
  strictObject({ role: Type.Literal("tool"), content, name: author, tool_call_id: Type.Optional(text(0, 256)) }),
  strictObject({
    role: Type.Literal("assistant"),
    content: optional(content),
    name: author,
    refusal: optional(Type.Union([Type.String(), notServed])),
    annotations: optional(Type.Array(Type.Unknown())),
    audio: optional(notServed),
    tool_calls: optional(notServed),
    function_call: optional(notServed),
  }),
]);

const templateArgs = Type.Object(
  {},
  {
    patternProperties: {
      "^(?!(messages|tools|documents|functions|add_generation_prompt|continue_final_message|chat_template|template|tokenize|bos_token|eos_token|pad_token|unk_token|raise_exception|strftime_now|constructor|prototype)$)[A-Za-z][A-Za-z0-9_]{0,63}$":
        Type.Unknown(),
    },
    additionalProperties: false,
    maxProperties: 64,
  },
);

const responseFormat = Type.Union([
  strictObject({ type: Type.Union([Type.Literal("text"), Type.Literal("json_object")]) }),
  strictObject({
    type: Type.Literal("json_schema"),
    json_schema: strictObject({
      name: Type.String({ minLength: 1, maxLength: 64 }),
      description: Type.Optional(Type.Unknown()),
      schema: Type.Object({}, { additionalProperties: true }),
      strict: Type.Optional(Type.Unknown()),
    }),
  }),
]);

export function chatRequestSchema(limits: FrontendLimits): TSchema {
  return strictObject({
    ...generationFields(limits),
    messages: Type.Array(message, { minItems: 1, maxItems: limits.messages }),
    max_completion_tokens: optional(integer(1), "another name for max_tokens"),
    logprobs: optional(Type.Boolean()),
    top_logprobs: optional(integer(0, 20), "only together with logprobs: true"),
    chat_template_kwargs: optional(templateArgs, "at most 16384 characters of JSON and 8 levels"),
    chat_template_args: optional(templateArgs, "another name for chat_template_kwargs"),
    reasoning_effort: optional(words("none", "minimal", "low", "medium", "high", "xhigh", "max")),
    response_format: optional(responseFormat, "json forms only with an engine that can hold an answer to them"),
    modalities: optional(Type.Array(Type.Literal("text"), { minItems: 1, maxItems: 1 })),
    parallel_tool_calls: optional(Type.Boolean()),
    prompt_cache_options: optional(Type.Object({}, { additionalProperties: true })),
    prompt_cache_retention: optional(words("in_memory", "24h")),
    tool_choice: optional(words("none", "auto")),
    function_call: optional(words("none", "auto")),
    verbosity: optional(Type.Literal("medium")),
    tools: optional(notServed),
    functions: optional(notServed),
    audio: optional(notServed),
    moderation: optional(notServed),
    prediction: optional(notServed),
    web_search_options: optional(notServed),
  });
}

export function completionRequestSchema(limits: FrontendLimits): TSchema {
  const tokens = Type.Array(integer(0), { minItems: 1 });
  const many = { minItems: 1, maxItems: limits.prompts };
  const prompt = Type.String({ minLength: 1 });
  return strictObject({
    ...generationFields(limits),
    prompt: Type.Union([prompt, Type.Array(prompt, many), tokens, Type.Array(tokens, many)]),
    echo: optional(Type.Boolean()),
    logprobs: optional(integer(0, 20)),
    best_of: optional(integer(1), "the same as n"),
    suffix: optional(Type.Literal("")),
  });
}

// Answers.

/** What the request's `nvext.extra_fields` asked for. */
const extras = Type.Optional(Type.Object({}, { additionalProperties: true }));

const usage = strictObject({
  prompt_tokens: integer(0),
  completion_tokens: integer(0),
  total_tokens: integer(0),
  prompt_tokens_details: strictObject({ cached_tokens: integer(0) }),
  completion_tokens_details: strictObject({ reasoning_tokens: integer(0) }),
  estimated: Type.Optional(Type.Literal(true)),
});
const finishReason = words("stop", "length");
const byteValues = Type.Array(integer(0, 255));
const tokenLogprob = { token: Type.String(), logprob: Type.Number(), bytes: byteValues };
const chatLogprobs = nullable(
  strictObject({
    content: Type.Array(strictObject({ ...tokenLogprob, top_logprobs: Type.Array(strictObject(tokenLogprob)) })),
    refusal: Type.Null(),
  }),
);
const completionLogprobs = nullable(
  strictObject({
    tokens: Type.Array(Type.String()),
    token_logprobs: Type.Array(nullable(Type.Number())),
    top_logprobs: Type.Array(nullable(Type.Record(Type.String(), Type.Number()))),
    text_offset: Type.Array(integer(0)),
  }),
);

function answerFields(object: string): Record<string, TSchema> {
  return {
    id: Type.String(),
    object: Type.Literal(object),
    created: Type.Integer({ description: "Unix seconds" }),
    model: Type.String(),
    system_fingerprint: Type.String(),
  };
}

export const chatAnswerSchema: TSchema = strictObject({
  ...answerFields("chat.completion"),
  choices: Type.Array(
    strictObject({
      index: integer(0),
      message: strictObject({
        role: Type.Literal("assistant"),
        content: Type.String(),
        refusal: Type.Null(),
        annotations: notServed,
      }),
      logprobs: chatLogprobs,
      finish_reason: finishReason,
    }),
  ),
  usage,
  nvext: extras,
});

export const chatChunkSchema: TSchema = strictObject({
  ...answerFields("chat.completion.chunk"),
  choices: Type.Array(
    strictObject({
      index: integer(0),
      delta: strictObject({
        role: Type.Optional(Type.Literal("assistant")),
        content: Type.Optional(Type.String()),
        refusal: Type.Optional(Type.Null()),
      }),
      logprobs: chatLogprobs,
      finish_reason: nullable(finishReason),
    }),
  ),
  usage: Type.Optional(nullable(usage)),
  nvext: extras,
});

const completionChoice = (reason: TSchema): TSchema =>
  strictObject({ text: Type.String(), index: integer(0), logprobs: completionLogprobs, finish_reason: reason });

export const completionAnswerSchema: TSchema = strictObject({
  ...answerFields("text_completion"),
  choices: Type.Array(completionChoice(finishReason)),
  usage,
  nvext: extras,
});

export const completionChunkSchema: TSchema = strictObject({
  ...answerFields("text_completion"),
  choices: Type.Array(completionChoice(nullable(finishReason))),
  usage: Type.Optional(nullable(usage)),
  nvext: extras,
});

export const busyThresholdsSchema: TSchema = strictObject({
  model: text(1, 512),
  active_decode_blocks_threshold: optional(number(0, 1), "part of a rank's KV blocks in use"),
  active_prefill_tokens_threshold: optional(Type.Number({ minimum: 0 }), "prompt tokens waiting to be prefilled"),
  active_prefill_tokens_threshold_frac: optional(number(0, 1_000), "the same in batches of the engine"),
});

export const errorSchema: TSchema = strictObject({
  error: strictObject({
    message: Type.String(),
    type: Type.String(),
    param: nullable(Type.String()),
    code: Type.String(),
  }),
});

export const modelListSchema: TSchema = Type.Object({
  object: Type.Literal("list"),
  data: Type.Array(
    Type.Object({
      id: Type.String(),
      object: Type.Literal("model"),
      created: Type.Integer(),
      owned_by: Type.String(),
    }),
  ),
});

export const healthSchema: TSchema = Type.Object({
  status: words("healthy", "unhealthy"),
  endpoints: Type.Optional(Type.Array(Type.String({ description: "dyn://namespace.component.endpoint" }))),
  instances: Type.Optional(Type.Array(Type.Unknown())),
});
