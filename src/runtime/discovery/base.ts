import type { TimerHandle } from "../../std/index.ts";
export type { TimerHandle };

/**
 * The discovery plane: who is there and what can they do. A small key-value store with leases and watches; back ends
 * `memory` and `file` today, etcd and Kubernetes later. One battery (`discovery.battery.ts`) holds all of them to this.
 *
 * Keys are `/`-separated paths of [A-Za-z0-9._-] segments, at most 512 characters, e.g.
 * `v1/instances/dynamo/backend/generate/00c0ffee00c0ffee`. Values are JSON, at most 1 MiB encoded.
 */
export type JsonValue = null | boolean | number | string | readonly JsonValue[] | { readonly [key: string]: JsonValue };

export interface DiscoveryEntry {
  readonly key: string;
  readonly value: JsonValue;
  /** The lease that holds the key: 16 hex digits. */
  readonly leaseId: string;
}

export type DiscoveryChange =
  | { readonly type: "put"; readonly entry: DiscoveryEntry }
  | {
      readonly type: "delete";
      readonly key: string;
      /**
       * Set when nobody took the key away: its lease was not renewed for a TTL, and the holder may well live. A watcher that
       * could not read meanwhile does not know, and is told so too. Not set when the holder ended it, another one revoked
       * the lease, or the holder is proven gone.
       */
      readonly expired?: true;
    };

export interface Lease {
  /** 16 hex digits. */
  readonly id: string;
  /** Settles when the lease ends without `close`: expired, revoked by another, or its store gone for longer than the TTL. */
  readonly lost: Promise<void>;
  /** Sets a key under this lease. A later put of the same key by any lease wins. Throws `lease-lost`, `discovery-unavailable`. */
  put(key: string, value: JsonValue): Promise<void>;
  /** Removes a key that this lease holds; removing one that is not there is no error. */
  delete(key: string): Promise<void>;
  /** Removes all keys of the lease at once. Idempotent. */
  close(): Promise<void>;
}

export interface Watch {
  close(): Promise<void>;
}

export interface DiscoveryHealth {
  readonly healthy: boolean;
  /** Why not, for operators. */
  readonly detail?: string;
}

export interface Discovery {
  /** A lease of `ttlMs` (default 10,000), renewed by itself until closed. A killed holder's keys vanish within the TTL. */
  openLease(options?: { readonly ttlMs?: number }): Promise<Lease>;
  /** All live entries under the prefix, sorted by key. The prefix ends at a segment (`v1/instances/`). */
  list(prefix: string): Promise<DiscoveryEntry[]>;
  /**
   * Calls `listener` with a put for every live entry, then with each change within 200 ms. Resolves when the first
   * set was delivered. Puts of an unchanged value are not repeated. If the store becomes unreadable the last known set
   * stays (no deletes) until it is readable again. Listener calls never overlap and must not throw.
   */
  watch(prefix: string, listener: (change: DiscoveryChange) => void): Promise<Watch>;
  health(): DiscoveryHealth;
  /** Closes leases and watches opened through this object. Idempotent. */
  close(): Promise<void>;
}
