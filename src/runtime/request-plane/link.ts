import type { DynamoError } from "../../errors/index.ts";
import type { Flushable } from "./flusher.ts";
import type { Outbox } from "./outbox.ts";

/**
 * What a session (server-session.ts, client-session.ts) needs from the thing that carries its bytes: a TCP connection or
 * a pair of queues in memory. Sessions do no I/O: frames come in through `onFrame`, frames go out through the outbox.
 */
export interface Link extends Flushable {
  readonly outbox: Outbox;
  /** Written but not yet taken by the kernel or the peer, without what is still in the outbox. */
  readonly inFlightBytes: number;
  /** Something was put into the outbox: flush it with the next flush. Called only while not dirty. */
  requestFlush(): void;
  /** Ends the connection at once. */
  drop(error: DynamoError): void;
}

/** Marks the link after something was put into its outbox. */
export function wrote(link: Link): void {
  if (!link.dirty) link.requestFlush();
}
