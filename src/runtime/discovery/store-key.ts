import { DynamoError } from "../../errors/index.ts";
import type { DiscoveryEntry, JsonValue } from "./base.ts";

/**
 * What every back end checks the same way before it touches its store: keys, prefixes, values, lease times. A wrong one
 * is a mistake in a name or a setting, hence `invalid-config`; the text names what was expected and what came.
 */
export const MAX_KEY_LENGTH = 512;
export const MAX_VALUE_BYTES = 1024 * 1024;
/** Entries one store holds. A cluster of 10,000 instances has about four keys each. */
export const MAX_ENTRIES = 65_536;
export const DEFAULT_TTL_MS = 10_000;
/** Shorter leases would expire in a pause of the garbage collector. */
const MIN_TTL_MS = 500;
const MAX_TTL_MS = 3_600_000;

const KEY = /^[A-Za-z0-9._-]+(?:\/[A-Za-z0-9._-]+)*$/;
const LEASE_ID = /^[0-9a-f]{16}$/;

/** An entry with the encoding that tells whether a value changed. */
export interface StoredEntry {
  readonly entry: DiscoveryEntry;
  readonly encoded: string;
}

export function isStoreKey(key: string): boolean {
  return key.length <= MAX_KEY_LENGTH && KEY.test(key);
}

export function isLeaseId(id: string): boolean {
  return LEASE_ID.test(id);
}

export function isTtl(ttlMs: number): boolean {
  return Number.isSafeInteger(ttlMs) && ttlMs >= MIN_TTL_MS && ttlMs <= MAX_TTL_MS;
}

export function checkKey(key: string): void {
  if (isStoreKey(key)) return;
  throw new DynamoError(
    "invalid-config",
    `discovery key: expected segments of [A-Za-z0-9._-] with / between, at most ${MAX_KEY_LENGTH} characters, got ${shown(key)}`,
  );
}

/** The empty prefix is the whole store. */
export function checkPrefix(prefix: string): void {
  if (prefix === "" || (prefix.endsWith("/") && isStoreKey(prefix.slice(0, -1)))) return;
  throw new DynamoError("invalid-config", `discovery prefix: expected a key followed by /, got ${shown(prefix)}`);
}

export function checkTtl(ttlMs: number): void {
  if (isTtl(ttlMs)) return;
  throw new DynamoError("invalid-config", `lease ttlMs: expected ${MIN_TTL_MS} to ${MAX_TTL_MS}, got ${ttlMs}`);
}

/** The value as JSON text, within the limit. */
export function encodeValue(key: string, value: JsonValue): string {
  let encoded: string | undefined;
  try {
    encoded = JSON.stringify(value) as string | undefined;
  } catch (cause) {
    throw new DynamoError("invalid-config", `value of ${key}: expected JSON`, { cause });
  }
  if (encoded === undefined)
    throw new DynamoError("invalid-config", `value of ${key}: expected JSON, got ${typeof value}`);
  // A UTF-16 unit takes at most three bytes: most values are cleared without counting.
  const byteLength = encoded.length * 3 <= MAX_VALUE_BYTES ? 0 : Buffer.byteLength(encoded);
  if (byteLength > MAX_VALUE_BYTES) {
    throw new DynamoError(
      "invalid-config",
      `value of ${key}: expected at most ${MAX_VALUE_BYTES} bytes, got ${byteLength}`,
    );
  }
  return encoded;
}

export function sameEntry(a: StoredEntry | undefined, b: StoredEntry | undefined): boolean {
  if (a === b) return true;
  return a !== undefined && b !== undefined && a.entry.leaseId === b.entry.leaseId && a.encoded === b.encoded;
}

/** Entries under the prefix, sorted by key. */
export function entriesUnder(prefix: string, table: ReadonlyMap<string, StoredEntry>): StoredEntry[] {
  const found: StoredEntry[] = [];
  for (const stored of table.values()) if (stored.entry.key.startsWith(prefix)) found.push(stored);
  return found.sort((a, b) => (a.entry.key < b.entry.key ? -1 : 1));
}

function shown(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}...` : text);
}
