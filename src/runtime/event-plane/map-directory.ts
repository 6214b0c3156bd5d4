import type { PublisherDirectory, PublisherRecord } from "./base.ts";

type Change = { type: "put"; record: PublisherRecord } | { type: "delete"; publisherId: string };

/** A publisher directory in memory: for tests, benchmarks and planes of one process. Listeners run within the call. */
export class MapDirectory implements PublisherDirectory {
  readonly #records = new Map<string, Map<string, PublisherRecord>>();
  readonly #listeners = new Map<string, Set<(change: Change) => void>>();

  /** Sets a record as another process would. */
  put(topic: string, record: PublisherRecord): void {
    let records = this.#records.get(topic);
    if (records === undefined) this.#records.set(topic, (records = new Map()));
    records.set(record.publisherId, record);
    this.#tell(topic, { type: "put", record });
  }

  /** Removes a record, as the end of its lease would. */
  delete(topic: string, publisherId: string): void {
    if (this.#records.get(topic)?.delete(publisherId) === true) this.#tell(topic, { type: "delete", publisherId });
  }

  get listenerCount(): number {
    let count = 0;
    for (const listeners of this.#listeners.values()) count += listeners.size;
    return count;
  }

  announce(topic: string, record: PublisherRecord): Promise<{ withdraw(): Promise<void> }> {
    this.put(topic, record);
    const withdraw = () => {
      // Only what is still ours: a later publisher of the same id may have replaced it.
      if (this.#records.get(topic)?.get(record.publisherId) === record) this.delete(topic, record.publisherId);
      return Promise.resolve();
    };
    return Promise.resolve({ withdraw });
  }

  watch(topic: string, listener: (change: Change) => void): Promise<{ close(): Promise<void> }> {
    let listeners = this.#listeners.get(topic);
    if (listeners === undefined) this.#listeners.set(topic, (listeners = new Set()));
    listeners.add(listener);
    for (const record of this.#records.get(topic)?.values() ?? []) listener({ type: "put", record });
    const close = () => {
      listeners.delete(listener);
      return Promise.resolve();
    };
    return Promise.resolve({ close });
  }

  #tell(topic: string, change: Change): void {
    for (const listener of this.#listeners.get(topic) ?? []) listener(change);
  }
}
