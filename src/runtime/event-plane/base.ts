/**
 * The event plane: facts to many. A publisher numbers its events per topic from 1; a subscriber sees each publisher's
 * events in order, learns of gaps, and first tries to fill them from the publisher's ring. Back ends `memory` and `zmq`;
 * the battery is `event-plane.battery.ts`. Delivery is best effort: a slow subscriber loses events (bounded queues), and
 * is told so by a gap. Payloads are opaque bytes of at most 8 MiB. Topics are [A-Za-z0-9._-]+, at most 128 characters.
 */
export interface EventHandler {
  /** `payload` is valid only during the call. Sequences of one publisher rise by one unless `onGap` was called between. */
  onEvent(publisherId: string, sequence: number, payload: Uint8Array): void;
  /** Events `from` to `to` (inclusive) of this publisher are lost for good: its ring no longer holds them. */
  onGap(publisherId: string, from: number, to: number): void;
  /** The publisher left or its lease ended; a later one with the same id starts anew. */
  onPublisherGone?(publisherId: string): void;
}

export interface EventPublisher {
  /** 16 hex digits; new for every publisher object unless given. */
  readonly publisherId: string;
  /** Publishes at once and returns the sequence number, from 1 upwards. Never blocks, never throws after `close`. */
  publish(payload: Uint8Array): number;
  close(): Promise<void>;
}

export interface EventSubscription {
  close(): Promise<void>;
}

export interface PublisherOptions {
  /** @default a new random id */
  readonly publisherId?: string;
  /** Events kept for replay. @default 1024 */
  readonly ringSize?: number;
}

export interface EventPlane {
  /** Opens a publisher on a topic and announces it. */
  publish(topic: string, options?: PublisherOptions): Promise<EventPublisher>;
  /**
   * Subscribes to every publisher of the topic, present and future. A late joiner starts at the publisher's current
   * sequence with whatever the ring still holds replayed first (`replay: true`) or without it. @default replay false
   */
  subscribe(topic: string, handler: EventHandler, options?: { readonly replay?: boolean }): Promise<EventSubscription>;
  /** Whether publishers that should be there can be heard. @default always healthy: a back end that cannot break has none */
  health?(): EventPlaneHealth;
  close(): Promise<void>;
}

export interface EventPlaneHealth {
  readonly healthy: boolean;
  /** Why not, for operators. */
  readonly detail?: string;
}

/** Where publishers are announced; `runtime/component` builds one from discovery, tests from a plain map. */
export interface PublisherRecord {
  readonly publisherId: string;
  /** Where to subscribe, e.g. `tcp://127.0.0.1:41001`. */
  readonly address: string;
  /** Where to ask for replay. */
  readonly replayAddress: string;
}

export interface PublisherDirectory {
  announce(topic: string, record: PublisherRecord): Promise<{ withdraw(): Promise<void> }>;
  watch(
    topic: string,
    listener: (change: { type: "put"; record: PublisherRecord } | { type: "delete"; publisherId: string }) => void,
  ): Promise<{ close(): Promise<void> }>;
}
