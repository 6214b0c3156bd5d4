import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import {
  decodeHandoff,
  decodeHandoffPart,
  promptLengthOf,
  type Handoff,
  type HandoffAsk,
  type HandoffPart,
  type PreprocessedRequest,
  type PullResult,
} from "../protocol/index.ts";
import {
  ask,
  type ClientStreamHandler,
  type RequestPlaneClient,
  type StreamEnd,
} from "../runtime/request-plane/index.ts";
import type { Logger } from "../observability/index.ts";
import type { Clock } from "../std/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import { DescriptorList, type Peer, type TransferAgent } from "../transfer/index.ts";

/**
 * The decode worker's end of a handoff: which of the prompt's blocks are here, claim, read the others over the transfer
 * plane, put them into the engine's cache. Whatever fails, the engine computes what is missing: a pull never fails a
 * request, it only says how it went. Claim and read have one deadline; an engine in a long step is waited for.
 *
 * Parts of a draft are fetched in the same way while the prompt is still being computed (`pullEarly`); what came of it lies
 * in the engine's cache like any cached prefix, and the pull of the handoff goes on behind it.
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
  readonly logger: Logger;
}

/** Agents of prefill workers that are remembered, with their connections and mappings. The one used longest ago goes. */
const MAX_PEERS = 256;
/** A draft is watched for as long as its prompt may take. */
const LONGEST_PREFILL_MS = 3_600_000;

/** What is fetched of a draft. */
interface EarlyPull {
  /** Never rejects. */
  done: Promise<void>;
  /** Here before anything was fetched; -1 = nobody has looked. */
  heldBlocks: number;
  pulledBlocks: number;
  byteCount: number;
  backend: string;
}

type Result = { -readonly [Field in keyof PullResult]: PullResult[Field] };

/** A prompt whose blocks are fetched. */
interface Prompt {
  readonly handoff: Handoff;
  readonly tokenIds: Uint32Array;
  readonly cacheNamespace: string;
  /** Of its complete blocks. */
  readonly sequenceHashes: Uint32Array;
}

export class HandoffPuller {
  readonly #options: HandoffPullerOptions;
  /** By agent name, last used last. */
  readonly #peers = new Map<string, Peer>();
  /** By draft id. */
  readonly #early = new Map<string, EarlyPull>();
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
    const result: Result = {
      outcome: "pulled",
      heldBlocks: 0,
      pulledBlocks: 0,
      earlyBlocks: 0,
      byteCount: 0,
      milliseconds: 0,
      backend: "",
    };
    try {
      await this.#pull(this.#promptOf(request), signal, result);
    } catch (thrown) {
      result.outcome = signal.aborted ? "cancelled" : toDynamoError(thrown).reason;
      result.pulledBlocks = result.earlyBlocks;
    }
    result.milliseconds = this.#options.clock.monotonicMs() - startMs;
    return result;
  }

  #promptOf(request: PreprocessedRequest): Prompt {
    const { blockSizeTokens, fingerprint } = this.#options;
    const handoff = decodeHandoff(Buffer.from(request.handoff ?? "", "base64"));
    if (handoff.fingerprint !== fingerprint()) {
      throw new DynamoError("handoff-mismatch", "the handed-off blocks are of another model, engine or layout");
    }
    const tokenIds = request.tokenIds.subarray(0, promptLengthOf(request));
    const { cacheNamespace } = request;
    const { sequenceHashes, blockCount } = hashBlocks(tokenIds, blockSizeTokens, blockHashSeed({ cacheNamespace }));
    return { handoff, tokenIds, cacheNamespace, sequenceHashes: sequenceHashes.slice(0, 2 * blockCount) };
  }

  async #pull(prompt: Prompt, signal: AbortSignal, result: Result): Promise<void> {
    const { engine } = this.#options;
    const { handoff, sequenceHashes } = prompt;
    const early = this.#early.get(handoff.draftId);
    await early?.done;
    result.earlyBlocks = early?.pulledBlocks ?? 0;
    const blockCount = Math.min(sequenceHashes.length / 2, handoff.firstBlock + handoff.blockCount);
    const held = await engine.countBlocks(sequenceHashes.subarray(0, 2 * blockCount));
    result.heldBlocks = Math.min(held, early === undefined || early.heldBlocks < 0 ? held : early.heldBlocks);
    result.pulledBlocks = result.earlyBlocks;
    result.byteCount = early?.byteCount ?? 0;
    result.backend = early?.backend ?? "";
    if (signal.aborted || held >= blockCount) {
      if (handoff.blockCount > 0) void this.#release(handoff, handoff.id);
      return;
    }
    if (held < handoff.firstBlock) {
      if (handoff.blockCount > 0) void this.#release(handoff, handoff.id);
      throw new DynamoError("handoff-gone", "the blocks that were fetched first have left the engine's cache");
    }
    const range = { from: held, to: blockCount };
    const pulled = await this.#take(prompt, handoff, { ...range, signal, result });
    if (pulled === 0) {
      // Their hashes are ours: it is the engine's cache that has no room, or lost those before them meanwhile.
      throw new DynamoError("transfer-full", "the engine's cache had no room for the handed-off blocks");
    }
    result.pulledBlocks += pulled;
  }

  /**
   * Fetches the parts of the request's draft, each as it comes, until the draft ends, one of them cannot be taken, or `signal`
   * says so. Until that signal the pull of the handoff finds what came of it. Throws `malformed-frame`, `handoff-mismatch`.
   */
  pullEarly(request: PreprocessedRequest, signal: AbortSignal): void {
    const early: EarlyPull = { done: Promise.resolve(), heldBlocks: -1, pulledBlocks: 0, byteCount: 0, backend: "" };
    const prompt = this.#promptOf(request);
    const { draftId } = prompt.handoff;
    if (draftId === "" || this.#early.has(draftId)) throw new DynamoError("handoff-gone", "there is no such draft");
    this.#early.set(draftId, early);
    signal.addEventListener("abort", () => void this.#early.delete(draftId), { once: true });
    early.done = this.#watch(prompt, early, signal).catch((thrown: unknown) => {
      this.#options.logger.debug({ reason: toDynamoError(thrown).reason }, "no more of the handoff is fetched early");
    });
  }

  async #watch(prompt: Prompt, early: EarlyPull, signal: AbortSignal): Promise<void> {
    const { handoff } = prompt;
    const parts = new PartQueue();
    const payload = Buffer.from(JSON.stringify({ watch: handoff.id } satisfies HandoffAsk));
    const { endpoint, address } = handoff;
    const context = {
      endpoint,
      requestId: "handoff",
      traceparent: "",
      timeoutMs: LONGEST_PREFILL_MS,
      autoCredit: true,
    };
    const stream = this.#options.client.open(address, payload, context, parts);
    const stop = (): void => stream.cancel();
    signal.addEventListener("abort", stop, { once: true });
    try {
      for (;;) {
        const part = await parts.next();
        if (part === undefined || signal.aborted) return;
        if (!(await this.#takePart(prompt, part, early, signal))) return;
      }
    } finally {
      signal.removeEventListener("abort", stop);
      stream.cancel();
    }
  }

  /** False when it cannot be put behind what is here. */
  async #takePart(prompt: Prompt, part: HandoffPart, early: EarlyPull, signal: AbortSignal): Promise<boolean> {
    const { handoff, sequenceHashes } = prompt;
    const to = Math.min(sequenceHashes.length / 2, part.firstBlock + part.blockCount);
    const held = await this.#options.engine.countBlocks(sequenceHashes.subarray(0, 2 * to));
    if (early.heldBlocks < 0) early.heldBlocks = held;
    if (held >= to) {
      void this.#release(handoff, part.id);
      return true;
    }
    // Left for the handoff.
    const isTooMuch = this.#landingBytes + (to - held) * handoff.blockBytes > this.#options.landingBytes;
    if (held < part.firstBlock || isTooMuch) return false;
    const result = { byteCount: 0, backend: "" };
    const taken = await this.#take(prompt, part, { from: held, to, signal, result });
    early.pulledBlocks += taken;
    early.byteCount += result.byteCount;
    early.backend = result.backend;
    return held + taken >= to;
  }

  /** Blocks [from, to) of the prompt, which lie in `part`, into the engine's cache; returns how many it took. */
  async #take(
    { handoff, tokenIds, cacheNamespace, sequenceHashes }: Prompt,
    part: HandoffPart,
    at: {
      readonly from: number;
      readonly to: number;
      readonly signal: AbortSignal;
      readonly result: { byteCount: number; backend: string };
    },
  ): Promise<number> {
    const { engine, blockSizeTokens } = this.#options;
    const data = await this.#fetch(handoff, part, at);
    return engine.importBlocks({
      sequenceHashes: sequenceHashes.slice(0, 2 * at.to),
      tokenIds: tokenIds.slice(0, at.to * blockSizeTokens),
      blockBytes: handoff.blockBytes,
      startBlock: at.from,
      data,
      cacheNamespace,
    });
  }

  /** Claims, reads, and makes sure that what was read was still ours to read when the last byte came. */
  async #fetch(
    handoff: Handoff,
    part: HandoffPart,
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
      void this.#release(handoff, part.id);
      throw new DynamoError("transfer-full", `handoffs of ${this.#landingBytes} bytes are being fetched`);
    }
    this.#landingBytes += byteCount;
    try {
      const claimMs = await this.#claim(handoff, part.id, leftMs());
      const data = await this.#read(handoff, part, { ...at, byteCount, timeoutMs: Math.max(1, leftMs()) });
      isRead = true;
      if (clock.monotonicMs() - startMs >= claimMs) {
        throw new DynamoError("handoff-gone", "the handed-off blocks were read after their time");
      }
      at.result.byteCount += byteCount;
      return data;
    } finally {
      this.#landingBytes -= byteCount;
      // A complete read has told so itself.
      if (!isRead) void this.#release(handoff, part.id);
    }
  }

  async #read(
    handoff: Handoff,
    part: HandoffPart,
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
        remote: remoteBlocks(handoff, part, at.from, at.to),
      });
      at.result.backend = table.backend;
      const all = Uint32Array.from({ length: at.to - at.from }, (_, i) => i);
      await agent.read(table, all, all, {
        timeoutMs: at.timeoutMs,
        signal: at.signal,
        message: Buffer.from(JSON.stringify({ release: part.id } satisfies HandoffAsk)),
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
  async #claim(handoff: Handoff, id: string, timeoutMs: number): Promise<number> {
    const answer = await this.#ask(handoff, { claim: id }, timeoutMs);
    const { claimMs } = JSON.parse(answer.toString("utf8")) as { claimMs: number };
    return claimMs;
  }

  async #release(handoff: Handoff, id: string): Promise<void> {
    // What does not arrive is made good by the lease.
    await this.#ask(handoff, { release: id }, this.#options.timeoutMs).catch(() => undefined);
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

/** Blocks [from, to) of the prompt, where the prefill worker has them; all of them lie in `part`. */
export function remoteBlocks(
  { blockBytes, regionId }: Pick<Handoff, "blockBytes" | "regionId">,
  { firstBlock, runs }: Pick<HandoffPart, "firstBlock" | "runs">,
  from: number,
  to: number,
): DescriptorList {
  const count = to - from;
  const offsets = new Float64Array(count);
  let block = firstBlock;
  for (let i = 0; i < runs.length; i += 2) {
    const first = runs[i]!;
    const slots = runs[i + 1]!;
    for (let k = 0; k < slots; k++, block++) {
      if (block >= from && block < to) offsets[block - from] = (first + k) * blockBytes;
    }
  }
  return new DescriptorList(new Uint32Array(count).fill(regionId), offsets, new Uint32Array(count).fill(blockBytes));
}

/** The parts of a draft as they are told, for one reader. Bounded by the blocks of the prompt. */
class PartQueue implements ClientStreamHandler {
  readonly #parts: HandoffPart[] = [];
  #end: { readonly error: DynamoError | undefined } | undefined = undefined;
  #wake: (() => void) | undefined = undefined;

  /** undefined: there are no more. Rejects when they ended with an error. */
  async next(): Promise<HandoffPart | undefined> {
    while (this.#parts.length === 0) {
      if (this.#end?.error !== undefined) throw this.#end.error;
      if (this.#end !== undefined) return undefined;
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
    return this.#parts.shift();
  }

  onItem(bytes: Uint8Array, start: number, end: number): void {
    try {
      if (this.#end === undefined) this.#parts.push(decodeHandoffPart(bytes.subarray(start, end)));
    } catch (thrown) {
      this.#end = { error: toDynamoError(thrown) };
    }
  }

  onTurnEnd(): void {
    this.#wake?.();
  }

  onEnd(error: StreamEnd): void {
    this.#end ??= { error };
    this.#wake?.();
  }
}
