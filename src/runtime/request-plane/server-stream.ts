import assert from "node:assert";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import { WheelTimer, type Expiring } from "../../std/index.ts";
import type { ServerStream, ServerStreamHandler } from "./base.ts";
import type { OpenFrame } from "./frame.ts";
import { MAX_ITEM_BYTES, MAX_WINDOW_BYTES } from "./limits.ts";
import { wrote, type Link } from "./link.ts";
import { ParkedItems } from "./parked-items.ts";
import type { ServerCore } from "./server-core.ts";

/**
 * One stream on the server.
 *
 *                 end(), nothing parked
 *      running ------------------------------> over
 *         |  \                                   ^
 *         |   `- end() with items parked -> ending - credit for the last item, deadline, cancel, connection gone
 *         `--- cancel, deadline, slow reader, connection gone, server closed: onCancel once
 *
 * An item goes out while any credit is left, so a stream may overrun its window by one item and an item larger than the
 * window still gets through. Without credit it is parked, at most `parkedBytesPerStream` (a single larger item is parked
 * when nothing else is). The path of an item is `write` -> `Outbox.item`: no allocation, one copy.
 */
type Phase = "running" | "ending" | "over";

/** Tells the session that a stream is gone; the session forgets its wire id. */
export interface StreamOwner {
  readonly link: Link;
  forget(wireId: number): void;
}

export class ServerStreamState implements ServerStream, Expiring {
  readonly id: number;
  readonly endpoint: string;
  readonly requestId: string;
  readonly traceparent: string;
  readonly deadlineMs: number;
  readonly #core: ServerCore;
  readonly #owner: StreamOwner;
  readonly #link: Link;
  readonly #wireId: number;
  readonly #windowBytes: number;
  readonly #timer: WheelTimer;
  #phase: Phase = "running";
  #creditBytes: number;
  #parked: ParkedItems | undefined = undefined;
  /** While ending: what to say behind the parked items. */
  #end: DynamoError | undefined = undefined;
  #handler: ServerStreamHandler | undefined = undefined;
  /** An `onCancel` that fell due before the endpoint's handler had returned. */
  #owedCancel: DynamoError | undefined = undefined;

  constructor(core: ServerCore, owner: StreamOwner, open: OpenFrame) {
    this.id = core.takeId();
    this.endpoint = open.endpoint;
    this.requestId = open.requestId;
    this.traceparent = open.traceparent;
    this.deadlineMs = core.clock.monotonicMs() + open.timeoutMs;
    this.#core = core;
    this.#owner = owner;
    this.#link = owner.link;
    this.#wireId = open.wireId;
    this.#windowBytes = Math.min(Math.max(1, open.windowBytes), MAX_WINDOW_BYTES);
    this.#creditBytes = this.#windowBytes;
    this.#timer = new WheelTimer(this);
    core.started(this);
    core.wheel.add(this.#timer, open.timeoutMs);
  }

  get ended(): boolean {
    return this.#phase !== "running";
  }

  write(item: Uint8Array): void {
    if (this.#phase !== "running") return;
    const byteCount = item.length;
    if (byteCount > MAX_ITEM_BYTES) {
      this.abort(new DynamoError("internal", "internal error", { diagnostic: `item of ${byteCount} bytes` }));
      return;
    }
    if (this.#creditBytes <= 0 || this.#parked !== undefined) {
      this.#park(item);
      return;
    }
    const link = this.#link;
    if (link.inFlightBytes + link.outbox.byteLength > this.#core.limits.queuedBytesPerConnection) {
      this.abort(slowReader("the connection's send queue is full"));
      return;
    }
    this.#creditBytes -= byteCount;
    link.outbox.item(this.#wireId, item);
    if (!link.dirty) link.requestFlush();
  }

  end(error?: DynamoError): void {
    if (this.#phase !== "running") return;
    if (this.#parked === undefined) {
      this.#finish(error);
      return;
    }
    this.#phase = "ending";
    this.#end = error;
  }

  // ---- called by the session, the core and the wheel ----

  /** What the endpoint's handler returned. */
  adopt(handler: ServerStreamHandler): void {
    this.#handler = handler;
    if (this.#owedCancel !== undefined) this.#tellHandler(this.#owedCancel);
  }

  grant(byteCount: number): void {
    // A peer that grants more than it was sent gains nothing.
    this.#creditBytes = Math.min(this.#windowBytes, this.#creditBytes + byteCount);
    if (this.#parked !== undefined) this.#unpark(this.#parked);
  }

  onExpire(): void {
    this.abort(new DynamoError("request-deadline", "the request did not finish before its deadline"));
  }

  /** Stops the handler and tells the client `error`; parked items are dropped. */
  abort(error: DynamoError): void {
    if (this.#phase === "over") return;
    const wasRunning = this.#phase === "running";
    this.#finish(error);
    if (wasRunning) this.#tellHandler(error);
  }

  /** Like `abort`, but the client knows already: it cancelled, or it is gone. */
  callerGone(error: DynamoError): void {
    if (this.#phase === "over") return;
    const wasRunning = this.#phase === "running";
    this.#leave();
    if (wasRunning) this.#tellHandler(error);
  }

  // ---- parts ----

  #park(item: Uint8Array): void {
    const { limits } = this.#core;
    const cost = ParkedItems.costOf(item.length);
    const parked = (this.#parked ??= new ParkedItems());
    if (parked.byteLength > 0 && parked.byteLength + cost > limits.parkedBytesPerStream) {
      this.abort(slowReader("the stream's buffer is full"));
    } else if (this.#core.parkedBytes + cost > limits.parkedBytesTotal) {
      this.abort(slowReader("the server's buffer for streams without credit is full"));
    } else {
      parked.push(item);
      this.#core.parkedBytes += cost;
    }
  }

  #unpark(parked: ParkedItems): void {
    const { outbox } = this.#link;
    while (this.#creditBytes > 0 && parked.byteLength > 0) {
      const item = parked.shift();
      this.#core.parkedBytes -= ParkedItems.costOf(item.length);
      this.#creditBytes -= item.length;
      outbox.item(this.#wireId, item);
      wrote(this.#link);
    }
    if (parked.byteLength > 0) return;
    this.#parked = undefined;
    if (this.#phase === "ending") this.#finish(this.#end);
  }

  #finish(error: DynamoError | undefined): void {
    this.#link.outbox.streamEnd(this.#wireId, error);
    wrote(this.#link);
    this.#leave();
  }

  #leave(): void {
    assert(this.#phase !== "over", "a stream ends once");
    this.#phase = "over";
    if (this.#parked !== undefined) {
      this.#core.parkedBytes -= this.#parked.byteLength;
      this.#parked = undefined;
    }
    this.#core.wheel.cancel(this.#timer);
    this.#owner.forget(this.#wireId);
    this.#core.finished(this);
  }

  #tellHandler(error: DynamoError): void {
    if (this.#handler === undefined) {
      this.#owedCancel = error;
      return;
    }
    this.#owedCancel = undefined;
    try {
      this.#handler.onCancel(error);
    } catch (thrown) {
      const { diagnostic } = toDynamoError(thrown);
      this.#core.logger.error({ x_request_id: this.requestId, diagnostic }, "a request handler failed in onCancel");
    }
  }
}

function slowReader(diagnostic: string): DynamoError {
  return new DynamoError("slow-reader", "the reader did not take its output in time", { diagnostic });
}
