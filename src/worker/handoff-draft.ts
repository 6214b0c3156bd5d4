import type { Engine } from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import { encodeHandoffPart, type HandoffPart } from "../protocol/index.ts";
import type { ServerStream } from "../runtime/request-plane/index.ts";
import type { HandoffStore, HeldBlocks } from "./handoff-store.ts";

/**
 * The blocks of one prompt on their way out of a prefill worker, from the moment it is accepted to its handoff. Engines that
 * tell (`followBlocks`) give each block right after the step that completed it, so that finished chunks travel while the
 * next ones are computed, and the last ones do not wait for a step of other prompts. With other engines, and where there was
 * no room for a part, the blocks are exported when the prompt is complete.
 *
 * A part that was claimed and not read (the transfer failed) goes with the handoff again, exported anew with all behind it.
 *
 *     blocks of the prompt   | fetched as parts, or being fetched | parts nobody claimed | not copied yet |
 *                            0                                    firstBlock             copied          blockCount
 *                                                                 └───────── the handoff ────────────────┘
 *
 * Ends once: by `finish` or `abandon`. Owned by the worker's loop.
 */
export interface HandoffDraftOptions {
  readonly id: string;
  readonly engine: Engine;
  readonly store: HandoffStore;
  /** Of the prompt's complete blocks. */
  readonly sequenceHashes: Uint32Array;
  /** Some blocks are there, and more are to come: whoever decodes may begin to fetch. Called at most once. */
  readonly onBegun: () => void;
}

export interface FinishedDraft extends HeldBlocks {
  readonly firstBlock: number;
}

export class HandoffDraft {
  readonly id: string;
  readonly #options: HandoffDraftOptions;
  readonly #parts: HandoffPart[] = [];
  readonly #unfollow: (() => void) | undefined;
  #copied = 0;
  /** A part did not fit: what follows is not contiguous and must wait for the end. */
  #isCut = false;
  #hasBegun = false;
  #isOver = false;
  /** The first block of a part whose reader failed. */
  #lostFrom = Infinity;
  #watcher: ServerStream | undefined = undefined;

  constructor(options: HandoffDraftOptions) {
    this.id = options.id;
    this.#options = options;
    this.#unfollow = options.engine.followBlocks?.(options.sequenceHashes, (data) => this.#take(data));
  }

  get hasParts(): boolean {
    return this.#parts.length > 0;
  }

  get #blockCount(): number {
    return this.#options.sequenceHashes.length / 2;
  }

  #take(data: Uint8Array): void {
    const { store, onBegun } = this.#options;
    if (this.#isCut || this.#isOver) return;
    if (store.freeBlocks === 0) {
      this.#isCut = true;
      return;
    }
    const firstBlock = this.#copied;
    const held = store.offerPart(data, (outcome, wasClaimed) => {
      if (wasClaimed && outcome !== "fetched") this.#lostFrom = Math.min(this.#lostFrom, firstBlock);
    });
    this.#isCut = held.blockCount * store.blockBytes < data.length;
    const part = { ...held, firstBlock };
    this.#parts.push(part);
    this.#copied += held.blockCount;
    this.#watcher?.write(encodeHandoffPart(part));
    if (this.#hasBegun || this.#copied >= this.#blockCount) return;
    this.#hasBegun = true;
    onBegun();
  }

  /** Tells of each part, those that are there first. The stream ends with the draft. One watcher at a time. */
  watch(stream: ServerStream): void {
    if (this.#watcher !== undefined)
      throw new DynamoError("handoff-gone", "the draft of the handoff is watched already");
    this.#watcher = stream;
    for (const part of this.#parts) if (this.#options.store.isOffered(part.id)) stream.write(encodeHandoffPart(part));
  }

  /** Its watcher is gone. */
  unwatch(): void {
    this.#watcher = undefined;
  }

  /**
   * The prompt is computed: what nobody has claimed yet becomes a handoff, and `onFree` is called when that is gone. With
   * everything claimed it has no blocks, and is not kept. Throws `transfer-full`, `handoff-gone`, `cancelled`.
   */
  async finish(signal: AbortSignal, onFree: () => void): Promise<FinishedDraft> {
    const { engine, store, sequenceHashes } = this.#options;
    this.#unfollow?.();
    this.#forgetLost();
    try {
      // No more than fits: the rest is computed again.
      const rest = sequenceHashes.subarray(2 * this.#copied, 2 * (this.#copied + store.freeBlocks));
      const data = rest.length === 0 ? NO_BYTES : (await engine.exportBlocks(rest)).data;
      if (signal.aborted) throw new DynamoError("cancelled", "the caller cancelled the request");
      const offered = this.#offeredParts();
      const firstBlock = offered[0]?.firstBlock ?? this.#copied;
      if (offered.length === 0 && data.length === 0) {
        // The handoff is to begin where the last part ended, or nobody can go on behind it.
        if (firstBlock === 0 && rest.length === 0) throw store.full();
        if (firstBlock === 0) {
          throw new DynamoError("handoff-gone", "the engine's cache has lost the prompt's blocks already");
        }
        this.#end();
        return { id: this.id, runs: NO_RUNS, blockCount: 0, firstBlock };
      }
      this.#end();
      const ids = offered.map(({ id }) => id);
      return { ...store.join(ids, data, onFree), firstBlock };
    } catch (thrown) {
      this.abandon();
      throw thrown;
    }
  }

  #forgetLost(): void {
    if (this.#lostFrom >= this.#copied) return;
    this.#copied = this.#lostFrom;
    while (this.#parts.length > 0 && this.#parts.at(-1)!.firstBlock >= this.#lostFrom) {
      this.#options.store.cancel(this.#parts.pop()!.id);
    }
  }

  /** The last parts of the row, up to one that was claimed. */
  #offeredParts(): readonly HandoffPart[] {
    const { store } = this.#options;
    let from = this.#parts.length;
    while (from > 0 && store.isOffered(this.#parts[from - 1]!.id)) from--;
    return this.#parts.slice(from);
  }

  /** There will be no handoff. Parts that are being fetched stay for their claim's time. */
  abandon(): void {
    if (this.#isOver) return;
    this.#unfollow?.();
    this.#end();
    for (const { id } of this.#parts) this.#options.store.cancel(id);
  }

  #end(): void {
    this.#isOver = true;
    // Parts in front of a claimed one that nobody wanted: held by the reader already.
    const offered = new Set(this.#offeredParts());
    for (const part of this.#parts) if (!offered.has(part)) this.#options.store.cancel(part.id);
    this.#watcher?.end();
    this.#watcher = undefined;
  }
}

const NO_BYTES = new Uint8Array(0);
const NO_RUNS = new Uint32Array(0);
