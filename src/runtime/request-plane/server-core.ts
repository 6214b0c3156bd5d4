import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { Clock, TimerWheel } from "../../std/index.ts";
import type { EndpointHandler } from "./base.ts";
import { MAX_STREAM_ID } from "./frame.ts";
import type { RequestPlaneLimits } from "./limits.ts";
import type { ServerStreamState } from "./server-stream.ts";

/**
 * What all connections of one server share: its endpoints, its live streams, their ids and the sum of what they park.
 * The only admission path of a request is `refusalOf`. Back ends own one each and wrap it into a `RequestPlaneServer`.
 */
export interface ServerCoreOptions {
  readonly clock: Clock;
  readonly wheel: TimerWheel;
  readonly limits: RequestPlaneLimits;
  readonly logger: Logger;
}

export class ServerCore {
  readonly clock: Clock;
  readonly wheel: TimerWheel;
  readonly limits: RequestPlaneLimits;
  readonly logger: Logger;
  /** Bytes that streams without credit hold, over all streams. */
  parkedBytes = 0;
  #draining = false;
  #nextId = 1;
  readonly #endpoints = new Map<string, EndpointHandler>();
  readonly #streams = new Map<number, ServerStreamState>();
  #whenIdle: (() => void)[] = [];

  constructor({ clock, wheel, limits, logger }: ServerCoreOptions) {
    this.clock = clock;
    this.wheel = wheel;
    this.limits = limits;
    this.logger = logger;
  }

  get draining(): boolean {
    return this.#draining;
  }

  get activeStreamCount(): number {
    return this.#streams.size;
  }

  /** The newest handler of an endpoint counts; withdrawing an older one does nothing. */
  serve(endpoint: string, handler: EndpointHandler): () => void {
    this.#endpoints.set(endpoint, handler);
    return () => {
      if (this.#endpoints.get(endpoint) === handler) this.#endpoints.delete(endpoint);
    };
  }

  handlerOf(endpoint: string): EndpointHandler | undefined {
    return this.#endpoints.get(endpoint);
  }

  /** Why a connection with that many live streams gets no further one for this endpoint, if so. */
  refusalOf(endpoint: string, liveStreamCount: number): DynamoError | undefined {
    if (this.#draining) return new DynamoError("draining", "the worker is shutting down");
    if (liveStreamCount >= this.limits.maxStreamsPerConnection) {
      return new DynamoError("stream-limit", "the connection carries as many streams as its limit allows");
    }
    if (!this.#endpoints.has(endpoint)) {
      return new DynamoError("endpoint-not-found", "the worker does not serve this endpoint", {
        diagnostic: `endpoint ${JSON.stringify(endpoint)}`,
      });
    }
    return undefined;
  }

  /** Unique among live streams, 1 to 2^31-1; starts again at 1 after the last. */
  takeId(): number {
    let id = this.#nextId;
    while (this.#streams.has(id)) id = id === MAX_STREAM_ID ? 1 : id + 1;
    this.#nextId = id === MAX_STREAM_ID ? 1 : id + 1;
    return id;
  }

  started(stream: ServerStreamState): void {
    this.#streams.set(stream.id, stream);
  }

  finished(stream: ServerStreamState): void {
    this.#streams.delete(stream.id);
    if (this.#streams.size > 0) return;
    const waiting = this.#whenIdle;
    this.#whenIdle = [];
    for (const resolve of waiting) resolve();
  }

  /** Refuses new streams from now on; resolves when none runs. */
  drain(): Promise<void> {
    this.#draining = true;
    if (this.#streams.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#whenIdle.push(resolve));
  }

  /** Ends what runs with `error`, telling both sides. Takes nothing new from now on. */
  endAll(error: DynamoError): void {
    this.#draining = true;
    for (const stream of this.#streams.values()) stream.abort(error);
  }
}
