import { BroadcastChannel } from "node:worker_threads";
import { DynamoError } from "../../errors/index.ts";
import { newInstanceId } from "../../runtime/component/index.ts";
import type {
  EventHandler,
  EventPlane,
  EventPublisher,
  EventSubscription,
  PublisherOptions,
} from "../../runtime/event-plane/index.ts";

/**
 * What an event plane does between processes, between the threads of one: the routers of a frontend's threads tell each
 * other their bookings over it (router/events/replica-sync.ts). Nothing is lost while both ends live, so there is no
 * ring, no replay and never a gap. One per thread; all with the same `name` hear each other, and a subscriber does not
 * hear the publishers of its own bus. Unbounded between threads: a batch is about a millisecond of bookings, and who
 * makes them is bounded.
 */
interface Posted {
  readonly topic: string;
  readonly publisherId: string;
  readonly sequence: number;
  /** Undefined: the publisher left. */
  readonly payload: Uint8Array | undefined;
}

export class BookingBus implements EventPlane {
  readonly #channel: BroadcastChannel;
  readonly #handlers = new Map<string, Set<EventHandler>>();
  #closed = false;

  constructor(name: string) {
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = (event) => this.#onPosted((event as { readonly data: Posted }).data);
    // What keeps a thread alive is its work.
    this.#channel.unref();
  }

  publish(topic: string, { publisherId = newInstanceId() }: PublisherOptions = {}): Promise<EventPublisher> {
    if (this.#closed) return Promise.reject(new DynamoError("event-plane-unavailable", "the booking bus is closed"));
    let sequence = 0;
    let isOpen = true;
    const publisher: EventPublisher = {
      publisherId,
      publish: (payload) => {
        // The copy is of the bytes alone: posting a view posts all of its buffer.
        if (isOpen) this.#post({ topic, publisherId, sequence: ++sequence, payload: payload.slice() });
        return sequence;
      },
      close: () => {
        if (isOpen) this.#post({ topic, publisherId, sequence, payload: undefined });
        isOpen = false;
        return Promise.resolve();
      },
    };
    return Promise.resolve(publisher);
  }

  subscribe(topic: string, handler: EventHandler): Promise<EventSubscription> {
    const handlers = this.#handlers.get(topic) ?? new Set();
    this.#handlers.set(topic, handlers.add(handler));
    return Promise.resolve({ close: () => Promise.resolve(void handlers.delete(handler)) });
  }

  close(): Promise<void> {
    if (!this.#closed) this.#channel.close();
    this.#closed = true;
    this.#handlers.clear();
    return Promise.resolve();
  }

  #post(posted: Posted): void {
    if (!this.#closed) this.#channel.postMessage(posted);
  }

  #onPosted({ topic, publisherId, sequence, payload }: Posted): void {
    for (const handler of this.#handlers.get(topic) ?? []) {
      if (payload === undefined) handler.onPublisherGone?.(publisherId);
      else handler.onEvent(publisherId, sequence, payload);
    }
  }
}
