import type { FrontendLimits } from "../config.ts";
import type { ChatMessage, ChatRequest } from "../../protocol/openai/index.ts";
import { DynamoError } from "../../errors/index.ts";
import {
  MAX_INT,
  invalidField,
  isObject,
  readBoolean,
  readInteger,
  readObject,
  readOneOf,
  readString,
  refuseUnknown,
  unknownFields,
  unsupportedField,
  type JsonObject,
} from "./fields.ts";
import type { WithNvext } from "./nvext.ts";
import {
  GENERATION_FIELDS,
  GenerationDraft,
  finishOptions,
  ignored,
  nullable,
  readFields,
  refused,
  requireModel,
  setMaxTokens,
  type FieldReader,
} from "./generation-fields.ts";

/**
 * The body of `POST /v1/chat/completions` to a `ChatRequest`. Fields that we do not know are refused together, known
 * ones that we do not serve (tools, images, structured output) with 501, hints without effect are checked and dropped.
 * Messages may carry what our own answers carry (`refusal`, `annotations`, ...), so that a client can send them back.
 */
class ChatDraft extends GenerationDraft {
  messages: readonly ChatMessage[] | undefined = undefined;
  logprobs = false;
  templateArgs: Record<string, unknown> | undefined = undefined;
  /** Kept apart from `templateArgs`: an explicit argument of that name wins. */
  reasoningEffort: string | undefined = undefined;
}

const REASONING_EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];
const NO_ARGS: Readonly<Record<string, unknown>> = Object.freeze({});

const CHAT_FIELDS: Readonly<Record<string, FieldReader<ChatDraft>>> = {
  ...GENERATION_FIELDS,
  messages: (draft, value, name) => (draft.messages = readMessages(value, name, draft.limits.messages)),
  max_completion_tokens: nullable((draft, value, name) =>
    setMaxTokens(draft, readInteger(value, name, 1, MAX_INT), name),
  ),
  logprobs: nullable((draft, value, name) => (draft.logprobs = readBoolean(value, name))),
  top_logprobs: nullable((draft, value, name) => (draft.topLogprobs = readInteger(value, name, 0, 20))),
  chat_template_kwargs: nullable(readTemplateArgs),
  // Dynamo's other name for the same.
  chat_template_args: nullable(readTemplateArgs),
  reasoning_effort: nullable(
    (draft, value, name) => (draft.reasoningEffort = readOneOf(value, name, REASONING_EFFORTS)),
  ),
  response_format: nullable(readResponseFormat),
  modalities: nullable((_draft, value, name) => {
    if (Array.isArray(value) && value.length === 1 && value[0] === "text") return;
    throw unsupportedField(name, 'only ["text"] is served');
  }),
  // Hints.
  parallel_tool_calls: nullable(ignored(readBoolean)),
  prompt_cache_options: nullable(ignored(readObject)),
  prompt_cache_retention: nullable(ignored((value, name) => readOneOf(value, name, ["in_memory", "24h"]))),
  tool_choice: nullable(readToolChoice),
  function_call: nullable(readToolChoice),
  verbosity: nullable((_draft, value, name) => {
    if (readOneOf(value, name, ["low", "medium", "high"]) !== "medium") {
      throw unsupportedField(name, 'only "medium", the default, is served');
    }
  }),
  // Known, not served.
  tools: refused("tool calls are not served"),
  functions: refused("function calls are not served"),
  audio: refused("audio output is not served"),
  moderation: refused("moderation is not served"),
  prediction: refused("predicted outputs are not served"),
  web_search_options: refused("web search is not served"),
};

const READERS = new Map(Object.entries(CHAT_FIELDS));
/** For the test that compares this list with the published schema. */
export const CHAT_FIELD_NAMES: readonly string[] = [...READERS.keys()];

/** Throws `invalid-field`, `unknown-field` or `unsupported-field`. */
export function readChatRequest(body: unknown, limits: FrontendLimits): ChatRequest & WithNvext {
  const draft = readFields(body, READERS, new ChatDraft(limits));
  const model = requireModel(draft);
  const { messages } = draft;
  if (messages === undefined) throw invalidField("messages", "an array of messages", undefined);
  if (!draft.logprobs && draft.topLogprobs > 0) {
    throw new DynamoError("invalid-field", "top_logprobs: expected only together with logprobs: true", {
      param: "top_logprobs",
    });
  }
  draft.topLogprobs = draft.logprobs ? Math.max(0, draft.topLogprobs) : -1;
  const request = {
    model,
    messages,
    options: finishOptions(draft, undefined),
    chatTemplateArgs: templateArgsOf(draft),
  };
  return draft.nvext === undefined ? request : { ...request, nvext: draft.nvext };
}

function templateArgsOf(draft: ChatDraft): Readonly<Record<string, unknown>> {
  if (draft.reasoningEffort === undefined) return draft.templateArgs ?? NO_ARGS;
  return { reasoning_effort: draft.reasoningEffort, ...draft.templateArgs };
}

// Messages.

const ROLES = ["system", "developer", "user", "assistant", "tool"];
const MAX_NAME_CHARS = 256;

function readMessages(value: unknown, name: string, maxMessages: number): readonly ChatMessage[] {
  if (!Array.isArray(value) || value.length === 0 || value.length > maxMessages) {
    throw invalidField(name, `an array of 1 to ${maxMessages} messages`, value);
  }
  return (value as unknown[]).map((message, index) => readMessage(message, `${name}[${index}]`));
}

function readMessage(value: unknown, name: string): ChatMessage {
  if (!isObject(value)) throw invalidField(name, "an object", value);
  const { role, content } = value;
  if (typeof role !== "string" || !ROLES.includes(role)) {
    throw invalidField(`${name}.role`, `one of ${ROLES.map((word) => `"${word}"`).join(", ")}`, role);
  }
  const assistant = role === "assistant";
  let author: string | undefined;
  let unknown: string[] | undefined;
  for (const key in value) {
    switch (key) {
      case "role":
      case "content":
        break;
      case "name":
        if (value[key] !== null) author = readString(value[key], `${name}.name`, 1, MAX_NAME_CHARS);
        break;
      case "tool_call_id":
        if (role !== "tool") (unknown ??= []).push(key);
        else readString(value[key], `${name}.tool_call_id`, 0, MAX_NAME_CHARS);
        break;
      case "refusal":
      case "annotations":
      case "audio":
      case "tool_calls":
      case "function_call":
        if (!assistant) (unknown ??= []).push(key);
        else readAnswerPart(value, key, name);
        break;
      default:
        (unknown ??= []).push(key);
    }
  }
  if (unknown !== undefined) throw unknownFields(unknown, `${name}.`);
  const text = readContent(content, `${name}.content`, assistant);
  return author === undefined ? { role, content: text } : { role, content: text, name: author };
}

/** What an assistant message carries besides its text: empty as in our answers, or not served. */
function readAnswerPart(message: JsonObject, key: string, name: string): void {
  const value = message[key];
  if (value === null || value === undefined || (Array.isArray(value) && value.length === 0)) return;
  if (key === "refusal" && typeof value === "string") return;
  if (key === "annotations" && Array.isArray(value)) return;
  if (key === "refusal") throw invalidField(`${name}.${key}`, "a string or null", value);
  if (key === "annotations") throw invalidField(`${name}.${key}`, "an array or null", value);
  throw unsupportedField(`${name}.${key}`, "tool calls and audio are not served");
}

/** Text parts are joined with a line break, as vLLM does. */
function readContent(value: unknown, name: string, mayBeMissing: boolean): string {
  if (typeof value === "string") return value;
  if ((value === null || value === undefined) && mayBeMissing) return "";
  if (!Array.isArray(value) || value.length === 0 || value.length > MAX_PARTS) {
    throw invalidField(name, `a string or an array of 1 to ${MAX_PARTS} text parts`, value);
  }
  return (value as unknown[]).map((part, index) => readTextPart(part, `${name}[${index}]`)).join("\n");
}

const MAX_PARTS = 1_024;
const TEXT_PART_FIELDS = new Set(["type", "text"]);

function readTextPart(value: unknown, name: string): string {
  const part = readObject(value, name);
  if (typeof part.type !== "string") throw invalidField(`${name}.type`, '"text"', part.type);
  if (part.type !== "text") throw unsupportedField(`${name}.type`, 'only "text" parts are served');
  refuseUnknown(part, TEXT_PART_FIELDS, `${name}.`);
  if (typeof part.text !== "string") throw invalidField(`${name}.text`, "a string", part.text);
  return part.text;
}

// Options of chat only.

function readToolChoice(_draft: unknown, value: unknown, name: string): void {
  if (value === "none" || value === "auto") return;
  if (typeof value !== "string" && !isObject(value)) throw invalidField(name, '"none" or "auto"', value);
  throw unsupportedField(name, 'tool calls are not served; only "none" and "auto" are accepted');
}

/** Whether the model's engine can hold its answer to it is found out with the model. */
function readResponseFormat(draft: GenerationDraft, value: unknown, name: string): void {
  const format = readObject(value, name);
  switch (format.type) {
    case "text":
      return refuseUnknown(format, TYPE_ONLY, `${name}.`);
    case "json_object":
      refuseUnknown(format, TYPE_ONLY, `${name}.`);
      draft.answerForm = { kind: "json" };
      return;
    case "json_schema":
      refuseUnknown(format, SCHEMA_FORMAT, `${name}.`);
      draft.answerForm = { kind: "json-schema", schema: readSchema(format.json_schema, `${name}.json_schema`) };
      return;
    default:
      throw invalidField(`${name}.type`, '"text", "json_object" or "json_schema"', format.type);
  }
}

const TYPE_ONLY = new Set(["type"]);
const SCHEMA_FORMAT = new Set(["type", "json_schema"]);
const SCHEMA_FIELDS = new Set(["name", "description", "schema", "strict"]);
/** Of a schema as JSON. OpenAI allows 120,000 characters of names and values. */
const MAX_SCHEMA_CHARS = 128 * 1024;

function readSchema(value: unknown, name: string): Readonly<Record<string, unknown>> {
  const described = readObject(value, name);
  refuseUnknown(described, SCHEMA_FIELDS, `${name}.`);
  readString(described.name, `${name}.name`, 1, 64);
  const schema = readObject(described.schema, `${name}.schema`);
  const length = JSON.stringify(schema).length;
  if (length > MAX_SCHEMA_CHARS)
    throw invalidField(`${name}.schema`, `at most ${MAX_SCHEMA_CHARS} characters of JSON`, length);
  return schema;
}

// Template arguments.

const MAX_TEMPLATE_ARGS = 64;
/** Characters of the arguments as JSON; switches and short texts, not documents. */
const MAX_TEMPLATE_ARGS_CHARS = 16 * 1024;
const MAX_TEMPLATE_ARGS_DEPTH = 8;
const TEMPLATE_ARG_NAME = /^[A-Za-z][A-Za-z0-9_]{0,63}$/;
/** What the template gets from the request itself or from the model: no argument may take its place. */
const RESERVED_ARGS: ReadonlySet<string> = new Set([
  "messages",
  "tools",
  "documents",
  "functions",
  "add_generation_prompt",
  "continue_final_message",
  "chat_template",
  "template",
  "tokenize",
  "bos_token",
  "eos_token",
  "pad_token",
  "unk_token",
  "raise_exception",
  "strftime_now",
]);
const UNSAFE_KEYS: ReadonlySet<string> = new Set(["__proto__", "constructor", "prototype"]);

function readTemplateArgs(draft: ChatDraft, value: unknown, name: string): void {
  const given = readObject(value, name);
  if (draft.templateArgs !== undefined) throw invalidField(name, "only one of its two names", value);
  const keys = Object.keys(given);
  if (keys.length > MAX_TEMPLATE_ARGS) throw invalidField(name, `at most ${MAX_TEMPLATE_ARGS} entries`, keys.length);
  const args: Record<string, unknown> = {};
  for (const key of keys) {
    if (!TEMPLATE_ARG_NAME.test(key) || UNSAFE_KEYS.has(key)) throw invalidField(name, "identifiers as keys", key);
    if (RESERVED_ARGS.has(key)) throw invalidField(name, "no key that the request itself sets", key);
    checkTemplateArg(given[key], `${name}.${key}`, 1);
    args[key] = given[key];
  }
  const charCount = JSON.stringify(args).length;
  if (charCount > MAX_TEMPLATE_ARGS_CHARS) {
    throw invalidField(name, `at most ${MAX_TEMPLATE_ARGS_CHARS} characters of JSON`, charCount);
  }
  draft.templateArgs = args;
}

function checkTemplateArg(value: unknown, name: string, depth: number): void {
  if (typeof value !== "object" || value === null) return;
  if (depth > MAX_TEMPLATE_ARGS_DEPTH) {
    throw new DynamoError("invalid-field", `${name}: expected at most ${MAX_TEMPLATE_ARGS_DEPTH} levels, got more`, {
      param: name,
    });
  }
  for (const key of Object.keys(value)) {
    if (UNSAFE_KEYS.has(key)) throw invalidField(name, "plain keys", key);
    checkTemplateArg((value as JsonObject)[key], name, depth + 1);
  }
}
