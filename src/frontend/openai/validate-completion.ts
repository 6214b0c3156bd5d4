import type { FrontendLimits } from "../config.ts";
import type { CompletionRequest } from "../../protocol/openai/index.ts";
import { DynamoError } from "../../errors/index.ts";
import { MAX_INT, invalidField, readBoolean, readInteger, unsupportedField } from "./fields.ts";
import type { WithNvext } from "./nvext.ts";
import {
  GENERATION_FIELDS,
  GenerationDraft,
  finishOptions,
  nullable,
  readFields,
  requireModel,
  type FieldReader,
} from "./generation-fields.ts";

/**
 * The body of `POST /v1/completions` to a `CompletionRequest`: one or many prompts, as text or as token ids. Token ids
 * are checked to be non-negative 32-bit integers here; the vocabulary size is the preprocessor's to check.
 */
class CompletionDraft extends GenerationDraft {
  prompts: readonly (string | Uint32Array)[] | undefined = undefined;
  echo = false;
  bestOf: number | undefined = undefined;
}

/** OpenAI's default for this endpoint. */
const DEFAULT_MAX_TOKENS = 16;

const COMPLETION_FIELDS: Readonly<Record<string, FieldReader<CompletionDraft>>> = {
  ...GENERATION_FIELDS,
  prompt: (draft, value, name) => (draft.prompts = readPrompts(value, name, draft.limits.prompts)),
  echo: nullable((draft, value, name) => (draft.echo = readBoolean(value, name))),
  logprobs: nullable((draft, value, name) => (draft.topLogprobs = readInteger(value, name, 0, 20))),
  best_of: nullable((draft, value, name) => (draft.bestOf = readInteger(value, name, 1, MAX_INT))),
  suffix: nullable((_draft, value, name) => {
    if (typeof value !== "string") throw invalidField(name, "a string or null", value);
    if (value !== "") throw unsupportedField(name, "text after the completion is not served");
  }),
};

const READERS = new Map(Object.entries(COMPLETION_FIELDS));
/** For the test that compares this list with the published schema. */
export const COMPLETION_FIELD_NAMES: readonly string[] = [...READERS.keys()];

/** Throws `invalid-field`, `unknown-field` or `unsupported-field`. */
export function readCompletionRequest(body: unknown, limits: FrontendLimits): CompletionRequest & WithNvext {
  const draft = readFields(body, READERS, new CompletionDraft(limits));
  const model = requireModel(draft);
  const { prompts, bestOf, n } = draft;
  if (prompts === undefined) throw invalidField("prompt", "a string or an array", undefined);
  if (bestOf !== undefined && bestOf !== n) {
    if (bestOf < n) throw invalidField("best_of", `at least n (${n})`, bestOf);
    throw unsupportedField("best_of", "choosing among more completions than n is not served");
  }
  if (prompts.length * n > limits.prompts) {
    throw new DynamoError(
      "invalid-field",
      `n: expected at most ${limits.prompts} choices over all prompts, got ${prompts.length * n}`,
      { param: "n" },
    );
  }
  const request = { model, prompts, echo: draft.echo, options: finishOptions(draft, DEFAULT_MAX_TOKENS) };
  return draft.nvext === undefined ? request : { ...request, nvext: draft.nvext };
}

/** string | string[] | int[] | int[][]; an array is read by its first element, and the others must be of its kind. */
function readPrompts(value: unknown, name: string, maxPrompts: number): readonly (string | Uint32Array)[] {
  if (typeof value === "string") return [requireText(value, name)];
  if (!Array.isArray(value) || value.length === 0) {
    throw invalidField(
      name,
      "a string, or a non-empty array of strings, of token ids or of arrays of token ids",
      value,
    );
  }
  const items = value as unknown[];
  if (typeof items[0] === "number") return [readTokens(items, name)];
  if (items.length > maxPrompts) throw invalidField(name, `at most ${maxPrompts} prompts`, items.length);
  return items.map((item, index) => {
    const itemName = `${name}[${index}]`;
    if (typeof items[0] === "string" && typeof item === "string") return requireText(item, itemName);
    if (Array.isArray(items[0]) && Array.isArray(item)) return readTokens(item as unknown[], itemName);
    throw invalidField(itemName, typeof items[0] === "string" ? "a string" : "an array of token ids", item);
  });
}

function requireText(text: string, name: string): string {
  if (text === "") throw invalidField(name, "a prompt that is not empty", text);
  return text;
}

function readTokens(items: readonly unknown[], name: string): Uint32Array {
  if (items.length === 0) throw invalidField(name, "at least one token id", items);
  const tokenIds = new Uint32Array(items.length);
  for (let i = 0; i < items.length; i++) {
    const id = items[i];
    // The name is only built when it is needed: prompts have up to a million ids.
    if (typeof id === "number" && id >= 0 && id <= MAX_INT && Number.isInteger(id)) tokenIds[i] = id;
    else readInteger(id, `${name}[${i}]`, 0, MAX_INT);
  }
  return tokenIds;
}
