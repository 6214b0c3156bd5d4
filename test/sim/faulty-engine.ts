import type { Engine, EngineInfo, EngineSink, ExportedBlocks, ImportedBlocks } from "../../src/engines/index.ts";
import type { MockerEngine } from "../../src/engines/mocker/index.ts";
import { DynamoError } from "../../src/errors/index.ts";
import {
  forEachStepEntry,
  type KvEvent,
  type LoadSnapshot,
  type PreprocessedRequest,
} from "../../src/protocol/index.ts";

/**
 * The mock engine with two faults: it can hang (nothing comes out of it until it is let go) and die. It remembers whom it
 * works for.
 */
export class FaultyEngine implements Engine {
  readonly mocker: MockerEngine;
  #sink: EngineSink | undefined = undefined;
  /** Request ids by stream, of those that have not ended. */
  readonly live = new Map<number, string>();
  /** What came out while it hung. */
  #held: (() => void)[] | undefined = undefined;
  /** When it began to hang: it counts no further. */
  #heldLoad: LoadSnapshot | undefined = undefined;

  constructor(mocker: MockerEngine) {
    this.mocker = mocker;
  }

  start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo> {
    this.#sink = sink;
    return this.mocker.start(
      {
        onStep: (step) => {
          forEachStepEntry(step, (id, _start, _end, final) => {
            if (final) this.live.delete(id);
          });
          const copy = this.#held === undefined ? step : Uint8Array.from(step);
          this.#pass(() => sink.onStep(copy));
        },
        onKvEvents: (events: readonly KvEvent[]) => this.#pass(() => sink.onKvEvents(events)),
        onFatal: (error) => sink.onFatal(error),
      },
      signal,
    );
  }

  hang(): void {
    this.#held ??= [];
    this.#heldLoad ??= this.mocker.load();
  }

  letGo(): void {
    const held = this.#held ?? [];
    this.#held = undefined;
    this.#heldLoad = undefined;
    for (const run of held) run();
  }

  async die(): Promise<void> {
    this.letGo();
    await this.mocker.stop();
    this.#sink?.onFatal(new DynamoError("engine-failed", "the engine failed"));
  }

  #pass(run: () => void): void {
    if (this.#held === undefined) run();
    else this.#held.push(run);
  }

  submit(streamId: number, request: PreprocessedRequest): void {
    this.live.set(streamId, request.requestId);
    this.mocker.submit(streamId, request);
  }
  abort(streamId: number): void {
    this.mocker.abort(streamId);
  }
  load(): LoadSnapshot {
    return this.#heldLoad ?? this.mocker.load();
  }
  countBlocks(sequenceHashes: Uint32Array): Promise<number> {
    return this.mocker.countBlocks(sequenceHashes);
  }
  exportBlocks(sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    return this.mocker.exportBlocks(sequenceHashes);
  }
  importBlocks(blocks: ImportedBlocks): Promise<number> {
    return this.mocker.importBlocks(blocks);
  }
  clearBlocks(): Promise<number> {
    return this.mocker.clearBlocks();
  }
  drain(): Promise<void> {
    return this.mocker.drain();
  }
  stop(): Promise<void> {
    this.letGo();
    return this.mocker.stop();
  }
}
