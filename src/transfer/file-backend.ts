import { close, constants, fdatasync, ftruncate, fstat, open, readv, writev } from "node:fs";
import { promisify } from "node:util";
import { DynamoError } from "../errors/index.ts";
import {
  avoidable,
  unfit,
  type Obstacle,
  type AgentContext,
  type PairQuestion,
  type TransferBackend,
} from "./backend.ts";
import type { FileMemory } from "./base.ts";
import type { Region } from "./region.ts";
import type { TransferJob } from "./transfer-job.ts";

/**
 * Transfers between host memory and a slab in a file, on libuv's thread pool: neighbours in the file become one `readv` or
 * `writev` of up to 8 MiB, four of them at a time per transfer. With `direct` the page cache is left out (O_DIRECT), which
 * wants memory from `agent.allocate` and everything in multiples of 4,096.
 *
 * A thread that waits for a disk cannot be called back: a stopped transfer ends when the calls under way have.
 */
const RUN_BYTES = 8 * 1024 * 1024;
/** IOV_MAX of Linux. */
const RUN_PIECES = 1_024;
const RUNS_AT_A_TIME = 4;
const DIRECT_ALIGNMENT = 4_096;

interface OpenFile {
  readonly fd: number;
  readonly memory: FileMemory;
}

/** One call: pieces of memory beside a contiguous part of the file. */
interface Run {
  readonly file: OpenFile;
  position: number;
  buffers: Buffer[];
  byteCount: number;
}

interface Running {
  readonly runs: Run[];
  readonly files: ReadonlySet<OpenFile>;
  inFlight: number;
  error: DynamoError | undefined;
}

export class FileBackend implements TransferBackend {
  readonly name = "file";
  readonly typical = { setupMs: 0.2, perDescriptorUs: 1, gigabytesPerSecond: 2 };
  readonly #context: AgentContext;
  readonly #files = new Map<number, OpenFile>();
  readonly #running = new Map<TransferJob, Running>();

  constructor(context: AgentContext) {
    this.#context = context;
  }

  publish(): undefined {
    return undefined;
  }

  async register(region: Region): Promise<void> {
    const { memory } = region;
    if (memory.kind !== "file") return;
    const { O_RDWR, O_CREAT } = constants;
    // Only Linux has it, whatever the types say.
    const O_DIRECT = (constants.O_DIRECT as number | undefined) ?? 0;
    if (memory.direct === true && O_DIRECT === 0) {
      throw new DynamoError("unsupported-operation", `${memory.path}: this platform has no O_DIRECT`);
    }
    let fd: number;
    try {
      fd = await promisify(open)(memory.path, O_RDWR | O_CREAT | (memory.direct === true ? O_DIRECT : 0), 0o600);
    } catch (cause) {
      throw storageFailed(memory, cause as Error);
    }
    try {
      const stat = await promisify(fstat)(fd);
      if (!stat.isFile()) throw new Error("not a regular file");
      if (stat.size < memory.byteLength) await promisify(ftruncate)(fd, memory.byteLength);
    } catch (cause) {
      await promisify(close)(fd);
      throw storageFailed(memory, cause as Error);
    }
    this.#files.set(region.id, { fd, memory });
  }

  async deregister(region: Region): Promise<void> {
    const file = this.#files.get(region.id);
    if (file === undefined) return;
    this.#files.delete(region.id);
    await promisify(close)(file.fd);
  }

  obstacle(question: PairQuestion): Obstacle | undefined {
    const { peer, localKind, remoteKind, remoteRegionIds, localRegions, alignment } = question;
    if (!peer.isSelf || localKind !== "host" || remoteKind !== "file")
      return unfit("moves between this agent's host and file memory only");
    const isDirect = remoteRegionIds.some((id) => this.#files.get(id)?.memory.direct === true);
    if (!isDirect) return undefined;
    if (alignment < DIRECT_ALIGNMENT) {
      return unfit(
        `O_DIRECT needs offsets and lengths in multiples of ${DIRECT_ALIGNMENT}, these are multiples of ${alignment}: round the slots up`,
      );
    }
    if (localRegions.some((region) => region.address === undefined))
      return avoidable("O_DIRECT needs memory from agent.allocate");
    return undefined;
  }

  post(job: TransferJob): void {
    let runs: Run[];
    try {
      runs = this.#runsOf(job);
    } catch (thrown) {
      setImmediate(() => job.end(thrown as DynamoError));
      return;
    }
    const running: Running = { runs, files: new Set(runs.map((run) => run.file)), inFlight: 0, error: undefined };
    this.#running.set(job, running);
    for (let i = 0; i < RUNS_AT_A_TIME; i++) this.#next(job, running);
  }

  #runsOf(job: TransferJob): Run[] {
    const { local, remote } = job.pairs;
    const runs: Run[] = [];
    let run: Run | undefined;
    for (let i = 0; i < remote.count; i++) {
      const file = this.#files.get(remote.regionIds[i]!);
      const memory = this.#context.regions.find(local.regionIds[i]!);
      if (file === undefined || memory === undefined)
        throw new DynamoError("transfer-stale", "the file memory was deregistered");
      const start = local.offsets[i]!;
      for (let inside = 0; inside < remote.lengths[i]!;) {
        const byteCount = Math.min(RUN_BYTES, remote.lengths[i]! - inside);
        const position = remote.offsets[i]! + inside;
        const isNext = run !== undefined && run.file === file && run.position + run.byteCount === position;
        if (
          run === undefined ||
          !isNext ||
          run.byteCount + byteCount > RUN_BYTES ||
          run.buffers.length === RUN_PIECES
        ) {
          run = { file, position, buffers: [], byteCount: 0 };
          runs.push(run);
        }
        run.buffers.push(memory.bytes.subarray(start + inside, start + inside + byteCount));
        run.byteCount += byteCount;
        inside += byteCount;
      }
    }
    return runs.reverse();
  }

  #next(job: TransferJob, running: Running): void {
    const isOver = job.stopError !== undefined || running.error !== undefined;
    const run = isOver ? undefined : running.runs.pop();
    if (run !== undefined) {
      running.inFlight++;
      this.#run(job, running, run);
    } else if (running.inFlight === 0 && this.#running.delete(job)) {
      this.#finish(job, running);
    }
  }

  #run(job: TransferJob, running: Running, run: Run): void {
    const onDone = (cause: NodeJS.ErrnoException | null, byteCount: number): void => {
      const isEnd = cause === null && byteCount === 0;
      if (cause !== null || isEnd) {
        running.error ??= storageFailed(
          run.file.memory,
          cause ?? new Error("the file ends before its registered length"),
        );
      } else if (byteCount < run.byteCount && job.stopError === undefined && running.error === undefined) {
        this.#run(job, running, rest(run, byteCount));
        return;
      }
      running.inFlight--;
      this.#next(job, running);
    };
    if (job.operation === "read") readv(run.file.fd, run.buffers, run.position, onDone);
    else writev(run.file.fd, run.buffers, run.position, onDone);
  }

  #finish(job: TransferJob, running: Running): void {
    const synced = [...running.files].filter(({ memory }) => memory.sync === true);
    if (job.operation === "read" || running.error !== undefined || job.stopError !== undefined || synced.length === 0) {
      this.#end(job, running.error);
      return;
    }
    let left = synced.length;
    let failed: DynamoError | undefined;
    for (const { fd, memory } of synced) {
      fdatasync(fd, (cause) => {
        if (cause !== null) failed ??= storageFailed(memory, cause);
        if (--left === 0) this.#end(job, failed);
      });
    }
  }

  /** There is nobody else to notify: the message comes back to this agent. */
  #end(job: TransferJob, error: DynamoError | undefined): void {
    job.end(error ?? deliverToSelf(this.#context, job));
  }

  stop(job: TransferJob): void {
    const running = this.#running.get(job);
    if (running !== undefined) setImmediate(() => this.#next(job, running));
  }

  notify(_peer: unknown, _message: Uint8Array, _timeoutMs: number, done: (error?: DynamoError) => void): void {
    setImmediate(() => done(new DynamoError("transfer-no-path", "files take no messages")));
  }

  forget(): void {}

  async close(): Promise<void> {
    const files = [...this.#files.values()];
    this.#files.clear();
    for (const { fd } of files) await promisify(close)(fd);
  }
}

/** The message of a transfer within one agent: to the agent itself. */
export function deliverToSelf(context: AgentContext, job: TransferJob): DynamoError | undefined {
  if (job.message === undefined || job.stopError !== undefined) return undefined;
  try {
    context.deliver(context.name, job.message);
    return undefined;
  } catch (thrown) {
    return thrown as DynamoError;
  }
}

/** What is left of a run after a short call. */
function rest(run: Run, doneBytes: number): Run {
  const buffers: Buffer[] = [];
  let skip = doneBytes;
  for (const buffer of run.buffers) {
    if (skip >= buffer.length) skip -= buffer.length;
    else {
      buffers.push(buffer.subarray(skip));
      skip = 0;
    }
  }
  return { file: run.file, position: run.position + doneBytes, buffers, byteCount: run.byteCount - doneBytes };
}

function storageFailed(memory: FileMemory, cause: Error): DynamoError {
  const code = (cause as NodeJS.ErrnoException).code;
  const what = code === "ENOSPC" ? "the disk is full" : "it could not be read or written";
  return new DynamoError("storage-failed", `file memory: ${what}`, {
    diagnostic: `${memory.path}: ${cause.message}`,
    cause,
  });
}
