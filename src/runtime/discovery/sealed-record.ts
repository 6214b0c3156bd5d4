import { crc32 } from "node:zlib";

/**
 * The bytes of a store file: a line `dynamo-<kind> 1 <crc32>` and one line of JSON that the checksum covers. A reader gets
 * the whole record or nothing: torn, padded, edited or foreign files all read as `undefined`. The checksum is against
 * accidents; who may write into the store is a matter of the folder's mode.
 */
const VERSION = 1;
const HEADER = /^dynamo-([a-z]{1,16}) (\d{1,4}) ([0-9a-f]{8})$/;
/** "dynamo-", kind, version and checksum with their spaces. */
const MAX_HEADER_BYTES = 48;

export function seal(kind: string, record: unknown): Buffer {
  const body = Buffer.from(`${JSON.stringify(record)}\n`);
  const header = `dynamo-${kind} ${VERSION} ${crc32(body).toString(16).padStart(8, "0")}\n`;
  return Buffer.concat([Buffer.from(header), body]);
}

/** The record's fields, not yet validated; undefined when the bytes are not a whole record of this kind. */
export function unseal(kind: string, bytes: Buffer): Readonly<Record<string, unknown>> | undefined {
  const headerEnd = bytes.subarray(0, MAX_HEADER_BYTES).indexOf(0x0a);
  if (headerEnd < 0) return undefined;
  const match = HEADER.exec(bytes.toString("latin1", 0, headerEnd));
  if (match === null || match[1] !== kind || Number(match[2]) !== VERSION) return undefined;
  const body = bytes.subarray(headerEnd + 1);
  if (crc32(body) !== Number.parseInt(match[3]!, 16)) return undefined;
  try {
    const record: unknown = JSON.parse(body.toString("utf8"));
    if (typeof record !== "object" || record === null || Array.isArray(record)) return undefined;
    return record as Readonly<Record<string, unknown>>;
  } catch {
    return undefined;
  }
}
