import { VllmEventSource, VllmHashCheck } from "../../engine-events/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { KvEvent } from "../../protocol/index.ts";
import { openEngineLink } from "../../runtime/event-plane/index.ts";
import type { Clock } from "../../std/index.ts";

/** The KV events of a foreign engine, of all its ranks, as ours, in order and without holes. */
export interface KvFeed {
  /** Before the first request. `onEvents` is called on later turns. */
  open(options: KvFeedOptions): Promise<void>;
  /** The engine's cache was emptied on our word: all that was told before is told now, and then forgotten. */
  cleared(): Promise<void>;
  /** Nothing is missing of what can be known. */
  readonly isWhole: boolean;
  /** How often it looked as if the engine had been started anew. */
  readonly lives: number;
  /** Blocks looked at whose hash is another than the one computed here. */
  readonly hashMismatches: number;
  /** For `/health`. */
  describe(): Readonly<Record<string, unknown>>;
  close(): void;
}

export interface KvFeedOptions {
  readonly blockSizeTokens: number;
  readonly dataParallelSize: number;
  /** By which the engine makes its own block hashes; undefined = it does not tell. */
  readonly blockHashAlgorithm?: string | undefined;
  readonly onEvents: (events: readonly KvEvent[]) => void;
}

/** Where rank 0 publishes; rank r does at both ports plus r. */
export interface KvEndpoints {
  /** `tcp://host:port` or `ipc://path`. */
  readonly endpoint: string;
  /** `bind` when the engine connects to us. */
  readonly direction: "connect" | "bind";
  readonly replayEndpoint?: string;
  readonly topic?: string;
}

/** vLLM's and SGLang's: a PUB socket and a ROUTER for replay, for each rank. */
export class ZmqKvFeed implements KvFeed {
  readonly #endpoints: KvEndpoints;
  readonly #clock: Clock;
  readonly #logger: Logger;
  #sources: VllmEventSource[] = [];
  #hashCheck: VllmHashCheck | undefined;

  constructor(endpoints: KvEndpoints, { clock, logger }: { readonly clock: Clock; readonly logger: Logger }) {
    this.#endpoints = endpoints;
    this.#clock = clock;
    this.#logger = logger;
  }

  async open({
    blockSizeTokens,
    dataParallelSize,
    blockHashAlgorithm: algorithm,
    onEvents,
  }: KvFeedOptions): Promise<void> {
    const { endpoint, direction, replayEndpoint, topic } = this.#endpoints;
    const hashCheck = new VllmHashCheck({ logger: this.#logger, algorithm, seed: process.env["PYTHONHASHSEED"] });
    this.#hashCheck = hashCheck;
    for (let dpRank = 0; dpRank < dataParallelSize; dpRank++) {
      const source = new VllmEventSource({ blockSizeTokens, dpRank, logger: this.#logger, hashCheck, onEvents });
      this.#sources.push(source);
      const link = await openEngineLink(
        {
          endpoint: rankEndpoint(endpoint, dpRank),
          direction,
          ...(replayEndpoint === undefined ? {} : { replayEndpoint: rankEndpoint(replayEndpoint, dpRank) }),
          ...(topic === undefined ? {} : { topic }),
          clock: this.#clock,
        },
        source,
      );
      source.attach(link);
    }
  }

  async cleared(): Promise<void> {
    await Promise.all(this.#sources.map((source) => source.cleared()));
  }

  get isWhole(): boolean {
    return this.#sources.length > 0 && this.#sources.every((source) => source.isWhole);
  }

  get lives(): number {
    const count = ({ resets }: VllmEventSource): number =>
      (resets.get("restarted") ?? 0) + (resets.get("reconnected") ?? 0);
    return this.#sources.reduce((sum, source) => sum + count(source), 0);
  }

  get hashMismatches(): number {
    return this.#hashCheck?.mismatches ?? 0;
  }

  describe(): Readonly<Record<string, unknown>> {
    return {
      endpoint: this.#endpoints.endpoint,
      replay_endpoint: this.#endpoints.replayEndpoint ?? null,
      block_hashes: this.#hashCheck?.describe() ?? null,
      ranks: this.#sources.map((source) => ({
        whole: source.isWhole,
        ...source.counts,
        resets: Object.fromEntries(source.resets),
        left_out: Object.fromEntries(source.leftOut),
      })),
    };
  }

  close(): void {
    for (const source of this.#sources) source.close();
    this.#sources = [];
  }
}

/** The engine counts its ports up, rank by rank; other addresses have no room for ranks. */
export function rankEndpoint(endpoint: string, rank: number): string {
  const match = /^(tcp:\/\/.*:)(\d+)$/.exec(endpoint);
  return match === null || rank === 0 ? endpoint : `${match[1]}${Number(match[2]) + rank}`;
}
