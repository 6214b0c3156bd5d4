import { DynamoError } from "../errors/index.ts";
import type { RouteOverrides, RouteRequest, RouteStage } from "../router/index.ts";
import { ByteReader, ByteWriter } from "../std/index.ts";

/**
 * What a router service is asked: the model, the prompt as token ids or as sequence hashes, and what limits the choice.
 * Wire form: u32 length of the JSON part, JSON, then u32 little-endian numbers: the token ids, or (lo, hi) per hash.
 * Hashes are an eighth of the bytes and spread the hashing over the frontends; the ids are for whoever has no hasher.
 *
 * The decoder believes nothing: every field is checked for type and size, unknown ones are dropped.
 */
export interface RouteQuery {
  readonly model: string;
  readonly prompt: "tokens" | "hashes";
  /** Of the hashes; the service refuses another size than its model's. */
  readonly blockSizeTokens: number;
  readonly request: RouteRequest;
}

/** Ids in one list, taints, and bytes of any text: more is no request of ours. */
const MAX_LIST = 4_096;
const MAX_TEXT = 1_024;
const META_MAX_BYTES = 1 << 20;
/** Sixteen million tokens are more than the longest context by far; as ids they fill one frame. */
const MAX_PROMPT_TOKENS = 1 << 24;
const writer = new ByteWriter(16 * 1024);

/** Encodes into a shared slab: the result is valid until the next call. */
export function encodeRouteQuery({ model, prompt, blockSizeTokens, request }: RouteQuery): Buffer {
  const { tokenIds, hashes, promptTokenCount, excluded, allowed, deadlineMs: _, degradation: __, ...rest } = request;
  const meta = {
    ...rest,
    model,
    prompt,
    blockSizeTokens,
    promptTokenCount: promptTokenCount ?? tokenIds.length,
    ...(excluded === undefined || excluded.size === 0 ? {} : { excluded: [...excluded] }),
    ...(allowed === undefined ? {} : { allowed: [...allowed] }),
  };
  writer.reset();
  writer.text(JSON.stringify(meta));
  if (prompt === "tokens") writer.u32s(tokenIds);
  else writer.u32s(hashes!.sequenceHashes, 2 * hashes!.blockCount);
  return writer.view();
}

/** Decodes a copy. Throws `malformed-frame`. */
export function decodeRouteQuery(bytes: Uint8Array): RouteQuery {
  try {
    const reader = new ByteReader(bytes);
    const meta = readFields(JSON.parse(reader.text(META_MAX_BYTES)));
    if (reader.remaining % 4 !== 0) throw new Error("the number part is not a multiple of 4 bytes");
    const numbers = reader.u32s(reader.remaining / 4);
    const prompt = meta.choice("prompt", ["tokens", "hashes"]);
    const blockSizeTokens = meta.integer("blockSizeTokens", 1, 1 << 20);
    const promptTokenCount = meta.integer("promptTokenCount", 0, MAX_PROMPT_TOKENS);
    return { model: meta.text("model"), prompt, blockSizeTokens, request: readRequest(meta, { prompt, numbers, blockSizeTokens, promptTokenCount }) }; // prettier-ignore
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the question to the router could not be decoded", {
      diagnostic: String(cause),
      cause,
    });
  }
}

interface PromptPart {
  readonly prompt: "tokens" | "hashes";
  readonly numbers: Uint32Array;
  readonly blockSizeTokens: number;
  readonly promptTokenCount: number;
}

const EMPTY = new Uint32Array(0);
const POOLS: readonly "prefill"[] = ["prefill"];
const STAGES: readonly RouteStage[] = ["aggregated", "prefill", "decode"];

function readRequest(meta: Fields, { prompt, numbers, blockSizeTokens, promptTokenCount }: PromptPart): RouteRequest {
  const request: RouteRequest = {
    ...optional("requestId", meta.optionalText("requestId")),
    ...optional("cacheNamespace", meta.optionalText("cacheNamespace")),
    ...optional("excluded", meta.optionalSet("excluded")),
    ...optional("allowed", meta.optionalSet("allowed")),
    ...optional("pinned", readPin(meta)),
    ...optional("requiredTaints", meta.optionalTexts("requiredTaints")),
    ...optional("preferredTaints", readPreferred(meta)),
    ...optional("sessionId", meta.optionalText("sessionId")),
    ...optional("strictPriority", meta.optionalNumber("strictPriority")),
    ...optional("priorityJump", meta.optionalNumber("priorityJump")),
    ...optional("expectedOutputTokens", meta.optionalNumber("expectedOutputTokens")),
    ...optional("overrides", readOverrides(meta)),
    ...optional("explain", meta.optionalBoolean("explain")),
    ...optional("resumedTokens", meta.optionalNumber("resumedTokens")),
    ...optional("needsRoom", meta.optionalBoolean("needsRoom")),
    ...optional("stage", meta.optionalChoice("stage", STAGES)),
    ...optional("pool", meta.optionalChoice("pool", POOLS)),
    promptTokenCount,
    tokenIds: prompt === "tokens" ? numbers : EMPTY,
  };
  if (prompt === "tokens") {
    if (numbers.length !== promptTokenCount)
      throw new Error(`${numbers.length} tokens, said to be ${promptTokenCount}`);
    return request;
  }
  if (numbers.length % 2 !== 0) throw new Error("half a hash at the end");
  const blockCount = numbers.length / 2;
  if (blockCount > Math.floor(promptTokenCount / blockSizeTokens)) {
    throw new Error(`${blockCount} blocks of ${blockSizeTokens} in ${promptTokenCount} tokens`);
  }
  // The router looks at the sequence hashes only.
  request.hashes = { blockCount, sequenceHashes: numbers, localHashes: EMPTY };
  return request;
}

function readPin(meta: Fields): RouteRequest["pinned"] {
  const pin = meta.optionalFields("pinned");
  if (pin === undefined) return undefined;
  const dpRank = pin.optionalNumber("dpRank");
  return { instanceId: pin.text("instanceId"), ...(dpRank === undefined ? {} : { dpRank }) };
}

function readPreferred(meta: Fields): RouteRequest["preferredTaints"] {
  return meta.optionalList("preferredTaints")?.map((item) => {
    const fields = readFields(item);
    return { taint: fields.text("taint"), weight: fields.number("weight") };
  });
}

const OVERRIDE_NUMBERS = ["overlapScoreCredit", "prefillLoadScale", "temperature", "sharedCacheMultiplier"] as const;
const OVERRIDE_SWITCHES = ["assumeKvReuse", "trackPrefillTokens"] as const;

function readOverrides(meta: Fields): RouteOverrides | undefined {
  const fields = meta.optionalFields("overrides");
  if (fields === undefined) return undefined;
  const overrides: { -readonly [Name in keyof RouteOverrides]: RouteOverrides[Name] } = {};
  for (const name of OVERRIDE_NUMBERS) {
    const value = fields.optionalNumber(name);
    if (value !== undefined && value < 0) throw new Error(`${name}: expected 0 or more, got ${value}`);
    if (value !== undefined) overrides[name] = value;
  }
  for (const name of OVERRIDE_SWITCHES) {
    const value = fields.optionalBoolean(name);
    if (value !== undefined) overrides[name] = value;
  }
  return overrides;
}

function optional<Name extends string, Value>(name: Name, value: Value | undefined): { readonly [K in Name]?: Value } {
  return (value === undefined ? {} : { [name]: value }) as { readonly [K in Name]?: Value };
}

/** Typed reads of a JSON object from outside; each throws with the field's name. */
export class Fields {
  readonly #values: { readonly [name: string]: unknown };

  constructor(values: { readonly [name: string]: unknown }) {
    this.#values = values;
  }

  number(name: string): number {
    const value = this.#values[name];
    if (typeof value !== "number" || !Number.isFinite(value)) throw wrong(name, "a number");
    return value;
  }

  integer(name: string, min: number, max: number): number {
    const value = this.#values[name];
    if (!Number.isSafeInteger(value) || Number(value) < min || Number(value) > max) {
      throw wrong(name, `an integer of ${min} to ${max}`);
    }
    return Number(value);
  }

  text(name: string): string {
    const value = this.#values[name];
    if (typeof value !== "string" || value.length > MAX_TEXT)
      throw wrong(name, `a text of up to ${MAX_TEXT} characters`);
    return value;
  }

  choice<Choice extends string>(name: string, choices: readonly Choice[]): Choice {
    const found = choices.find((choice) => choice === this.#values[name]);
    if (found === undefined) throw wrong(name, choices.join(" or "));
    return found;
  }

  optionalChoice<Choice extends string>(name: string, choices: readonly Choice[]): Choice | undefined {
    return this.#values[name] === undefined ? undefined : this.choice(name, choices);
  }

  optionalNumber(name: string): number | undefined {
    return this.#values[name] === undefined ? undefined : this.number(name);
  }

  optionalText(name: string): string | undefined {
    return this.#values[name] === undefined ? undefined : this.text(name);
  }

  optionalBoolean(name: string): boolean | undefined {
    const value = this.#values[name];
    if (value !== undefined && typeof value !== "boolean") throw wrong(name, "true or false");
    return value;
  }

  optionalList(name: string): readonly unknown[] | undefined {
    const value = this.#values[name];
    if (value === undefined) return undefined;
    if (!Array.isArray(value) || value.length > MAX_LIST) throw wrong(name, `a list of up to ${MAX_LIST}`);
    return value;
  }

  optionalTexts(name: string): readonly string[] | undefined {
    return this.optionalList(name)?.map((item, index) => {
      if (typeof item !== "string" || item.length > MAX_TEXT) throw wrong(`${name}[${index}]`, "a text");
      return item;
    });
  }

  optionalSet(name: string): ReadonlySet<string> | undefined {
    const texts = this.optionalTexts(name);
    return texts === undefined ? undefined : new Set(texts);
  }

  optionalFields(name: string): Fields | undefined {
    return this.#values[name] === undefined ? undefined : readFields(this.#values[name], name);
  }
}

export function readFields(value: unknown, name = "the JSON part"): Fields {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw wrong(name, "an object");
  return new Fields(value as { readonly [name: string]: unknown });
}

function wrong(name: string, expected: string): Error {
  return new Error(`${name}: expected ${expected}`);
}
