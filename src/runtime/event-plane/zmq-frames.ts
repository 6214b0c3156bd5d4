/**
 * The frames of the `zmq` event plane. Numbers are u64, big-endian, in frames of their own, as Dynamo has them, so that
 * foreign tools can listen to the events. Ids and epochs are opaque 64-bit values, shown as 16 hex digits.
 *
 * ```
 *   event    PUB -> SUB       topic | publisher id | sequence | payload
 *   beacon   PUB -> SUB       \0 topic | publisher id | newest sequence | epoch
 *   request  DEALER -> ROUTER topic | publisher id | from | to | ask number
 *   answer   ROUTER -> DEALER ask number | epoch (0: no such publisher) | first sequence | newest sequence | payload...
 * ```
 *
 * Decoders return undefined for whatever is not exactly that; they never throw and never read past a frame.
 */

/** Sequences stay far below 2^53, so that sums of two of them are exact. */
export const MAX_SEQUENCE = 2 ** 52;
/** First byte of a beacon's topic; no topic contains it, so that a listener to a topic sees events only. */
export const BEACON_PREFIX = "\0";
export const NO_EPOCH = "0000000000000000";

const TWO_32 = 2 ** 32;

export function writeU64(into: Buffer, value: number): Buffer {
  into.writeUInt32BE(Math.floor(value / TWO_32), 0);
  into.writeUInt32BE(value % TWO_32, 4);
  return into;
}

export function u64Frame(value: number): Buffer {
  return writeU64(Buffer.allocUnsafe(8), value);
}

export function idFrame(hex: string): Buffer {
  return Buffer.from(hex, "hex");
}

/** A sequence or count; -1 when the frame is no u64 or over `MAX_SEQUENCE`. */
export function readSequence(frame: Buffer): number {
  if (frame.length !== 8) return -1;
  const value = frame.readUInt32BE(0) * TWO_32 + frame.readUInt32BE(4);
  return value <= MAX_SEQUENCE ? value : -1;
}

export interface Beacon {
  readonly topic: string;
  readonly publisherId: string;
  readonly newest: number;
  readonly epoch: string;
}

export function isBeacon(frames: readonly Buffer[]): boolean {
  return frames[0]?.[0] === 0;
}

export function decodeBeacon(frames: readonly Buffer[]): Beacon | undefined {
  const [topic, id, newestFrame, epoch] = frames;
  if (frames.length !== 4 || topic!.length < 2 || topic![0] !== 0 || id!.length !== 8 || epoch!.length !== 8) {
    return undefined;
  }
  const newest = readSequence(newestFrame!);
  if (newest < 0) return undefined;
  return {
    topic: topic!.toString("latin1", 1),
    publisherId: id!.toString("hex"),
    newest,
    epoch: epoch!.toString("hex"),
  };
}

export interface ReplayRequest {
  readonly topic: string;
  readonly publisherId: string;
  readonly from: number;
  readonly to: number;
  readonly askNumber: number;
}

export function encodeReplayRequest(request: ReplayRequest): Buffer[] {
  return [
    Buffer.from(request.topic, "latin1"),
    idFrame(request.publisherId),
    u64Frame(request.from),
    u64Frame(request.to),
    u64Frame(request.askNumber),
  ];
}

export function decodeReplayRequest(frames: readonly Buffer[]): ReplayRequest | undefined {
  const [topic, id, fromFrame, toFrame, askFrame] = frames;
  if (frames.length !== 5 || topic!.length > 128 || id!.length !== 8) return undefined;
  const from = readSequence(fromFrame!);
  const to = readSequence(toFrame!);
  const askNumber = readSequence(askFrame!);
  if (from < 1 || to < from || askNumber < 0) return undefined;
  return { topic: topic!.toString("latin1"), publisherId: id!.toString("hex"), from, to, askNumber };
}

export interface ReplayAnswer {
  readonly askNumber: number;
  readonly epoch: string;
  readonly first: number;
  readonly newest: number;
  readonly payloads: readonly Buffer[];
}

export function encodeReplayAnswer(
  answer: Omit<ReplayAnswer, "payloads"> & { readonly payloads: readonly Uint8Array[] },
): Uint8Array[] {
  return [
    u64Frame(answer.askNumber),
    idFrame(answer.epoch),
    u64Frame(answer.first),
    u64Frame(answer.newest),
    ...answer.payloads,
  ];
}

export function decodeReplayAnswer(frames: readonly Buffer[]): ReplayAnswer | undefined {
  if (frames.length < 4 || frames[1]!.length !== 8) return undefined;
  const askNumber = readSequence(frames[0]!);
  const first = readSequence(frames[2]!);
  const newest = readSequence(frames[3]!);
  if (askNumber < 0 || first < 0 || newest < 0 || first + frames.length - 4 > MAX_SEQUENCE) return undefined;
  return { askNumber, epoch: frames[1]!.toString("hex"), first, newest, payloads: frames.slice(4) };
}
