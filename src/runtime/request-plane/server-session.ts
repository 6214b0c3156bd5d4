import { toDynamoError, type DynamoError } from "../../errors/index.ts";
import { FRAME, MAX_STREAM_ID, decodeError, decodeOpen, malformed, u32At } from "./frame.ts";
import { wrote, type Link } from "./link.ts";
import type { ServerCore } from "./server-core.ts";
import { ServerStreamState } from "./server-stream.ts";

/**
 * The server's side of one connection: takes OPEN, CANCEL and CREDIT, makes streams, routes to them. Does no I/O. Throws
 * `malformed-frame` out of `onFrame`; the link then drops the connection and calls `lost`.
 */
export class ServerSession {
  readonly link: Link;
  readonly #core: ServerCore;
  readonly #streams = new Map<number, ServerStreamState>();

  constructor(core: ServerCore, link: Link) {
    this.#core = core;
    this.link = link;
  }

  get streamCount(): number {
    return this.#streams.size;
  }

  onFrame(type: number, bytes: Buffer, start: number, end: number): void {
    switch (type) {
      case FRAME.open:
        this.#onOpen(bytes, start, end);
        return;
      case FRAME.cancel:
        this.#onCancel(bytes, start, end);
        return;
      case FRAME.credit:
        this.#onCredit(bytes, start, end);
        return;
      default:
        throw malformed(`a server got frame type ${type}`);
    }
  }

  /** Tells the client to open nothing new here. */
  goAway(): void {
    this.link.outbox.control(FRAME.goaway);
    wrote(this.link);
  }

  /** The connection is gone: stops all handlers. */
  lost(error: DynamoError): void {
    for (const stream of this.#streams.values()) stream.callerGone(error);
  }

  forget(wireId: number): void {
    this.#streams.delete(wireId);
  }

  #onOpen(bytes: Buffer, start: number, end: number): void {
    const open = decodeOpen(bytes, start, end);
    if (this.#streams.has(open.wireId)) throw malformed(`OPEN of stream ${open.wireId}, which is live`);
    const refusal = this.#core.refusalOf(open.endpoint, this.#streams.size);
    if (refusal !== undefined) {
      this.link.outbox.streamEnd(open.wireId, refusal);
      wrote(this.link);
      return;
    }
    const handle = this.#core.handlerOf(open.endpoint)!;
    const stream = new ServerStreamState(this.#core, this, open);
    // Known before the handler runs, so that a stream that ends inside it is forgotten again; never left behind.
    this.#streams.set(open.wireId, stream);
    try {
      stream.adopt(handle(stream, bytes.subarray(open.payloadStart, end)));
    } catch (thrown) {
      stream.end(toDynamoError(thrown));
    }
  }

  #onCancel(bytes: Buffer, start: number, end: number): void {
    if (end - start < 4) throw malformed(`CANCEL of ${end - start} bytes`);
    const wireId = u32At(bytes, start);
    const error = decodeError(bytes, start + 4, end);
    this.#streams.get(wireId)?.callerGone(error);
  }

  #onCredit(bytes: Buffer, start: number, end: number): void {
    if ((end - start) % 8 !== 0) throw malformed(`CREDIT of ${end - start} bytes`);
    for (let at = start; at < end; at += 8) {
      const wireId = u32At(bytes, at);
      if (wireId > MAX_STREAM_ID) throw malformed(`CREDIT for stream ${wireId}`);
      this.#streams.get(wireId)?.grant(u32At(bytes, at + 4));
    }
  }
}
