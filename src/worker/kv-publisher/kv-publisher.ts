import { toDynamoError } from "../../errors/index.ts";
import type { CounterChild, Logger } from "../../observability/index.ts";
import { decodeKvQuery, encodeKvEventBatch, kvQueryEndpoint, type KvEvent } from "../../protocol/index.ts";
import type { EventPublisher } from "../../runtime/event-plane/index.ts";
import type { EndpointHandler } from "../../runtime/request-plane/index.ts";
import { randomId64, type Clock, type Random } from "../../std/index.ts";
import { RankEventLog } from "./rank-event-log.ts";

/**
 * Tells routers what happens in the engine's KV cache: numbers and publishes the events of each rank, and answers who
 * missed some. Each call of `onKvEvents` (one engine step) becomes one message per rank, at once: no timer, nothing waits.
 *
 * Never throws into the engine: what cannot be published is counted and found missing by routers, who then ask.
 */
export interface KvPublisherOptions {
  readonly publisher: EventPublisher;
  readonly clock: Clock;
  /** @default the system's */
  readonly random?: Random;
  readonly logger: Logger;
  /** Counts blocks and events that routers are not told. */
  readonly dropped: CounterChild;
  /** Per rank. @default 1,048,576: 16 million tokens in blocks of 16, some 45 MB when full */
  readonly maxBlocks?: number;
  /** 1 to 2^48 - 1; names this life of the worker. @default random */
  readonly epoch?: number;
}

const DEFAULT_MAX_BLOCKS = 1 << 20;
/** Ranks of one engine; the largest deployments have some hundreds over many processes. */
const MAX_RANKS = 1_024;
/** Events of one message: 128 blocks each make at most half a megabyte. */
const MESSAGE_EVENTS = 256;

export class KvPublisher {
  readonly epoch: number;
  readonly #options: KvPublisherOptions;
  readonly #ranks: RankEventLog[] = [];
  #hasLogged = false;

  constructor(options: KvPublisherOptions) {
    this.#options = options;
    this.epoch = options.epoch ?? Number(randomId64(options.random) & 0xffff_ffff_fffen) + 1;
  }

  /** One engine step. Takes ownership of the events. */
  onKvEvents(events: readonly KvEvent[]): void {
    for (let from = 0; from < events.length;) {
      const { dpRank } = events[from]!;
      let to = from + 1;
      while (to < events.length && events[to]!.dpRank === dpRank) to++;
      this.#append(dpRank, from === 0 && to === events.length ? events : events.slice(from, to));
      from = to;
    }
  }

  /** The record of one rank, made when first asked for; undefined for a number no engine has. */
  rank(dpRank: number): RankEventLog | undefined {
    if (!Number.isInteger(dpRank) || dpRank < 0 || dpRank >= MAX_RANKS) return undefined;
    const { clock, maxBlocks = DEFAULT_MAX_BLOCKS } = this.#options;
    return (this.#ranks[dpRank] ??= new RankEventLog({ dpRank, epoch: this.epoch, maxBlocks, clock }));
  }

  /** The query endpoints, one per rank: name and handler. */
  endpoints(dataParallelSize: number): { readonly name: string; readonly handler: EndpointHandler }[] {
    return Array.from({ length: Math.min(MAX_RANKS, Math.max(1, dataParallelSize)) }, (_, dpRank) => ({
      name: kvQueryEndpoint(dpRank),
      handler: (stream, payload) => {
        stream.write(this.rank(dpRank)!.answer(decodeKvQuery(payload)));
        stream.end();
        return { onCancel: () => undefined };
      },
    }));
  }

  close(): void {
    for (const log of this.#ranks) log?.close();
  }

  #append(dpRank: number, events: readonly KvEvent[]): void {
    const log = this.rank(dpRank);
    if (log === undefined) {
      this.#drop(events.length, new Error(`rank ${dpRank} is over the limit of ${MAX_RANKS}`));
      return;
    }
    const droppedBefore = log.droppedBlockCount;
    const out = log.append(events);
    if (log.droppedBlockCount > droppedBefore) {
      this.#drop(log.droppedBlockCount - droppedBefore, new Error(`the rank has ${log.blockCount} blocks already`));
    }
    const firstEventId = log.lastEventId - out.length + 1;
    for (let from = 0; from < out.length; from += MESSAGE_EVENTS) {
      const message = {
        dpRank,
        epoch: this.epoch,
        firstEventId: firstEventId + from,
        events: out.slice(from, from + MESSAGE_EVENTS),
      };
      try {
        this.#options.publisher.publish(encodeKvEventBatch(message));
      } catch (thrown) {
        this.#drop(message.events.length, thrown);
      }
    }
  }

  #drop(count: number, thrown: unknown): void {
    this.#options.dropped.add(count);
    if (this.#hasLogged) return;
    this.#hasLogged = true;
    const { diagnostic } = toDynamoError(thrown);
    this.#options.logger.error(
      { diagnostic },
      "KV events: some are not told to routers; further ones are only counted",
    );
  }
}
