import {
  TrtllmEventAdapter,
  VllmEventMapper,
  decodeTrtllmEvents,
  type TrtllmEvent,
} from "../../engine-events/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import type { EngineHttp } from "./engine-http.ts";
import type { KvFeed, KvFeedOptions } from "./kv-feed.ts";

/**
 * KV events that have to be fetched (TensorRT-LLM's `POST /kv_cache_events`): whoever asks takes them out of the server's
 * buffer, so nobody else may. They are numbered; a number that is missing is lost for good, and one that went back is of a
 * server that was restarted: either way what was known is forgotten, and the index knows less than the engine has, never more.
 */
export interface PolledKvFeedOptions {
  readonly clock: Clock;
  readonly logger: Logger;
  /** Between an answer and the next question. @default 50 */
  readonly intervalMs?: number;
}

const NOTHING_SEEN = { lastId: -1, blocks: undefined, blockSizeTokens: 0 };
const PATH = "/kv_cache_events";
/** The server itself waits for up to two seconds for events. */
const ASK_TIMEOUT_MS = 15_000;
const RETRY_MS = 500;
const MAX_BYTES = 256 * 1024 * 1024;

export class PolledKvFeed implements KvFeed {
  readonly #options: PolledKvFeedOptions;
  #http: EngineHttp | undefined;
  #open: KvFeedOptions | undefined;
  #adapter: TrtllmEventAdapter | undefined;
  #mapper: VllmEventMapper | undefined;
  #timer: TimerHandle | undefined;
  #asking: Promise<void> | undefined;
  /** Fetched before `open`. */
  #early: TrtllmEvent[] = [];
  #next: number | undefined;
  #window = 0;
  /** What the events of this life of the server said of its cache. */
  seen: { readonly lastId: number; readonly blocks: number | undefined; readonly blockSizeTokens: number } =
    NOTHING_SEEN;
  #isClosed = false;
  #hasLogged = false;
  isWhole = false;
  readonly counts = { events: 0, polls: 0, failures: 0, lost: 0, restarts: 0, otherWindows: 0, otherRanks: 0 };

  constructor(options: PolledKvFeedOptions) {
    this.#options = options;
  }

  /** Fetches what is there, for a start that looks whether anything comes at all. Rejects as `EngineHttp.ask`, and for what is no event. */
  async fetch(http: EngineHttp, signal?: AbortSignal): Promise<readonly TrtllmEvent[]> {
    this.#http = http;
    const { status, text } = await http.ask("POST", PATH, {
      timeoutMs: ASK_TIMEOUT_MS,
      maxBytes: MAX_BYTES,
      ...(signal === undefined ? {} : { signal }),
    });
    if (status !== 200) throw new Error(`status ${status} for ${PATH}`);
    this.counts.polls++;
    const events = decodeTrtllmEvents(text);
    for (const event of events) this.#look(event);
    if (this.#open === undefined) this.#early.push(...events);
    else this.#take(events);
    return events;
  }

  open(options: KvFeedOptions): Promise<void> {
    this.#open = options;
    this.#adapter = new TrtllmEventAdapter(options.blockSizeTokens);
    this.#mapper = new VllmEventMapper({ blockSizeTokens: options.blockSizeTokens });
    this.isWhole = true;
    this.#schedule(0);
    return Promise.resolve();
  }

  cleared(): Promise<void> {
    return this.#asking ?? Promise.resolve();
  }

  /** Its hashes are the engine's own business: nothing is computed here. */
  readonly hashMismatches = 0;

  get lives(): number {
    return this.counts.restarts;
  }

  describe(): Readonly<Record<string, unknown>> {
    return { polled: PATH, whole: this.isWhole, ...this.counts, left_out: Object.fromEntries(this.#mapper?.leftOut ?? []) };
  } // prettier-ignore

  close(): void {
    this.#isClosed = true;
    this.isWhole = false;
    this.#timer?.cancel();
  }

  #schedule(delayMs: number): void {
    if (this.#isClosed) return;
    this.#timer = this.#options.clock.setTimer(delayMs, () => {
      this.#take(this.#early.splice(0));
      this.#asking = this.#poll();
    });
  }

  async #poll(): Promise<void> {
    const { logger, intervalMs = 50 } = this.#options;
    try {
      await this.fetch(this.#http!);
      this.#hasLogged = false;
      this.#schedule(intervalMs);
    } catch (thrown) {
      this.counts.failures++;
      if (!this.#hasLogged && !this.#isClosed) {
        this.#hasLogged = true;
        logger.warn({ diagnostic: (thrown as Error).message }, "engine KV events could not be fetched");
      }
      this.#schedule(RETRY_MS);
    }
  }

  #look({ id, event }: TrtllmEvent): void {
    const before = id < this.seen.lastId ? NOTHING_SEEN : this.seen;
    let { blocks, blockSizeTokens } = before;
    if (event.type === "created") blocks = Math.max(blocks ?? 0, event.blocksByLevel[0] ?? 0);
    if (event.type === "stored") {
      for (const { tokenIds } of event.blocks) blockSizeTokens = Math.max(blockSizeTokens, tokenIds.length);
    }
    this.seen = { lastId: id, blocks, blockSizeTokens };
  }

  #take(events: readonly TrtllmEvent[]): void {
    if (this.#isClosed || this.#open === undefined) return;
    for (const event of events) this.#takeOne(event);
  }

  #takeOne({ id, windowSize, rank, event }: TrtllmEvent): void {
    this.counts.events++;
    if (this.#next !== undefined && id !== this.#next) {
      if (id < this.#next) this.counts.restarts++;
      else this.counts.lost += id - this.#next;
      this.#forget();
    }
    this.#next = id + 1;
    // A request cannot be sent to a rank, so only one of them can be told apart.
    if (rank > 0) return void this.counts.otherRanks++;
    if (windowSize < this.#window) return void this.counts.otherWindows++;
    if (windowSize > this.#window && this.#window > 0) this.#forget();
    this.#window = windowSize;
    const mapped = this.#mapper!.map({ dpRank: 0, events: this.#adapter!.adapt(event) });
    if (mapped.length > 0) this.#open!.onEvents(mapped);
  }

  #forget(): void {
    const { blockSizeTokens, onEvents } = this.#open!;
    this.#adapter = new TrtllmEventAdapter(blockSizeTokens);
    this.#mapper = new VllmEventMapper({ blockSizeTokens });
    this.#window = 0;
    onEvents([{ type: "cleared", dpRank: 0 }]);
  }
}
