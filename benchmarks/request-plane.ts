import { fork } from "node:child_process";
import { once } from "node:events";
import { createServer, connect, type Socket } from "node:net";
import { cpus } from "node:os";
import { TcpRequestPlane } from "../src/runtime/request-plane/index.ts";

/**
 * Items through the TCP request plane between two processes, beside a bare `net` socket that sends length-prefixed frames
 * of the same size with the same writes: 1, 16 or 64 items of 200 bytes per flush, each for another stream. The figure to
 * trust is CPU time per item (the kernel's accounting of each process), as both processes share the machine with its other
 * work; the ratio to the bare socket is the price of streams, credits and routing. Both send as fast as the reader
 * acknowledges, so every flush is a real write. Then requests: open, one item, end, a hundred at a time.
 */
const ITEM_BYTES = 200;
/** Below what the kernel buffers, so that every flush is a write of its own on both sides of the comparison. */
const ON_THE_WAY_BYTES = 512 * 1024;
const ACK_BYTES = 64 * 1024;
const FLUSHES_PER_TURN = 64;
const ROUNDS = 5;
const ITEMS_PER_FLUSH = [1, 16, 64];
const ITEM_COUNTS: Record<number, number> = { 1: 60_000, 16: 800_000, 64: 2_000_000 };
const REQUEST_COUNT = 20_000;

interface Order {
  readonly kind: "plane" | "bare" | "requests";
  readonly itemsPerFlush: number;
  readonly itemCount: number;
}

interface Result {
  readonly wallMs: number;
  readonly sendUs: number;
  readonly receiveUs: number;
}

// ---- the sending process ----

function totalCpuUs(since: NodeJS.CpuUsage): number {
  const { user, system } = process.cpuUsage(since);
  return user + system;
}

/** Calls `sendFlush` as long as `mayGoOn`, some per turn, then `done`. */
function pump(mayGoOn: () => boolean, sendFlush: () => boolean, done: () => void): void {
  for (let i = 0; i < FLUSHES_PER_TURN && mayGoOn(); i++) {
    if (sendFlush()) continue;
    done();
    return;
  }
  setImmediate(() => pump(mayGoOn, sendFlush, done));
}

async function serve(): Promise<void> {
  let order: Order = { kind: "plane", itemsPerFlush: 1, itemCount: 0 };
  let ackedBytes = 0;
  let cpu = process.cpuUsage();
  const report = (): boolean => process.send!({ sendUs: totalCpuUs(cpu) });
  const item = Buffer.alloc(ITEM_BYTES, 1);

  const plane = new TcpRequestPlane();
  const server = await plane.listen();
  server.serve("bench.worker.ack", (stream) => {
    ackedBytes += ACK_BYTES;
    stream.end();
    return { onCancel: () => undefined };
  });
  server.serve("bench.worker.echo", (stream, payload) => {
    stream.write(payload);
    stream.end();
    return { onCancel: () => undefined };
  });
  let streams: { write(item: Uint8Array): void; end(): void }[] = [];
  server.serve("bench.worker.items", (stream) => {
    streams.push(stream);
    if (streams.length === order.itemsPerFlush) sendItems();
    return { onCancel: () => undefined };
  });
  const sendItems = (): void => {
    const mine = streams;
    streams = [];
    let sent = 0;
    pump(
      () => sent * ITEM_BYTES - ackedBytes < ON_THE_WAY_BYTES,
      () => {
        for (let i = 0; i < mine.length; i++) mine[i]!.write(item);
        sent += mine.length;
        const more = sent < order.itemCount;
        if (!more) for (const stream of mine) stream.end();
        server.flush();
        return more;
      },
      report,
    );
  };

  const bare = createServer({ noDelay: true }, (socket) => {
    socket.on("data", (chunk) => (ackedBytes += chunk.length * ACK_BYTES));
    sendBare(socket);
  });
  const sendBare = (socket: Socket): void => {
    let sent = 0;
    const count = order.itemsPerFlush;
    let slab = Buffer.allocUnsafeSlow(count * (4 + ITEM_BYTES));
    pump(
      () => sent * ITEM_BYTES - ackedBytes < ON_THE_WAY_BYTES,
      () => {
        if (socket.writableLength > 0) slab = Buffer.allocUnsafeSlow(slab.length);
        for (let i = 0, at = 0; i < count; i++, at += 4 + ITEM_BYTES) {
          slab.writeUInt32LE(ITEM_BYTES, at);
          slab.set(item, at + 4);
        }
        socket.write(slab);
        sent += count;
        return sent < order.itemCount;
      },
      report,
    );
  };
  bare.listen(0, "127.0.0.1");
  await once(bare, "listening");

  process.on("message", (message: Order | "report") => {
    if (message === "report") {
      report();
      return;
    }
    order = message;
    ackedBytes = 0;
    cpu = process.cpuUsage();
    process.send!("ready");
  });
  process.on("disconnect", () => process.exit(0));
  process.send!({ address: server.address, barePort: (bare.address() as { port: number }).port });
}

// ---- the receiving process ----

async function receivePlane(plane: TcpRequestPlane, address: string, order: Order): Promise<void> {
  const names = { requestId: "bench", traceparent: "", timeoutMs: 60_000 };
  const nothing = new Uint8Array(0);
  const ignored = { onItem: () => undefined, onTurnEnd: () => undefined, onEnd: () => undefined };
  let unackedBytes = 0;
  let itemCount = 0;
  await new Promise<void>((resolve, reject) => {
    let left = order.itemsPerFlush;
    const handler = {
      onItem: (_bytes: Uint8Array, start: number, end: number): void => {
        itemCount++;
        unackedBytes += end - start;
      },
      onTurnEnd: (): void => {
        for (; unackedBytes >= ACK_BYTES; unackedBytes -= ACK_BYTES) {
          plane.client.open(address, nothing, { ...names, endpoint: "bench.worker.ack" }, ignored);
        }
      },
      onEnd: (error: Error | undefined): void => {
        if (error !== undefined) reject(error);
        else if (--left === 0) resolve();
      },
    };
    const options = { ...names, endpoint: "bench.worker.items", autoCredit: true, windowBytes: 2 * ON_THE_WAY_BYTES };
    for (let i = 0; i < order.itemsPerFlush; i++) plane.client.open(address, nothing, options, handler);
  });
  if (itemCount < order.itemCount) throw new Error(`${itemCount} of ${order.itemCount} items came`);
}

/** Cuts frames out of the chunks as the sections on binary messaging in the design do: in place, the rest carried over. */
async function receiveBare(port: number, order: Order): Promise<void> {
  const socket = connect({ host: "127.0.0.1", port, noDelay: true });
  let rest: Buffer = Buffer.alloc(0);
  let itemCount = 0;
  let unackedBytes = 0;
  await new Promise<void>((resolve, reject) => {
    socket.on("error", reject);
    socket.on("data", (chunk: Buffer) => {
      const bytes = rest.length === 0 ? chunk : Buffer.concat([rest, chunk]);
      let at = 0;
      while (bytes.length - at >= 4) {
        const byteCount = bytes.readUInt32LE(at);
        if (bytes.length - at - 4 < byteCount) break;
        at += 4 + byteCount;
        itemCount++;
        unackedBytes += byteCount;
      }
      rest = bytes.subarray(at);
      for (; unackedBytes >= ACK_BYTES; unackedBytes -= ACK_BYTES) socket.write(".");
      if (itemCount >= order.itemCount) resolve();
    });
  });
  socket.destroy();
}

async function requests(plane: TcpRequestPlane, address: string, order: Order): Promise<void> {
  const options = { endpoint: "bench.worker.echo", requestId: "bench", traceparent: "", timeoutMs: 60_000 };
  const payload = Buffer.alloc(1_024, 1);
  await new Promise<void>((resolve, reject) => {
    let opened = 0;
    let ended = 0;
    const next = (): void => {
      if (opened++ < order.itemCount) plane.client.open(address, payload, { ...options, autoCredit: true }, handler);
    };
    const handler = {
      onItem: () => undefined,
      onTurnEnd: () => undefined,
      onEnd: (error: Error | undefined): void => {
        if (error !== undefined) reject(error);
        else if (++ended === order.itemCount) resolve();
        else next();
      },
    };
    for (let i = 0; i < order.itemsPerFlush; i++) next();
  });
}

function median(values: number[]): number {
  return values.sort((a, b) => a - b)[values.length >> 1]!;
}

export async function run(): Promise<void> {
  console.log(`request plane, ${cpus()[0]?.model ?? "?"} x ${cpus().length}, Node ${process.version}`);
  console.log("node benchmarks/request-plane.ts");
  const child = fork(new URL(import.meta.url), ["serve"]);
  const plane = new TcpRequestPlane();
  try {
    const [{ address, barePort }] = (await once(child, "message")) as [{ address: string; barePort: number }];
    const measure = async (order: Order): Promise<Result> => {
      child.send(order);
      await once(child, "message");
      const report = once(child, "message");
      const startMs = performance.now();
      const cpu = process.cpuUsage();
      if (order.kind === "plane") await receivePlane(plane, address, order);
      else if (order.kind === "bare") await receiveBare(barePort, order);
      else await requests(plane, address, order);
      const wallMs = performance.now() - startMs;
      const receiveUs = totalCpuUs(cpu);
      if (order.kind === "requests") child.send("report");
      const [{ sendUs }] = (await report) as [{ sendUs: number }];
      return { wallMs, sendUs: sendUs / order.itemCount, receiveUs: receiveUs / order.itemCount };
    };
    /** Kinds take turns, so that a disturbance hits all of them. */
    const compare = async (orders: readonly Order[]): Promise<Result[]> => {
      const rounds: Result[][] = orders.map(() => []);
      for (const order of orders) await measure({ ...order, itemCount: order.itemCount / 4 });
      for (let round = 0; round < ROUNDS; round++) {
        for (const [i, order] of orders.entries()) rounds[i]!.push(await measure(order));
      }
      return rounds.map((results) => ({
        wallMs: median(results.map(({ wallMs }) => wallMs)),
        sendUs: median(results.map(({ sendUs }) => sendUs)),
        receiveUs: median(results.map(({ receiveUs }) => receiveUs)),
      }));
    };
    console.log("items per flush | plane: items/s, CPU us send + receive | bare socket: the same | CPU ratio");
    for (const itemsPerFlush of ITEMS_PER_FLUSH) {
      const itemCount = ITEM_COUNTS[itemsPerFlush]!;
      const [ours, bare] = await compare([
        { kind: "plane", itemsPerFlush, itemCount },
        { kind: "bare", itemsPerFlush, itemCount },
      ]);
      const show = ({ wallMs, sendUs, receiveUs }: Result): string =>
        `${Math.round(itemCount / wallMs)} k/s, ${sendUs.toFixed(2)} + ${receiveUs.toFixed(2)}`;
      const ratio = (ours!.sendUs + ours!.receiveUs) / (bare!.sendUs + bare!.receiveUs);
      console.log(`${String(itemsPerFlush).padStart(15)} | ${show(ours!)} | ${show(bare!)} | ${ratio.toFixed(2)}`);
    }
    const [request] = await compare([{ kind: "requests", itemsPerFlush: 100, itemCount: REQUEST_COUNT }]);
    console.log(
      `requests of 1 KiB, 100 at a time (open, item, end): ${Math.round(REQUEST_COUNT / request!.wallMs)} k/s, ` +
        `CPU us server ${request!.sendUs.toFixed(1)}, client ${request!.receiveUs.toFixed(1)}`,
    );
  } finally {
    await plane.close();
    child.disconnect();
    if (child.exitCode === null) await once(child, "exit");
  }
}

if (import.meta.main) await (process.argv[2] === "serve" ? serve() : run());
