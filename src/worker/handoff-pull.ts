import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import {
  decodeHandoff,
  promptLengthOf,
  type Handoff,
  type HandoffAsk,
  type PreprocessedRequest,
  type PullResult,
} from "../protocol/index.ts";
import { ask, type RequestPlaneClient } from "../runtime/request-plane/index.ts";
import type { Clock } from "../std/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import { DescriptorList, type Peer, type TransferAgent } from "../transfer/index.ts";

/**
 * The decode worker's end of a handoff: which of the prompt's blocks are here, claim, read the others over the transfer
 * plane, put them into the engine's cache. Whatever fails, the engine computes what is missing: a pull never fails a
 * request, it only says how it went. Claim and read have one deadline; an engine in a long step is waited for.
 *
 * Memory: what is read lands in shared memory of its own size, which the engine's thread reads without a copy; at most
 * `landingBytes` at a time, a handoff that does not fit is not fetched.
 */
export interface HandoffPullerOptions {
  readonly agent: TransferAgent;
  readonly engine: Engine;
  readonly client: RequestPlaneClient;
  readonly clock: Clock;
  readonly blockSizeTokens: number;
  readonly blockBytes: number;
  /** Ours; a handoff with another one is not for this engine. */
  readonly fingerprint: () => string;
  readonly timeoutMs: number;
  readonly landingBytes: number;
}

/** Agents of prefill workers that are remembered, with their connections and mappings. The one used longest ago goes. */
const MAX_PEERS = 256;

export class HandoffPuller {
  readonly #options: HandoffPullerOptions;
  /** By agent name, last used last. */
  readonly #peers = new Map<string, Peer>();
  #landingBytes = 0;

  constructor(options: HandoffPullerOptions) {
    this.#options = options;
  }

  /** Bytes that pulls hold now. */
  get landingBytes(): number {
    return this.#landingBytes;
  }

  /** Never rejects. */
  async pull(request: PreprocessedRequest, signal: AbortSignal): Promise<PullResult> {
    const startMs = this.#options.clock.monotonicMs();
    const result = { outcome: "pulled", heldBlocks: 0, pulledBlocks: 0, byteCount: 0, milliseconds: 0, backend: "" };
    try {
      await this.#pull(request, signal, result);
    } catch (thrown) {
      result.outcome = signal.aborted ? "cancelled" : toDynamoError(thrown).reason;
      result.pulledBlocks = 0;
    }
    result.milliseconds = this.#options.clock.monotonicMs() - startMs;
    return result;
  }

  async #pull(
    request: PreprocessedRequest,
    signal: AbortSignal,
    result: { -readonly [Field in keyof PullResult]: PullResult[Field] },
  ): Promise<void> {
    const { engine, blockSizeTokens, fingerprint } = this.#options;
    const handoff = decodeHandoff(Buffer.from(request.handoff ?? "", "base64"));
    if (handoff.fingerprint !== fingerprint()) {
      throw new DynamoError("handoff-mismatch", "the handed-off blocks are of another model, engine or layout");
    }
    const prompt = request.tokenIds.subarray(0, promptLengthOf(request));
    const { cacheNamespace } = request;
    const hashes = hashBlocks(prompt, blockSizeTokens, blockHashSeed({ cacheNamespace }));
    const blockCount = Math.min(hashes.blockCount, handoff.blockCount);
    const sequenceHashes = hashes.sequenceHashes.slice(0, 2 * blockCount);
    const held = await engine.countBlocks(sequenceHashes);
    result.heldBlocks = held;
    if (signal.aborted || held >= blockCount) {
      void this.#release(handoff);
      return;
    }
    const data = await this.#fetch(handoff, { from: held, to: blockCount, signal, result });
    result.pulledBlocks = await engine.importBlocks({
      sequenceHashes,
      tokenIds: prompt.slice(0, blockCount * blockSizeTokens),
      blockBytes: handoff.blockBytes,
      startBlock: held,
      data,
      cacheNamespace,
    });
    if (result.pulledBlocks === 0) {
      // Their hashes are ours: it is the engine's cache that has no room, or lost those before them meanwhile.
      throw new DynamoError("transfer-full", "the engine's cache had no room for the handed-off blocks");
    }
  }

  /** Claims, reads, and makes sure that what was read was still ours to read when the last byte came. */
  async #fetch(
    handoff: Handoff,
    at: {
      readonly from: number;
      readonly to: number;
      readonly signal: AbortSignal;
      readonly result: { byteCount: number; backend: string };
    },
  ): Promise<Uint8Array> {
    const { clock, landingBytes, timeoutMs } = this.#options;
    const byteCount = (at.to - at.from) * handoff.blockBytes;
    const startMs = clock.monotonicMs();
    const leftMs = (): number => startMs + timeoutMs - clock.monotonicMs();
    let isRead = false;
    if (this.#landingBytes + byteCount > landingBytes) {
      void this.#release(handoff);
      throw new DynamoError("transfer-full", `handoffs of ${this.#landingBytes} bytes are being fetched`);
    }
    this.#landingBytes += byteCount;
    try {
      const claimMs = await this.#claim(handoff, leftMs());
      const data = await this.#read(handoff, { ...at, byteCount, timeoutMs: Math.max(1, leftMs()) });
      isRead = true;
      if (clock.monotonicMs() - startMs >= claimMs) {
        throw new DynamoError("handoff-gone", "the handed-off blocks were read after their time");
      }
      at.result.byteCount = byteCount;
      return data;
    } finally {
      this.#landingBytes -= byteCount;
      // A complete read has told so itself.
      if (!isRead) void this.#release(handoff);
    }
  }

  async #read(
    handoff: Handoff,
    at: {
      readonly from: number;
      readonly to: number;
      readonly byteCount: number;
      readonly timeoutMs: number;
      readonly signal: AbortSignal;
      readonly result: { backend: string };
    },
  ): Promise<Uint8Array> {
    const { agent } = this.#options;
    const peer = this.#peer(handoff.metadata);
    const data = new Uint8Array(new SharedArrayBuffer(at.byteCount));
    const region = await agent.register({ kind: "host", bytes: data }, { remoteAccess: "none" });
    try {
      const { blockBytes } = handoff;
      const table = agent.prepare(peer, {
        local: DescriptorList.blocks(region, { blockBytes }),
        remote: remoteBlocks(handoff, at.from, at.to),
      });
      at.result.backend = table.backend;
      const all = Uint32Array.from({ length: at.to - at.from }, (_, i) => i);
      await agent.read(table, all, all, {
        timeoutMs: at.timeoutMs,
        signal: at.signal,
        message: Buffer.from(JSON.stringify({ release: handoff.id } satisfies HandoffAsk)),
      }).done;
      return data;
    } catch (thrown) {
      if (toDynamoError(thrown).reason === "transfer-peer-lost") this.#forget(peer);
      throw thrown;
    } finally {
      await agent.deregister(region);
    }
  }

  /** How long the blocks stay. */
  async #claim(handoff: Handoff, timeoutMs: number): Promise<number> {
    const answer = await this.#ask(handoff, { claim: handoff.id }, timeoutMs);
    const { claimMs } = JSON.parse(answer.toString("utf8")) as { claimMs: number };
    return claimMs;
  }

  async #release(handoff: Handoff): Promise<void> {
    // What does not arrive is made good by the lease.
    await this.#ask(handoff, { release: handoff.id }, this.#options.timeoutMs).catch(() => undefined);
  }

  #ask({ address, endpoint }: Handoff, question: HandoffAsk, timeoutMs: number): Promise<Buffer> {
    return ask(this.#options.client, address, Buffer.from(JSON.stringify(question)), {
      endpoint,
      requestId: "handoff",
      traceparent: "",
      timeoutMs: Math.max(1, timeoutMs),
    });
  }

  #peer(metadata: Uint8Array): Peer {
    const { agent } = this.#options;
    const peer = agent.addPeer(metadata);
    this.#peers.delete(peer.name);
    this.#peers.set(peer.name, peer);
    if (this.#peers.size > MAX_PEERS) {
      for (const oldest of this.#peers.values()) {
        this.#forget(oldest);
        break;
      }
    }
    return peer;
  }

  #forget(peer: Peer): void {
    this.#peers.delete(peer.name);
    this.#options.agent.removePeer(peer);
  }
}

/** Blocks [from, to) of a handoff, where the prefill worker has them. */
export function remoteBlocks(handoff: Handoff, from: number, to: number): DescriptorList {
  const count = to - from;
  const offsets = new Float64Array(count);
  let block = 0;
  for (let i = 0; i < handoff.runs.length; i += 2) {
    const first = handoff.runs[i]!;
    const slots = handoff.runs[i + 1]!;
    for (let k = 0; k < slots; k++, block++) {
      if (block >= from && block < to) offsets[block - from] = (first + k) * handoff.blockBytes;
    }
  }
  return new DescriptorList(
    new Uint32Array(count).fill(handoff.regionId),
    offsets,
    new Uint32Array(count).fill(handoff.blockBytes),
  );
}
