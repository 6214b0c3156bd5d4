import { DynamoError } from "../errors/index.ts";
import { ByteReader, ByteWriter } from "../std/index.ts";

/**
 * What a prefill worker hands to a decode worker so that it can fetch a prompt's KV blocks: bytes that the frontend carries
 * and does not read but for their summary. The blocks lie in slots of one region of the prefill worker's transfer agent,
 * leased until they are claimed (endpoint `handoff`, single use), and then until the claim is given back or runs out.
 *
 *     "DHOF" | u16 version | id | draft id | address | endpoint | fingerprint | u32 block bytes | u32 tokens per block
 *     | u32 region | u32 first block | u32 blocks | u32 n | n x (u32 first slot, u32 slots) | u32 bytes | the agent's metadata
 *     texts: u32 bytes | UTF-8
 *
 * Block `first block + i` of the prompt is the i-th slot of the runs. Hashes do not travel: the decode worker has the tokens.
 *
 * While a prompt is still being computed its handoff is a draft, without blocks: whoever is to decode asks for the parts of
 * it (`watch`, by the draft's id) and is told of each as it comes. What was fetched as a part is not in the handoff that
 * follows, which begins behind it.
 */
export interface Handoff {
  /** 16 hex digits, of this handoff alone. */
  readonly id: string;
  /** 16 hex digits, as parts of it were offered before; its own id while it is a draft. Empty: there were none. */
  readonly draftId: string;
  /** Of the prefill worker, on the request plane. */
  readonly address: string;
  /** `namespace.component.handoff` */
  readonly endpoint: string;
  /** What both sides must agree on, see `kvFingerprint`. */
  readonly fingerprint: string;
  readonly blockBytes: number;
  readonly blockSizeTokens: number;
  readonly regionId: number;
  /** Those before it were offered, and claimed, as parts. */
  readonly firstBlock: number;
  /** (first slot, slots) pairs, in the order of the blocks. */
  readonly runs: Uint32Array;
  readonly blockCount: number;
  /** Of the agent that holds the blocks. */
  readonly metadata: Uint8Array;
}

/**
 * The second kind: blocks that engines which are processes of their own move between themselves, each by its connector
 * (vLLM's NIXL, for one). Nothing of what the prefill engine said travels through the frontend, only where to claim it:
 *
 *     "DHOE" | u16 version | id | peer | address | endpoint | fingerprint | connector | u32 blocks | u32 bytes of a block, 0 = not known
 *     | u32 lease left, ms
 *
 * The claim (`HandoffAsk`) is granted once and within the lease, by the prefill worker's own clock, and its answer carries the
 * engine's parameters (`EngineClaim`). Engines themselves refuse neither a second use nor a late one: they would answer from
 * whatever is in those blocks by then.
 */
export interface EngineHandoff {
  /** 16 hex digits, of this handoff alone. */
  readonly id: string;
  /** The prefill worker, `namespace.component.instance`; for people. */
  readonly peer: string;
  /** Where it is on the request plane. */
  readonly address: string;
  /** `namespace.component.handoff` */
  readonly endpoint: string;
  /** What both sides must agree on, see `kvFingerprint`. */
  readonly fingerprint: string;
  /** `nixl-pull`, `nixl-push`, `example`, ...: how the engines do it. */
  readonly connector: string;
  /** That hold the prompt, the last one perhaps in part. */
  readonly blockCount: number;
  /** 0 = not known. */
  readonly blockBytes: number;
  /** When it was sent; for whoever wants to know, the prefill worker decides. */
  readonly leaseMs: number;
}

/** The answer to the claim of an `EngineHandoff`. */
export interface EngineClaim {
  /** What the decode worker's engine is given, as it is. */
  readonly parameters: Readonly<Record<string, unknown>>;
  /** Of the prefill worker's request to its engine: some connectors pair the two by it. */
  readonly requestId: string;
}

/** What a handoff can be asked for, as JSON to the endpoint `handoff`. */
export type HandoffAsk = { readonly claim: string } | { readonly release: string } | { readonly watch: string };

/** Blocks of a draft that are there: an item, as JSON, of the answer to `watch`. Claimed and given back like a handoff. */
export type HandoffPart = Pick<Handoff, "id" | "firstBlock" | "runs" | "blockCount">;

/** How the decode worker fared with a handoff; travels back to the frontend in front of the first token. */
export interface PullResult {
  /** `pulled`, or why the blocks did not come and were computed: a reason of the catalogue. */
  readonly outcome: string;
  /** Leading blocks that were here already. */
  readonly heldBlocks: number;
  readonly pulledBlocks: number;
  /** Of those, while the prompt was still being computed. */
  readonly earlyBlocks: number;
  readonly byteCount: number;
  readonly milliseconds: number;
  /** The transfer back end; empty when nothing was transferred. */
  readonly backend: string;
}

const MAGIC = 0x464f4844;
const VERSION = 2;
const ENGINE_MAGIC = 0x454f4844;
const ENGINE_VERSION = 1;
const MAX_TEXT_BYTES = 512;
/** As base64 it must fit the JSON part of a request. 512 KiB hold a table of 60,000 runs. */
export const MAX_HANDOFF_BYTES = 512 * 1024;

export function encodeHandoff(handoff: Handoff): Buffer {
  const out = new ByteWriter(1024 + handoff.metadata.length);
  out.u32(MAGIC);
  out.u16(VERSION);
  out.text(handoff.id);
  out.text(handoff.draftId);
  out.text(handoff.address);
  out.text(handoff.endpoint);
  out.text(handoff.fingerprint);
  out.u32(handoff.blockBytes);
  out.u32(handoff.blockSizeTokens);
  out.u32(handoff.regionId);
  out.u32(handoff.firstBlock);
  out.u32(handoff.blockCount);
  out.u32(handoff.runs.length / 2);
  out.u32s(handoff.runs);
  out.u32(handoff.metadata.length);
  out.bytes(handoff.metadata);
  return out.copy();
}

/** Throws `malformed-frame`. */
export function decodeHandoff(bytes: Uint8Array): Handoff {
  try {
    if (bytes.length > MAX_HANDOFF_BYTES) throw new Error(`${bytes.length} bytes are more than ${MAX_HANDOFF_BYTES}`);
    const reader = new ByteReader(bytes);
    if (reader.u32() !== MAGIC) throw new Error("wrong magic");
    const version = reader.u16();
    if (version !== VERSION) throw new Error(`version ${version}, we know ${VERSION}`);
    const id = reader.text(MAX_TEXT_BYTES);
    const draftId = reader.text(MAX_TEXT_BYTES);
    const address = reader.text(MAX_TEXT_BYTES);
    const endpoint = reader.text(MAX_TEXT_BYTES);
    const fingerprint = reader.text(MAX_TEXT_BYTES);
    const blockBytes = reader.u32();
    const blockSizeTokens = reader.u32();
    const regionId = reader.u32();
    const firstBlock = reader.u32();
    const blockCount = reader.u32();
    const runs = reader.u32s(2 * reader.u32());
    const metadata = Uint8Array.from(reader.bytes(reader.u32()));
    if (reader.remaining > 0) throw new Error(`${reader.remaining} bytes behind the end`);
    if (draftId !== "") checkId(draftId);
    checkPart({ id, firstBlock, runs, blockCount });
    if (blockBytes === 0 || blockSizeTokens === 0) {
      throw new Error(`blocks of ${blockBytes} bytes and ${blockSizeTokens} tokens`);
    }
    const what = { id, draftId, firstBlock, runs, blockCount };
    return { ...what, address, endpoint, fingerprint, blockBytes, blockSizeTokens, regionId, metadata };
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the handoff could not be decoded", { diagnostic: String(cause), cause });
  }
}

export function encodeEngineHandoff(handoff: EngineHandoff): Buffer {
  const out = new ByteWriter(512);
  out.u32(ENGINE_MAGIC);
  out.u16(ENGINE_VERSION);
  out.text(handoff.id);
  out.text(handoff.peer);
  out.text(handoff.address);
  out.text(handoff.endpoint);
  out.text(handoff.fingerprint);
  out.text(handoff.connector);
  out.u32(handoff.blockCount);
  out.u32(handoff.blockBytes);
  out.u32(Math.max(0, Math.floor(handoff.leaseMs)));
  return out.copy();
}

/** Throws `malformed-frame`. */
export function decodeEngineHandoff(bytes: Uint8Array): EngineHandoff {
  try {
    const reader = new ByteReader(bytes);
    if (reader.u32() !== ENGINE_MAGIC) throw new Error("wrong magic");
    const version = reader.u16();
    if (version !== ENGINE_VERSION) throw new Error(`version ${version}, we know ${ENGINE_VERSION}`);
    const id = reader.text(MAX_TEXT_BYTES);
    checkId(id);
    const peer = reader.text(MAX_TEXT_BYTES);
    const address = reader.text(MAX_TEXT_BYTES);
    const endpoint = reader.text(MAX_TEXT_BYTES);
    const fingerprint = reader.text(MAX_TEXT_BYTES);
    const connector = reader.text(MAX_TEXT_BYTES);
    const [blockCount, blockBytes, leaseMs] = [reader.u32(), reader.u32(), reader.u32()];
    if (reader.remaining > 0) throw new Error(`${reader.remaining} bytes behind the end`);
    return { id, peer, address, endpoint, fingerprint, connector, blockCount, blockBytes, leaseMs };
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the engine's handoff could not be decoded", {
      diagnostic: String(cause),
      cause,
    });
  }
}

export function encodeEngineClaim({ parameters, requestId }: EngineClaim): Buffer {
  return Buffer.from(JSON.stringify({ requestId, parameters }));
}

/** Throws `malformed-frame`. */
export function decodeEngineClaim(bytes: Uint8Array): EngineClaim {
  try {
    if (bytes.length > MAX_HANDOFF_BYTES) throw new Error(`${bytes.length} bytes are more than ${MAX_HANDOFF_BYTES}`);
    const { parameters, requestId } = JSON.parse(
      Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("utf8"),
    ) as Record<string, unknown>;
    if (typeof requestId !== "string" || typeof parameters !== "object" || parameters === null) {
      throw new Error("a claim has a request's id and the engine's parameters");
    }
    return { requestId, parameters: parameters as EngineClaim["parameters"] };
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the answer to a claim could not be read", {
      diagnostic: String(cause),
      cause,
    });
  }
}

function checkId(id: string): void {
  if (!/^[0-9a-f]{16}$/.test(id)) throw new Error("the id is not 16 hex digits");
}

function checkPart({ id, runs, blockCount }: HandoffPart): void {
  checkId(id);
  let slots = 0;
  for (let i = 1; i < runs.length; i += 2) slots += runs[i]!;
  if (slots !== blockCount) throw new Error(`${slots} slots for ${blockCount} blocks`);
}

export function encodeHandoffPart({ id, firstBlock, runs, blockCount }: HandoffPart): Buffer {
  return Buffer.from(JSON.stringify({ id, firstBlock, blockCount, runs: [...runs] }));
}

/** Throws `malformed-frame`. */
export function decodeHandoffPart(bytes: Uint8Array): HandoffPart {
  try {
    if (bytes.length > MAX_HANDOFF_BYTES) throw new Error(`${bytes.length} bytes are more than ${MAX_HANDOFF_BYTES}`);
    const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("utf8");
    const { id, firstBlock, blockCount, runs } = JSON.parse(text) as Record<string, unknown>;
    const isCount = (value: unknown): value is number => Number.isInteger(value) && Number(value) >= 0;
    if (typeof id !== "string" || !isCount(firstBlock) || !isCount(blockCount) || !Array.isArray(runs)) {
      throw new Error("a part has an id, a first block, blocks and runs");
    }
    if (runs.length % 2 !== 0 || !runs.every((each) => isCount(each) && each < 2 ** 32)) {
      throw new Error("runs are pairs of a slot and a count");
    }
    const part = { id, firstBlock, blockCount, runs: Uint32Array.from(runs as number[]) };
    checkPart(part);
    return part;
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the part of a handoff could not be read", {
      diagnostic: String(cause),
      cause,
    });
  }
}

/** The three things a handoff endpoint can be asked; throws `malformed-frame`. */
export function decodeHandoffAsk(bytes: Uint8Array): HandoffAsk {
  try {
    const ask = JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("utf8")) as Partial<
      Record<"claim" | "release" | "watch", unknown>
    >;
    if (typeof ask.claim === "string") return { claim: ask.claim };
    if (typeof ask.release === "string") return { release: ask.release };
    if (typeof ask.watch === "string") return { watch: ask.watch };
    throw new Error("neither a claim nor a release nor a watch");
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the question about a handoff could not be read", {
      diagnostic: String(cause),
      cause,
    });
  }
}
