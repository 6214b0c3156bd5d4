import type { Clock } from "../../std/index.ts";

/**
 * Which worker a session's requests go to. The first request of a session that reaches a worker binds it; the binding
 * lives while requests of the session run and `ttlMs` after the last one ended. Bounded: above the limit the binding
 * that was idle longest goes. Expiry is looked at on use; no timers. Owned by the router.
 */
export interface Binding {
  readonly instanceId: string;
  readonly dpRank: number;
}

interface Session extends Binding {
  leases: number;
  idleSinceMs: number;
}

const MAX_SESSIONS = 65_536;

export class SessionAffinity {
  readonly #clock: Clock;
  readonly #ttlMs: number;
  readonly #limit: number;
  /** In order of last use: the front was idle longest, or runs a request that long. */
  readonly #sessions = new Map<string, Session>();

  constructor({
    clock,
    ttlMs,
    limit = MAX_SESSIONS,
  }: {
    readonly clock: Clock;
    readonly ttlMs: number;
    readonly limit?: number;
  }) {
    this.#clock = clock;
    this.#ttlMs = ttlMs;
    this.#limit = limit;
  }

  get size(): number {
    return this.#sessions.size;
  }

  find(sessionId: string): Binding | undefined {
    const session = this.#sessions.get(sessionId);
    if (session === undefined) return undefined;
    if (!this.#isExpired(session)) return session;
    this.#sessions.delete(sessionId);
    return undefined;
  }

  /**
   * A request of the session runs on this worker now. The first binding wins while it lives; `release` must follow.
   * Returns what to pass to `release`.
   */
  lease(sessionId: string, binding: Binding): Binding {
    const known = this.#sessions.get(sessionId);
    if (known !== undefined && !this.#isExpired(known) && isSame(known, binding)) {
      known.leases++;
      this.#touch(sessionId, known);
      return known;
    }
    const session: Session = { ...binding, leases: 1, idleSinceMs: 0 };
    this.#touch(sessionId, session);
    this.#evict();
    return session;
  }

  /** The request ended. Does nothing for a binding that was replaced meanwhile. */
  release(sessionId: string, lease: Binding): void {
    const session = lease as Session;
    session.leases--;
    session.idleSinceMs = this.#clock.monotonicMs();
    if (this.#sessions.get(sessionId) === session) this.#touch(sessionId, session);
  }

  /** The worker failed a request of the session, or is gone: the next request chooses anew. */
  invalidate(sessionId: string): void {
    this.#sessions.delete(sessionId);
  }

  #touch(sessionId: string, session: Session): void {
    this.#sessions.delete(sessionId);
    this.#sessions.set(sessionId, session);
  }

  #isExpired(session: Session): boolean {
    return session.leases === 0 && this.#clock.monotonicMs() - session.idleSinceMs >= this.#ttlMs;
  }

  /** Takes the expired ones at the front, and one more when there are still too many. */
  #evict(): void {
    for (const [sessionId, session] of this.#sessions) {
      if (this.#sessions.size <= this.#limit && !this.#isExpired(session)) return;
      this.#sessions.delete(sessionId);
    }
  }
}

function isSame(a: Binding, b: Binding): boolean {
  return a.instanceId === b.instanceId && a.dpRank === b.dpRank;
}
