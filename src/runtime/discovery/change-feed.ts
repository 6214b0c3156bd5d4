import type { Logger } from "../../observability/index.ts";
import type { DiscoveryChange, Watch } from "./base.ts";
import { entriesUnder, sameEntry, type StoredEntry } from "./store-key.ts";

interface ChangeFeedOptions {
  readonly prefix: string;
  readonly listener: (change: DiscoveryChange) => void;
  readonly logger: Logger;
  readonly onClose: (feed: ChangeFeed) => void;
  /** Runs the telling of changes later, never at once. @default a microtask */
  readonly schedule?: (run: () => void) => void;
}

/**
 * One watcher's side of a store, the same for every back end: keeps what its listener was told, drops what is no news,
 * and calls the listener one change at a time, never from inside another of its calls and never after `close`.
 * The store tells it of every change; it filters by prefix. Owned by its store; costs one map of references.
 */
export class ChangeFeed implements Watch {
  readonly #options: ChangeFeedOptions;
  /** What the listener knows, by key. */
  readonly #told = new Map<string, StoredEntry>();
  #pending: { key: string; stored: StoredEntry | undefined; expired: boolean }[] = [];
  #scheduled = false;
  #paused = false;
  #closed = false;

  constructor(options: ChangeFeedOptions) {
    this.#options = options;
  }

  /** Tells the listener the first set, before it returns. */
  start(table: ReadonlyMap<string, StoredEntry>): void {
    for (const stored of entriesUnder(this.#options.prefix, table))
      this.#pending.push({ key: stored.entry.key, stored, expired: false });
    this.#scheduled = true;
    this.#drain();
  }

  /** The key now has this entry, or none; `expired`: see `DiscoveryChange`. Told in a later microtask: a caller's `put` never runs listeners inside it. */
  changed(key: string, stored: StoredEntry | undefined, expired = false): void {
    if (this.#closed || this.#paused || !key.startsWith(this.#options.prefix)) return;
    this.#pending.push({ key, stored, expired });
    this.#wake();
  }

  /** The store cannot be read: what was told stays, changes pass unseen. */
  pause(): void {
    this.#paused = true;
  }

  /** It can be read again: tells what is different now. */
  resume(table: ReadonlyMap<string, StoredEntry>): void {
    if (!this.#paused) return;
    this.#paused = false;
    // What waits to be told may be gone again, too.
    const known = new Set([...this.#told.keys(), ...this.#pending.map(({ key }) => key)]);
    for (const key of known) if (!table.has(key)) this.changed(key, undefined, true);
    for (const stored of entriesUnder(this.#options.prefix, table)) this.changed(stored.entry.key, stored);
  }

  #wake(): void {
    if (this.#scheduled) return;
    this.#scheduled = true;
    (this.#options.schedule ?? queueMicrotask)(() => this.#drain());
  }

  #drain(): void {
    // What a listener causes while it runs lands in #pending and is told after it, by this loop.
    for (let i = 0; i < this.#pending.length && !this.#closed; i++) {
      const { key, stored, expired } = this.#pending[i]!;
      if (sameEntry(this.#told.get(key), stored)) continue;
      if (stored === undefined) this.#told.delete(key);
      else this.#told.set(key, stored);
      try {
        if (stored !== undefined) this.#options.listener({ type: "put", entry: stored.entry });
        else this.#options.listener(expired ? { type: "delete", key, expired } : { type: "delete", key });
      } catch (error) {
        // The contract forbids it; the other watchers must not suffer for it.
        this.#options.logger.error({ err: error, prefix: this.#options.prefix }, "a discovery listener threw");
      }
    }
    this.#pending = [];
    this.#scheduled = false;
  }

  close(): Promise<void> {
    if (!this.#closed) {
      this.#closed = true;
      this.#told.clear();
      this.#options.onClose(this);
    }
    return Promise.resolve();
  }
}
