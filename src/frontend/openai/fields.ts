import { DynamoError } from "../../errors/index.ts";

/**
 * Readers for single fields of a request body. Each takes the value and the field's name as the client wrote it, and
 * gives the checked value or throws `invalid-field` with name, what was expected, what came, in that order. What came
 * is shown for numbers, booleans and short words only: texts of a client are its prompts.
 */
export type JsonObject = Readonly<Record<string, unknown>>;

export function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Longest string that is shown in an error; option words fit, prompts do not. */
const SHOWN_CHARS = 24;

/** Fields whose strings are prompts: their length is named, never the text. */
const PROMPT_FIELD = /^(messages|prompt)\b(?!.*\.(role|type)$)/;

export function describeValue(value: unknown, name: string): string {
  if (value === undefined) return "nothing";
  if (value === null) return "null";
  if (typeof value === "string") {
    return value.length <= SHOWN_CHARS && !PROMPT_FIELD.test(name)
      ? `${JSON.stringify(value)} (string)`
      : `a string of ${value.length} characters`;
  }
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (typeof value === "object") return "an object";
  return `${JSON.stringify(value)} (${typeof value})`;
}

export function invalidField(name: string, expected: string, got: unknown): DynamoError {
  return new DynamoError("invalid-field", `${name}: expected ${expected}, got ${describeValue(got, name)}`, {
    param: name,
  });
}

export function unsupportedField(name: string, what: string): DynamoError {
  return new DynamoError("unsupported-field", `${name}: ${what}`, { param: name });
}

export function readNumber(value: unknown, name: string, min: number, max: number): number {
  if (typeof value !== "number" || !(value >= min && value <= max)) {
    throw invalidField(name, `a number from ${min} to ${max}`, value);
  }
  return value;
}

export function readInteger(value: unknown, name: string, min: number, max: number): number {
  if (typeof value !== "number" || !Number.isInteger(value) || value < min || value > max) {
    throw invalidField(name, `an integer ${max === MAX_INT ? `of at least ${min}` : `from ${min} to ${max}`}`, value);
  }
  return value;
}

/** Largest count or token id that fits a signed 32-bit integer, as engines keep them. */
export const MAX_INT = 0x7fff_ffff;

export function readBoolean(value: unknown, name: string): boolean {
  if (typeof value !== "boolean") throw invalidField(name, "true or false", value);
  return value;
}

export function readString(value: unknown, name: string, minChars: number, maxChars: number): string {
  if (typeof value !== "string" || value.length < minChars || value.length > maxChars) {
    throw invalidField(name, `a string of ${minChars} to ${maxChars} characters`, value);
  }
  return value;
}

export function readObject(value: unknown, name: string): JsonObject {
  if (!isObject(value)) throw invalidField(name, "an object", value);
  return value;
}

export function readArray(value: unknown, name: string, maxItems: number): readonly unknown[] {
  if (!Array.isArray(value) || value.length > maxItems) {
    throw invalidField(name, `an array of at most ${maxItems}`, value);
  }
  return value as unknown[];
}

export function readOneOf(value: unknown, name: string, words: readonly string[]): string {
  if (typeof value !== "string" || !words.includes(value)) {
    throw invalidField(name, `one of ${words.map((word) => JSON.stringify(word)).join(", ")}`, value);
  }
  return value;
}

/** Names listed in full; beyond that the message only counts, so that it cannot be made large from outside. */
const MAX_NAMED = 16;
const MAX_NAME_CHARS = 64;

/** One error that names every field we do not know. */
export function unknownFields(names: readonly string[], prefix = ""): DynamoError {
  const shown = names
    .slice(0, MAX_NAMED)
    .map((name) => prefix + (name.length > MAX_NAME_CHARS ? `${name.slice(0, MAX_NAME_CHARS)}...` : name));
  const more = names.length > MAX_NAMED ? ` and ${names.length - MAX_NAMED} more` : "";
  const noun = names.length === 1 ? "unknown field" : "unknown fields";
  return new DynamoError("unknown-field", `${noun}: ${shown.join(", ")}${more}`, { param: shown[0]! });
}

/** Refuses own keys of `object` that are not in `known`. */
export function refuseUnknown(object: JsonObject, known: ReadonlySet<string>, prefix: string): void {
  let unknown: string[] | undefined;
  for (const key in object) if (!known.has(key)) (unknown ??= []).push(key);
  if (unknown !== undefined) throw unknownFields(unknown, prefix);
}
