import type { RoutingDecision } from "../router/index.ts";
import type { ClientStream, ClientStreamHandler, StreamEnd } from "../runtime/request-plane/index.ts";
import type { DynamoError } from "../errors/index.ts";
import type { ProgressWatch, WatchedStream, WorkerProgress } from "./progress-watch.ts";

/** Who gets what an attempt brings. Nothing comes after it left. */
export interface AttemptOwner {
  onItem(bytes: Uint8Array, start: number, end: number): void;
  onTurnEnd(): void;
  /** The stream ended, or the worker is taken for stuck. */
  onAttemptEnd(end: StreamEnd): void;
}

/**
 * One try of a choice on one worker: its booking, its stream on the request plane, its place in the progress watch. All
 * three are given back once, by `leave` or `abandon`; whatever an abandoned worker still sends is dropped here.
 */
export class Attempt implements ClientStreamHandler, WatchedStream {
  readonly decision: RoutingDecision;
  readonly #owner: AttemptOwner;
  readonly #watch: ProgressWatch;
  readonly #progress: WorkerProgress;
  #stream: ClientStream | undefined;
  /** Bytes taken from the worker and not granted again. */
  #ungranted = 0;
  #hasBegun = false;
  /** Booking and place in the watch are given back. */
  #isReleased = false;
  /** Nothing is listened to any more. */
  #isLeft = false;

  constructor(owner: AttemptOwner, decision: RoutingDecision, watch: ProgressWatch) {
    this.#owner = owner;
    this.decision = decision;
    this.#watch = watch;
    this.#progress = watch.enter(decision.instanceId, this);
  }

  /** Its worker began to answer, and may send: the client takes what comes. */
  get isExpecting(): boolean {
    return this.#hasBegun && this.#ungranted === 0;
  }

  /** A token came, or the blocks of its prompt. Blocks that are offered before it prove no pace: the prompt may be long. */
  began(): void {
    this.#hasBegun = true;
  }

  /** `open` gets this attempt as the stream's handler. */
  start(open: (handler: ClientStreamHandler) => ClientStream): void {
    this.#stream = open(this);
  }

  /** Ends the booking with `outcome`; the worker's stream ends, or has ended, by itself. */
  leave(outcome: string): void {
    this.#isLeft = true;
    this.release(outcome);
  }

  /** Ends the booking, as the worker's engine is done with it, and goes on listening. */
  release(outcome: string): void {
    if (this.#isReleased) return;
    this.#isReleased = true;
    this.#watch.leave(this.decision.instanceId, this);
    this.decision.release({ outcome });
  }

  /** The stream stays open, but nothing is heard of it. */
  mute(): void {
    this.#isLeft = true;
  }

  /** Ends what `mute` left open. */
  hangUp(): void {
    this.#stream?.cancel();
  }

  /** Leaves, and a worker that may still work on it is told to stop. */
  abandon(outcome: string, error?: DynamoError): void {
    this.leave(outcome);
    this.#stream?.cancel(error);
  }

  /** Lets the worker send as much as was taken. */
  grant(): void {
    if (this.#ungranted === 0) return;
    this.#stream?.grant(this.#ungranted);
    this.#ungranted = 0;
  }

  onItem(bytes: Uint8Array, start: number, end: number): void {
    if (this.#isLeft) return;
    this.#progress.items++;
    this.#ungranted += end - start;
    this.#owner.onItem(bytes, start, end);
  }

  onTurnEnd(): void {
    if (!this.#isLeft) this.#owner.onTurnEnd();
  }

  onEnd(end: StreamEnd): void {
    if (!this.#isLeft) this.#owner.onAttemptEnd(end);
  }

  onStalled(error: DynamoError): void {
    if (!this.#isLeft) this.#owner.onAttemptEnd(error);
  }
}
