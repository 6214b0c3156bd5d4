import type { BookingEvent } from "./route-request.ts";
import type { ActiveSequences, Booking } from "./scheduling/active-sequences.ts";
import type { Rank } from "./worker-set.ts";

/**
 * What other routers have on the workers, as they tell it: best effort, so an event may be lost. Two things keep that
 * from lasting: a router that leaves takes its bookings with it, and each router has room for a bounded number of them,
 * above which the oldest is taken for lost and freed. Owned by the router.
 */
export type RemoteResult = "applied" | "unknown-worker" | "unknown-request" | "too-many-routers";

const MAX_ROUTERS = 256;
const MAX_BOOKINGS_PER_ROUTER = 65_536;

export class RemoteBookings {
  readonly #sequences: ActiveSequences;
  readonly #rankOf: (instanceId: string, dpRank: number) => Rank | undefined;
  /** By router, then by request; the inner map keeps the order of arrival. */
  readonly #routers = new Map<string, Map<string, Booking>>();

  constructor(sequences: ActiveSequences, rankOf: (instanceId: string, dpRank: number) => Rank | undefined) {
    this.#sequences = sequences;
    this.#rankOf = rankOf;
  }

  apply(routerId: string, event: BookingEvent): RemoteResult {
    if (event.type === "add") return this.#add(routerId, event);
    const bookings = this.#routers.get(routerId);
    const booking = bookings?.get(event.requestId);
    if (bookings === undefined || booking === undefined) return "unknown-request";
    if (event.type === "prefill-completed") this.#sequences.prefillDone(booking);
    else {
      bookings.delete(event.requestId);
      this.#sequences.free(booking);
    }
    return "applied";
  }

  drop(routerId: string): void {
    for (const booking of this.#routers.get(routerId)?.values() ?? []) this.#sequences.free(booking);
    this.#routers.delete(routerId);
  }

  #add(routerId: string, event: BookingEvent & { readonly type: "add" }): RemoteResult {
    const rank = this.#rankOf(event.instanceId, event.dpRank);
    if (rank === undefined) return "unknown-worker";
    let bookings = this.#routers.get(routerId);
    if (bookings === undefined) {
      if (this.#routers.size >= MAX_ROUTERS) return "too-many-routers";
      this.#routers.set(routerId, (bookings = new Map()));
    }
    // A repeated id is a retry elsewhere, or a lost `free`: the newest counts.
    this.#forget(bookings, event.requestId);
    if (bookings.size >= MAX_BOOKINGS_PER_ROUTER) this.#forget(bookings, bookings.keys().next().value!);
    bookings.set(event.requestId, this.#sequences.add(rank.slot, event));
    return "applied";
  }

  #forget(bookings: Map<string, Booking>, requestId: string): void {
    const booking = bookings.get(requestId);
    if (booking === undefined) return;
    bookings.delete(requestId);
    this.#sequences.free(booking);
  }
}
