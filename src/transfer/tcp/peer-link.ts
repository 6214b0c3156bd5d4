import type { DynamoError } from "../../errors/index.ts";
import type { AgentContext } from "../backend.ts";
import type { DescriptorList } from "../descriptor-list.ts";
import { Lane, type DialAddress, type LaneOwner, type PayloadSink } from "./lane.ts";
import { RESPONSE, decodeError, encodeCancel, encodeFetch, encodeRead, malformed } from "./wire.ts";

/**
 * Everything this side asks of one peer: a control lane for writes and messages, and data lanes for bytes. A pull is cut
 * into chunks of up to a mebibyte; each lane has a window of chunks asked for and not yet here, which is the credit: the
 * peer never has more to send than we have asked for. Pulls take turns, so a short one is not behind a long one.
 *
 * To stop a pull whose bytes are on the way, its lane is closed (the kernel may be about to fill its memory) and what
 * others had asked for on it is asked for again: reads can be repeated.
 */
export const CHUNK_BYTES = 1024 * 1024;

export type PullSource =
  { readonly kind: "read"; readonly list: DescriptorList } | { readonly kind: "fetch"; readonly grant: bigint };

/** A batch of bytes to be read from the peer into descriptors of ours. */
export class Pull {
  readonly destination: DescriptorList;
  readonly source: PullSource;
  readonly byteCount: number;
  readonly bytesOf: (regionId: number) => Buffer;
  /** Once, unless it was aborted: all bytes are here, or why not. */
  readonly onEnd: (error?: DynamoError) => void;
  /** The next byte that nobody asked for yet: in the whole, and as descriptor and offset inside it. */
  start = 0;
  first = 0;
  inside = 0;
  receivedBytes = 0;
  ended = false;
  /** Chunks whose lane was closed under them. */
  readonly again: Chunk[] = [];

  constructor(options: Pick<Pull, "destination" | "source" | "byteCount" | "bytesOf" | "onEnd">) {
    this.destination = options.destination;
    this.source = options.source;
    this.byteCount = options.byteCount;
    this.bytesOf = options.bytesOf;
    this.onEnd = options.onEnd;
  }

  get hasMore(): boolean {
    return this.start < this.byteCount || this.again.length > 0;
  }

  takeChunk(): Chunk {
    const again = this.again.pop();
    if (again !== undefined) return new Chunk(this, again.first, again.inside, again.start, again.byteCount);
    const byteCount = Math.min(CHUNK_BYTES, this.byteCount - this.start);
    const chunk = new Chunk(this, this.first, this.inside, this.start, byteCount);
    this.start += byteCount;
    let left = byteCount;
    while (left > 0) {
      const rest = this.destination.lengths[this.first]! - this.inside;
      if (left < rest) {
        this.inside += left;
        break;
      }
      left -= rest;
      this.first++;
      this.inside = 0;
    }
    return chunk;
  }
}

/** One request for bytes on a lane, and where they go. */
class Chunk implements PayloadSink {
  readonly pull: Pull;
  readonly first: number;
  readonly inside: number;
  readonly start: number;
  readonly byteCount: number;
  id = 0;
  #left: number;
  #at: number;
  #offset: number;

  constructor(pull: Pull, first: number, inside: number, start: number, byteCount: number) {
    this.pull = pull;
    this.first = first;
    this.inside = inside;
    this.start = start;
    this.byteCount = byteCount;
    this.#left = byteCount;
    this.#at = first;
    this.#offset = inside;
  }

  nextBuffer(): Buffer {
    const { destination, bytesOf } = this.pull;
    const start = destination.offsets[this.#at]! + this.#offset;
    const byteCount = Math.min(this.#left, destination.lengths[this.#at]! - this.#offset);
    return bytesOf(destination.regionIds[this.#at]!).subarray(start, start + byteCount);
  }

  onBytes(byteCount: number): void {
    this.#left -= byteCount;
    this.#offset += byteCount;
    if (this.#offset === this.pull.destination.lengths[this.#at]!) {
      this.#at++;
      this.#offset = 0;
    }
  }
}

export interface LinkOptions {
  readonly context: AgentContext;
  readonly address: DialAddress;
  readonly peerIncarnation: bigint;
  readonly ownPort: number;
  readonly laneCount: number;
  readonly windowBytes: number;
  readonly connectTimeoutMs: number;
  /** The link broke or was never there; everything on it has ended. */
  readonly onClosed: (link: PeerLink) => void;
}

interface DataLane {
  readonly lane: Lane;
  /** In the order they were asked for, which is that of the answers. */
  readonly asked: Chunk[];
  askedBytes: number;
}

export class PeerLink implements LaneOwner {
  readonly peerIncarnation: bigint;
  readonly address: DialAddress;
  readonly #options: LinkOptions;
  #control: Lane | undefined = undefined;
  readonly #waiting: Buffer[] = [];
  readonly #whenReady: (() => void)[] = [];
  readonly #requests = new Map<number, (error?: DynamoError) => void>();
  readonly #data = new Map<Lane, DataLane>();
  readonly #pulls: Pull[] = [];
  #nextPull = 0;
  #nextId = 1;
  #closed = false;

  constructor(options: LinkOptions) {
    this.#options = options;
    this.peerIncarnation = options.peerIncarnation;
    this.address = options.address;
  }

  // ---- control: requests with a short answer ----

  /** Sends what `encode` makes for the id it gets; `onAnswer` is called once, unless the link is closed by `drop`. */
  request(encode: (id: number) => Buffer, onAnswer: (error?: DynamoError) => void): number {
    const id = this.#takeId();
    this.#requests.set(id, onAnswer);
    this.#send(encode(id));
    return id;
  }

  /** Asks the peer to stop a write; its answer still comes. */
  cancelRequest(id: number): void {
    if (this.#requests.has(id)) this.#send(encodeCancel(id));
  }

  #send(frame: Buffer): void {
    this.#control ??= this.#dial();
    if (this.#control.ready) this.#control.send(frame);
    else this.#waiting.push(frame);
  }

  /** Calls `run` when the peer is known to be there: at once, or when the control lane is through its handshake. */
  whenReady(run: () => void): void {
    this.#control ??= this.#dial();
    if (this.#control.ready) run();
    else this.#whenReady.push(run);
  }

  // ---- data ----

  pull(pull: Pull): void {
    this.#pulls.push(pull);
    this.#fillAll();
  }

  /** Ends a pull without calling it. Its memory is not written to any more when this returns. */
  abort(pull: Pull): void {
    if (pull.ended) return;
    pull.ended = true;
    this.#remove(pull);
    for (const data of this.#data.values()) {
      if (!data.asked.some((chunk) => chunk.pull === pull)) continue;
      data.lane.close();
      this.#data.delete(data.lane);
      for (const chunk of data.asked) if (!chunk.pull.ended) chunk.pull.again.push(chunk);
    }
    this.#fillAll();
  }

  get busy(): boolean {
    return this.#pulls.length > 0 || this.#requests.size > 0;
  }

  #remove(pull: Pull): void {
    const at = this.#pulls.indexOf(pull);
    if (at < 0) return;
    this.#pulls.splice(at, 1);
    if (at < this.#nextPull) this.#nextPull--;
  }

  #fillAll(): void {
    if (this.#closed) return;
    for (const data of this.#data.values()) this.#fill(data);
    // A lane more for each chunk that found no place, up to the limit.
    while (this.#data.size < this.#options.laneCount && this.#pulls.some((pull) => pull.hasMore)) {
      const data: DataLane = { lane: this.#dial(), asked: [], askedBytes: 0 };
      this.#data.set(data.lane, data);
      this.#fill(data);
    }
  }

  /** Before a lane is ready its requests wait in the socket, behind the hello, so chunks are given to it only then. */
  #fill(data: DataLane): void {
    if (!data.lane.ready) return;
    while (data.askedBytes < this.#options.windowBytes) {
      const chunk = this.#nextChunk();
      if (chunk === undefined) return;
      chunk.id = this.#takeId();
      data.asked.push(chunk);
      data.askedBytes += chunk.byteCount;
      data.lane.send(encodeChunk(chunk));
    }
  }

  #nextChunk(): Chunk | undefined {
    for (let tries = this.#pulls.length; tries > 0; tries--) {
      if (this.#nextPull >= this.#pulls.length) this.#nextPull = 0;
      const pull = this.#pulls[this.#nextPull++]!;
      if (pull.hasMore) return pull.takeChunk();
    }
    return undefined;
  }

  #takeId(): number {
    const id = this.#nextId;
    this.#nextId = id === 0x7fff_ffff ? 1 : id + 1;
    return id;
  }

  #dial(): Lane {
    return new Lane({ ...this.#options, owner: this });
  }

  // ---- lanes ----

  onLaneReady(lane: Lane): void {
    if (lane === this.#control) {
      for (const frame of this.#waiting.splice(0)) lane.send(frame);
      for (const run of this.#whenReady.splice(0)) run();
    }
    const data = this.#data.get(lane);
    if (data !== undefined) this.#fill(data);
  }

  onResponse(lane: Lane, type: number, id: number, text: Buffer, payloadBytes: number): PayloadSink | undefined {
    // In answer to no request: why the peer closes the connection.
    if (type === RESPONSE.error && id === 0) throw decodeError(text);
    const data = this.#data.get(lane);
    if (data !== undefined) return this.#onDataResponse(data, type, id, text, payloadBytes);
    if (payloadBytes !== 0 || (type !== RESPONSE.done && type !== RESPONSE.error)) {
      throw malformed(`response ${type} with ${payloadBytes} bytes on the control lane`);
    }
    const onAnswer = this.#requests.get(id);
    if (onAnswer === undefined) throw malformed(`an answer to request ${id}, which is not open`);
    this.#requests.delete(id);
    onAnswer(type === RESPONSE.error ? decodeError(text) : undefined);
    return undefined;
  }

  #onDataResponse(
    data: DataLane,
    type: number,
    id: number,
    text: Buffer,
    payloadBytes: number,
  ): PayloadSink | undefined {
    const chunk = data.asked[0];
    if (chunk?.id !== id) throw malformed(`an answer to request ${id}, expected ${chunk?.id ?? "none"}`);
    if (type === RESPONSE.error && payloadBytes === 0) {
      const error = decodeError(text);
      data.asked.shift();
      data.askedBytes -= chunk.byteCount;
      const { pull } = chunk;
      if (!pull.ended) {
        this.abort(pull);
        pull.onEnd(error);
      }
      return undefined;
    }
    if (type !== RESPONSE.data || payloadBytes !== chunk.byteCount) {
      throw malformed(`response ${type} with ${payloadBytes} bytes, expected ${chunk.byteCount}`);
    }
    return chunk;
  }

  onPayloadEnd(lane: Lane): void {
    const data = this.#data.get(lane)!;
    const chunk = data.asked.shift()!;
    data.askedBytes -= chunk.byteCount;
    const { pull } = chunk;
    pull.receivedBytes += chunk.byteCount;
    if (pull.receivedBytes === pull.byteCount) {
      pull.ended = true;
      this.#remove(pull);
      pull.onEnd();
    }
    this.#fill(data);
  }

  onLaneClosed(_lane: Lane, error: DynamoError): void {
    this.close(error);
  }

  /** Ends everything on it with `error`. Idempotent. */
  close(error: DynamoError): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#control?.close();
    for (const { lane } of this.#data.values()) lane.close();
    this.#data.clear();
    const pulls = this.#pulls.splice(0);
    const answers = [...this.#requests.values()];
    this.#requests.clear();
    this.#options.onClosed(this);
    for (const onAnswer of answers) onAnswer(error);
    for (const pull of pulls) {
      pull.ended = true;
      pull.onEnd(error);
    }
  }
}

function encodeChunk(chunk: Chunk): Buffer {
  const { source } = chunk.pull;
  if (source.kind === "fetch") return encodeFetch(chunk.id, source.grant, chunk.start, chunk.byteCount);
  return encodeRead(chunk.id, {
    list: source.list,
    first: chunk.first,
    inside: chunk.inside,
    byteCount: chunk.byteCount,
  });
}
