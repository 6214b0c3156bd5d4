import {
  MAX_INT,
  invalidField,
  readArray,
  readInteger,
  readObject,
  readString,
  refuseUnknown,
  unsupportedField,
} from "./fields.ts";

/**
 * `nvext`, Dynamo's extensions to a request: hints for the router, a salt that keeps cached prefixes apart, and what else
 * the answer shall tell. Only the form is checked here; who may use which field is decided where the caller is known
 * (operator.ts).
 */
export interface Nvext {
  /** A head start in the router's queue, seconds. */
  readonly priority?: number;
  /** Larger first, before anything else. */
  readonly strictPriority?: number;
  /** Tokens expected in the answer. */
  readonly expectedOutputTokens?: number;
  readonly extraFields?: readonly ExtraField[];
  /** 16 hex digits. Operators only. */
  readonly backendInstanceId?: string;
  readonly cacheSalt?: string;
  /** The whole request, from its arrival. The server's own limit holds if it is shorter. */
  readonly requestTimeoutMs?: number;
}

/** A request that may carry `nvext`. */
export interface WithNvext {
  readonly nvext?: Nvext;
}

const EXTRA_FIELDS = ["routing", "worker_id"] as const;
/** Parts of the answer's `nvext`. Operators only: they name workers. */
export type ExtraField = (typeof EXTRA_FIELDS)[number];

const KNOWN = new Set(["agent_hints", "extra_fields", "backend_instance_id", "cache_salt", "request_timeout_ms"]);
const KNOWN_HINTS = new Set(["priority", "strict_priority", "osl"]);
const INSTANCE_ID = /^[0-9a-f]{16}$/;
const MAX_SALT_CHARS = 256;
const MAX_EXTRA_FIELDS = 16;
const MAX_U32 = 0xffff_ffff;

export function readNvext(value: unknown, name: string): Nvext {
  const object = readObject(value, name);
  refuseUnknown(object, KNOWN, `${name}.`);
  const { agent_hints: hints, extra_fields: extraFields, backend_instance_id: instanceId, cache_salt: salt } = object;
  const timeout = object["request_timeout_ms"];
  return {
    ...(isGiven(hints) ? readHints(hints, `${name}.agent_hints`) : {}),
    ...(isGiven(extraFields) ? { extraFields: readExtraFields(extraFields, `${name}.extra_fields`) } : {}),
    ...(isGiven(instanceId) ? { backendInstanceId: readInstanceId(instanceId, `${name}.backend_instance_id`) } : {}),
    ...(isGiven(salt) ? { cacheSalt: readString(salt, `${name}.cache_salt`, 1, MAX_SALT_CHARS) } : {}),
    ...(isGiven(timeout) ? { requestTimeoutMs: readTimeout(timeout, `${name}.request_timeout_ms`) } : {}),
  };
}

function isGiven(value: unknown): boolean {
  return value !== undefined && value !== null;
}

function readHints(value: unknown, name: string): Nvext {
  const hints = readObject(value, name);
  refuseUnknown(hints, KNOWN_HINTS, `${name}.`);
  const { priority, strict_priority: strictPriority, osl } = hints;
  return {
    ...(isGiven(priority) ? { priority: readPriority(priority, `${name}.priority`) } : {}),
    ...(isGiven(strictPriority)
      ? { strictPriority: readStrictPriority(strictPriority, `${name}.strict_priority`) }
      : {}),
    ...(isGiven(osl) ? { expectedOutputTokens: readInteger(osl, `${name}.osl`, 1, MAX_INT) } : {}),
  };
}

export function readPriority(value: unknown, name: string): number {
  return readInteger(value, name, -MAX_INT - 1, MAX_INT);
}

export function readStrictPriority(value: unknown, name: string): number {
  return readInteger(value, name, 0, MAX_U32);
}

export function readTimeout(value: unknown, name: string): number {
  return readInteger(value, name, 1, MAX_INT);
}

function readInstanceId(value: unknown, name: string): string {
  if (typeof value !== "string" || !INSTANCE_ID.test(value))
    throw invalidField(name, "16 lower-case hex digits", value);
  return value;
}

function readExtraFields(value: unknown, name: string): readonly ExtraField[] {
  return readArray(value, name, MAX_EXTRA_FIELDS).map((field, index) => {
    const known = EXTRA_FIELDS.find((candidate) => candidate === field);
    if (known !== undefined) return known;
    const itemName = `${name}[${index}]`;
    if (typeof field !== "string") throw invalidField(itemName, "the name of a field", field);
    throw unsupportedField(itemName, `only ${EXTRA_FIELDS.map((word) => `"${word}"`).join(" and ")} are served`);
  });
}
