import { DynamoError } from "../errors/index.ts";
import { ByteReader, ByteWriter, TruncatedBytes } from "../std/index.ts";
import {
  BACKEND_NAMES,
  MEMORY_KINDS,
  REMOTE_ACCESS,
  type BackendName,
  type RemoteAccess,
  type RemoteRegion,
} from "./base.ts";
import { MAX_METADATA_BYTES, MAX_NAME_BYTES, MAX_REGIONS } from "./limits.ts";
import type { Region } from "./region.ts";

/**
 * What an agent tells of itself so that others can reach its memory: bytes to be carried by whoever carries facts
 * (discovery, a handoff). Version 1, little-endian:
 *
 *     "DTXM" | u16 version | u64 incarnation | name | host | u16 n | n x (back end | u32 bytes | its own part)
 *     | u16 n | n x (u32 id | u8 kind | u8 access | f64 bytes | label)          text: u32 bytes | UTF-8
 *
 * Metadata is never trusted: it is decoded within limits, and what it claims is checked again by whoever owns the memory.
 * The incarnation is new with each agent, so that metadata of a process that is gone is told from its successor's.
 */
export interface AgentMetadata {
  readonly name: string;
  readonly incarnation: bigint;
  /** The same for agents of one machine: a hint for the order of back ends, nothing more. */
  readonly hostId: string;
  readonly backends: ReadonlyMap<BackendName, Buffer>;
  readonly regions: ReadonlyMap<number, RemoteRegion>;
}

const MAGIC = 0x4d585444;
export const METADATA_VERSION = 1;
/** Back ends a later version may add: skipped, not refused. */
const MAX_BACKENDS = 32;
const MAX_BACKEND_BYTES = 2 * 1024 * 1024;

export function encodeMetadata(
  agent: { readonly name: string; readonly incarnation: bigint; readonly hostId: string },
  backends: ReadonlyMap<BackendName, Uint8Array>,
  regions: readonly Region[],
): Buffer {
  const out = new ByteWriter(1024);
  out.u32(MAGIC);
  out.u16(METADATA_VERSION);
  out.u64(agent.incarnation);
  out.text(agent.name);
  out.text(agent.hostId);
  out.u16(backends.size);
  for (const [name, part] of backends) {
    out.text(name);
    out.u32(part.length);
    out.bytes(part);
  }
  const shown = regions.filter((region) => region.remoteAccess !== "none");
  out.u16(shown.length);
  for (const region of shown) {
    out.u32(region.id);
    out.u8(MEMORY_KINDS.indexOf(region.kind));
    out.u8(REMOTE_ACCESS.indexOf(region.remoteAccess));
    out.f64(region.byteLength);
    out.text(region.label);
  }
  return out.copy();
}

/** Throws `malformed-frame`, `protocol-version`. */
export function decodeMetadata(bytes: Uint8Array): AgentMetadata {
  if (bytes.length > MAX_METADATA_BYTES) throw malformed(`${bytes.length} bytes are more than ${MAX_METADATA_BYTES}`);
  try {
    return decode(new ByteReader(bytes));
  } catch (thrown) {
    if (thrown instanceof TruncatedBytes || thrown instanceof RangeError) throw malformed(thrown.message);
    throw thrown;
  }
}

function decode(body: ByteReader): AgentMetadata {
  if (body.u32() !== MAGIC) throw malformed("wrong magic");
  const version = body.u16();
  if (version !== METADATA_VERSION) {
    throw new DynamoError("protocol-version", "the agent's metadata has another version", {
      diagnostic: `version ${version}, we know ${METADATA_VERSION}`,
    });
  }
  const incarnation = body.u64();
  const name = body.text(MAX_NAME_BYTES);
  if (name === "") throw malformed("an agent without a name");
  const hostId = body.text(MAX_NAME_BYTES);
  const backends = new Map<BackendName, Buffer>();
  const backendCount = body.u16();
  if (backendCount > MAX_BACKENDS) throw malformed(`${backendCount} back ends`);
  for (let i = 0; i < backendCount; i++) {
    const backend = body.text(MAX_NAME_BYTES);
    const byteCount = body.u32();
    if (byteCount > MAX_BACKEND_BYTES) throw malformed(`${byteCount} bytes of one back end`);
    const part = Buffer.from(body.bytes(byteCount));
    if ((BACKEND_NAMES as readonly string[]).includes(backend)) backends.set(backend as BackendName, part);
  }
  const regions = new Map<number, RemoteRegion>();
  const regionCount = body.u16();
  if (regionCount > MAX_REGIONS) throw malformed(`${regionCount} regions`);
  for (let i = 0; i < regionCount; i++) {
    const id = body.u32();
    const kind = MEMORY_KINDS[body.u8()];
    const remoteAccess: RemoteAccess | undefined = REMOTE_ACCESS[body.u8()];
    const byteLength = body.f64();
    const label = body.text(MAX_NAME_BYTES);
    if (kind === undefined || remoteAccess === undefined) throw malformed(`region ${i}: unknown kind or access`);
    if (!Number.isSafeInteger(byteLength) || byteLength <= 0) throw malformed(`region ${i}: ${byteLength} bytes`);
    regions.set(id, { id, kind, byteLength, remoteAccess, label });
  }
  if (body.remaining > 0) throw malformed(`${body.remaining} bytes behind the end`);
  return { name, incarnation, hostId, backends, regions };
}

function malformed(diagnostic: string): DynamoError {
  return new DynamoError("malformed-frame", "the agent's metadata is malformed", { diagnostic });
}
