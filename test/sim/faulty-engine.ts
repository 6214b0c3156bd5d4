import type {
  BlockPort,
  Engine,
  EngineInfo,
  EngineSink,
  ExportedBlocks,
  ImportedBlocks,
} from "../../src/engines/index.ts";
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
  /** Blocks were copied out for another worker. */
  onExport: (() => void) | undefined = undefined;
  /** Host memory held another block than it should. */
  onWrongBlock: ((error: unknown) => void) | undefined = undefined;
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

  /** An engine that hangs answers no question either. */
  async #awake<T>(call: () => Promise<T>): Promise<T> {
    if (this.#held !== undefined) await new Promise<void>((resolve) => this.#held!.push(resolve));
    return call();
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
    return this.#awake(() => this.mocker.countBlocks(sequenceHashes));
  }
  /** Blocks between host memory and the cache. Bytes of another block would be wrong text: the tiers may never bring any. */
  get blockPort(): BlockPort {
    const { blockPort } = this.mocker;
    return {
      attach: (memory) => blockPort.attach(memory),
      copyOut: (hashes, slots) => this.#awake(() => blockPort.copyOut(hashes, slots)),
      copyIn: (blocks) => {
        const copy = blockPort.copyIn(blocks);
        copy.catch((error: unknown) => this.onWrongBlock?.(error));
        return copy;
      },
    };
  }

  async exportBlocks(sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    const blocks = await this.#awake(() => this.mocker.exportBlocks(sequenceHashes));
    this.onExport?.();
    return blocks;
  }
  importBlocks(blocks: ImportedBlocks): Promise<number> {
    return this.#awake(() => this.mocker.importBlocks(blocks));
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
