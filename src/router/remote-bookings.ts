import type { BookingEvent } from "./route-request.ts";
import type { ActiveSequences, Booking } from "./scheduling/active-sequences.ts";
import type { ApproximateIndex } from "./scheduling/approximate-index.ts";
import type { Binding, SessionAffinity } from "./scheduling/session-affinity.ts";
import type { Rank } from "./worker-set.ts";

/**
 * What other routers have on the workers, as they tell it: best effort, so an event may be lost. Two things keep that
 * from lasting: a router that leaves takes its bookings with it, and each router has room for a bounded number of them,
 * above which the oldest is taken for lost and freed. Where a request goes also says where its session is and whose cache
 * has its prompt, as own decisions do; a session that two routers bind at once is where the one heard last has it. Owned
 * by the router.
 */
export type RemoteResult = "applied" | "unknown-worker" | "unknown-request" | "too-many-routers";

export interface RemoteBookingsOptions {
  readonly sequences: ActiveSequences;
  readonly sessions: SessionAffinity | undefined;
  /** Decisions in place of, or beside, KV events. */
  readonly decisions: ApproximateIndex | undefined;
  readonly rankOf: (instanceId: string, dpRank: number) => Rank | undefined;
}

interface RemoteBooking {
  readonly booking: Booking;
  readonly rank: Rank;
  readonly sessionId: string | undefined;
  lease: Binding | undefined;
}

const MAX_ROUTERS = 256;
const MAX_BOOKINGS_PER_ROUTER = 65_536;

export class RemoteBookings {
  readonly #options: RemoteBookingsOptions;
  /** By router, then by request; the inner map keeps the order of arrival. */
  readonly #routers = new Map<string, Map<string, RemoteBooking>>();

  constructor(options: RemoteBookingsOptions) {
    this.#options = options;
  }

  apply(routerId: string, event: BookingEvent): RemoteResult {
    if (event.type === "add") return this.#add(routerId, event);
    const bookings = this.#routers.get(routerId);
    const remote = bookings?.get(event.requestId);
    if (bookings === undefined || remote === undefined) return "unknown-request";
    if (event.type === "prefill-completed") {
      this.#options.sequences.prefillDone(remote.booking);
      this.#bind(remote);
    } else this.#forget(bookings, event.requestId);
    return "applied";
  }

  drop(routerId: string): void {
    const bookings = this.#routers.get(routerId);
    for (const requestId of bookings?.keys() ?? []) this.#forget(bookings!, requestId);
    this.#routers.delete(routerId);
  }

  #add(routerId: string, event: BookingEvent & { readonly type: "add" }): RemoteResult {
    const { sequences, decisions, rankOf } = this.#options;
    const rank = rankOf(event.instanceId, event.dpRank);
    if (rank === undefined) return "unknown-worker";
    let bookings = this.#routers.get(routerId);
    if (bookings === undefined) {
      if (this.#routers.size >= MAX_ROUTERS) return "too-many-routers";
      this.#routers.set(routerId, (bookings = new Map()));
    }
    // A repeated id is a retry elsewhere, or a lost `free`: the newest counts.
    this.#forget(bookings, event.requestId);
    if (bookings.size >= MAX_BOOKINGS_PER_ROUTER) this.#forget(bookings, bookings.keys().next().value!);
    const { sequenceHashes, sessionId } = event;
    if (sequenceHashes !== undefined) decisions?.record(rank.slot, sequenceHashes, sequenceHashes.length / 2);
    const remote: RemoteBooking = { booking: sequences.add(rank.slot, event), rank, sessionId, lease: undefined };
    bookings.set(event.requestId, remote);
    // In a snapshot nothing else says that its prefill is done.
    if (event.prefillTokens === 0) this.#bind(remote);
    return "applied";
  }

  #bind(remote: RemoteBooking): void {
    const { rank, sessionId, lease } = remote;
    if (sessionId === undefined || lease !== undefined) return;
    remote.lease = this.#options.sessions?.lease(sessionId, { instanceId: rank.instanceId, dpRank: rank.dpRank });
  }

  #forget(bookings: Map<string, RemoteBooking>, requestId: string): void {
    const remote = bookings.get(requestId);
    if (remote === undefined) return;
    bookings.delete(requestId);
    this.#options.sequences.free(remote.booking);
    if (remote.lease !== undefined) this.#options.sessions?.release(remote.sessionId!, remote.lease);
  }
}
