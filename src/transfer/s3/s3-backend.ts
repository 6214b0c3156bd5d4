import { DynamoError, toDynamoError } from "../../errors/index.ts";
import { systemRandom } from "../../std/index.ts";
import { unfit, type Obstacle, type AgentContext, type PairQuestion, type TransferBackend } from "../backend.ts";
import type { BackendName, ObjectMemory } from "../base.ts";
import { deliverToSelf } from "../file-backend.ts";
import type { Region } from "../region.ts";
import type { TransferJob } from "../transfer-job.ts";
import { S3Client, type S3Options } from "./s3-client.ts";

/**
 * Transfers between host memory and objects: each slot that a batch touches is one request (a few for a large write), some
 * at a time. A write gathers a slot's descriptors into the object; they must fill it from its start without a gap, as
 * objects are stored whole. A read takes one range per run of neighbours and scatters it.
 */
export type { S3Options } from "./s3-client.ts";

/** Requests of one transfer at a time; the client's own limit is over all of them. */
const REQUESTS_AT_A_TIME = 16;

interface SlotPart {
  readonly memory: ObjectMemory;
  readonly slot: number;
  /** Within the object. */
  readonly start: number;
  byteCount: number;
  readonly pieces: Buffer[];
}

export class S3Backend implements TransferBackend {
  readonly name: BackendName = "s3";
  readonly typical = { setupMs: 5, perDescriptorUs: 500, gigabytesPerSecond: 0.3 };
  readonly client: S3Client;
  readonly #context: AgentContext;
  readonly #running = new Map<TransferJob, AbortController>();

  constructor(context: AgentContext, options: S3Options) {
    this.#context = context;
    this.client = new S3Client(options, { clock: context.clock, random: systemRandom });
  }

  publish(): undefined {
    return undefined;
  }

  register(): Promise<void> {
    return Promise.resolve();
  }

  deregister(): Promise<void> {
    return Promise.resolve();
  }

  obstacle({ peer, localKind, remoteKind }: PairQuestion): Obstacle | undefined {
    if (!peer.isSelf || localKind !== "host" || remoteKind !== "object") {
      return unfit("moves between this agent's host memory and objects only");
    }
    return undefined;
  }

  post(job: TransferJob): void {
    const abort = new AbortController();
    this.#running.set(job, abort);
    void this.#run(job, abort).then(
      () => this.#end(job),
      (thrown: unknown) => this.#end(job, toDynamoError(thrown)),
    );
  }

  #end(job: TransferJob, error?: DynamoError): void {
    this.#running.delete(job);
    job.end(error ?? deliverToSelf(this.#context, job));
  }

  async #run(job: TransferJob, abort: AbortController): Promise<void> {
    const parts = this.#partsOf(job);
    const options = { signal: abort.signal, deadlineMs: job.deadlineMs };
    let failed: unknown;
    // Every lane waits for its request, so that nothing touches the memory any more when all have returned.
    const lane = async (): Promise<void> => {
      for (let part = parts.pop(); part !== undefined && failed === undefined; part = parts.pop()) {
        try {
          await this.#move(job, part, options);
        } catch (thrown) {
          failed ??= thrown;
          abort.abort();
        }
      }
    };
    await Promise.all(Array.from({ length: Math.min(REQUESTS_AT_A_TIME, parts.length) }, lane));
    if (failed !== undefined) throw failed;
  }

  async #move(job: TransferJob, part: SlotPart, options: { signal: AbortSignal; deadlineMs: number }): Promise<void> {
    const { memory, slot, start, pieces } = part;
    const at = { bucket: memory.bucket, key: memory.keyOf(slot) };
    if (job.operation === "read") {
      await this.client.get(at, start, pieces, options);
      return;
    }
    const onExists = memory.onExists ?? "keep";
    const isStored = await this.client.put(at, pieces, { ...options, ifAbsent: onExists !== "replace" });
    if (!isStored && onExists === "fail") throw new DynamoError("storage-failed", "the object is in the store already");
  }

  #partsOf(job: TransferJob): SlotPart[] {
    const { local, remote } = job.pairs;
    const parts: SlotPart[] = [];
    let part: SlotPart | undefined;
    for (let i = 0; i < remote.count; i++) {
      const objects = this.#context.regions.find(remote.regionIds[i]!);
      const host = this.#context.regions.find(local.regionIds[i]!);
      if (objects?.memory.kind !== "object" || host === undefined) {
        throw new DynamoError("transfer-stale", "the object memory was deregistered");
      }
      const { memory } = objects;
      // Neighbouring slots may have been merged into one descriptor: cut at the slots' ends.
      for (let inside = 0; inside < remote.lengths[i]!;) {
        const offset = remote.offsets[i]! + inside;
        const slot = Math.floor(offset / memory.slotBytes);
        const start = offset - slot * memory.slotBytes;
        const byteCount = Math.min(memory.slotBytes - start, remote.lengths[i]! - inside);
        if (part?.memory !== memory || part.slot !== slot || part.start + part.byteCount !== start) {
          part = { memory, slot, start, byteCount: 0, pieces: [] };
          parts.push(part);
        }
        part.pieces.push(piece(host, local.offsets[i]! + inside, byteCount));
        part.byteCount += byteCount;
        inside += byteCount;
      }
    }
    if (job.operation === "write") checkWhole(parts);
    return parts.reverse();
  }

  stop(job: TransferJob): void {
    this.#running.get(job)?.abort();
  }

  notify(_peer: unknown, _message: Uint8Array, _timeoutMs: number, done: (error?: DynamoError) => void): void {
    setImmediate(() => done(new DynamoError("transfer-no-path", "an object store takes no messages")));
  }

  forget(): void {}

  close(): Promise<void> {
    return this.client.close();
  }
}

function piece(region: Region, offset: number, byteCount: number): Buffer {
  return region.bytes.subarray(offset, offset + byteCount);
}

/** A write that would leave a hole, or write a slot twice, is refused before anything is sent. */
function checkWhole(parts: readonly SlotPart[]): void {
  const seen = new Map<ObjectMemory, Set<number>>();
  for (const { memory, slot, start } of parts) {
    const slots = seen.get(memory) ?? new Set<number>();
    seen.set(memory, slots);
    if (start === 0 && !slots.has(slot)) {
      slots.add(slot);
      continue;
    }
    throw new DynamoError(
      "transfer-out-of-bounds",
      "a write to an object must fill it from its start, in order, in one piece",
      {
        diagnostic: `slot ${slot} from byte ${start}`,
      },
    );
  }
}
