import type { SimProcess, World } from "./world.ts";

/**
 * A TCP network between simulated processes. A connection has two directions; each keeps its bytes in order and whole, as
 * TCP does, and takes time: latency, jitter, and bandwidth where a link is slow. What a fault does is what a kernel does:
 *
 *     partition     packets wait (TCP sends them again) and arrive after it is healed; new connections hang
 *     reset         both ends get ECONNRESET
 *     killed        the kernel of the dead process closes its connections: the others get their end
 *     lost power    nothing closes anything: the others hear nothing until they send to the restarted host, which resets
 *     frozen        the kernel still takes bytes, up to the window; then senders wait
 */
const LATENCY_MS = 0.2;
const JITTER_MS = 0.6;
/** Bytes on the way or unread, above which a sender's kernel takes no more; small, as the answers of a run are. */
const WINDOW_BYTES = 8 * 1024;
const SYN_TIMEOUT_MS = 60_000;
/** Share of the packets that arrive in two pieces. */
const SPLIT_SHARE = 0.02;

interface Listener {
  readonly process: SimProcess;
  readonly onConnection: (end: TcpEnd) => void;
}

export interface LinkFault {
  /** Packets from a to b wait. */
  readonly blocked: boolean;
  /** Bytes a millisecond; Infinity = no limit. */
  readonly bytesPerMs: number;
  readonly extraLatencyMs: number;
}

const HEALTHY: LinkFault = { blocked: false, bytesPerMs: Infinity, extraLatencyMs: 0 };

export class SimNetwork {
  readonly world: World;
  readonly #listeners = new Map<string, Listener>();
  /** By `from>to`. */
  readonly #faults = new Map<string, LinkFault>();
  readonly ends = new Set<TcpEnd>();
  readonly #waiting: { readonly from: string; readonly to: string; readonly retry: () => void }[] = [];
  #nextPort = 1_000;
  #connections = 0;
  readonly #random;

  constructor(world: World) {
    this.world = world;
    this.#random = world.fork();
  }

  /** Hosts are names of processes without their incarnation. */
  static hostOf(process: SimProcess): string {
    return process.name.split("#")[0]!;
  }

  listen(
    process: SimProcess,
    wanted: number,
    onConnection: (end: TcpEnd) => void,
  ): { port: number; close: () => void } {
    const port = wanted === 0 ? this.#nextPort++ : wanted;
    const key = `${SimNetwork.hostOf(process)}:${port}`;
    const known = this.#listeners.get(key);
    if (known !== undefined && known.process.state !== "dead") throw new Error(`EADDRINUSE ${key}`);
    const listener = { process, onConnection };
    this.#listeners.set(key, listener);
    return {
      port,
      close: () => {
        if (this.#listeners.get(key) === listener) this.#listeners.delete(key);
      },
    };
  }

  connect(process: SimProcess, host: string, port: number): TcpEnd {
    const id = ++this.#connections;
    const from = SimNetwork.hostOf(process);
    const end = new TcpEnd(this, process, from, host, `${id}c`);
    this.ends.add(end);
    const timeout = this.world.timer(SYN_TIMEOUT_MS, () => end.failed("ETIMEDOUT"));
    const syn = (): void => {
      const listener = this.#listeners.get(`${host}:${port}`);
      if (end.isClosed) {
        timeout.cancel();
      } else if (listener === undefined || listener.process.state === "dead") {
        this.#pass(host, from, () => {
          timeout.cancel();
          this.world.marks.mark("connection refused");
          end.failed("ECONNREFUSED");
        });
      } else {
        const other = new TcpEnd(this, listener.process, host, from, `${id}s`);
        this.ends.add(other);
        end.join(other);
        other.join(end);
        listener.process.enqueue(() => {
          other.opened();
          listener.onConnection(other);
        });
        this.#pass(host, from, () => {
          timeout.cancel();
          end.opened();
        });
      }
    };
    this.#pass(from, host, syn);
    return end;
  }

  fault(from: string, to: string): LinkFault {
    return this.#faults.size === 0 ? HEALTHY : (this.#faults.get(`${from}>${to}`) ?? HEALTHY);
  }

  setFault(from: string, to: string, fault: LinkFault | undefined): void {
    if (fault === undefined) this.#faults.delete(`${from}>${to}`);
    else this.#faults.set(`${from}>${to}`, fault);
    this.#retry();
  }

  healAll(): void {
    this.#faults.clear();
    this.#retry();
  }

  /** The connections of a process that is being killed: its kernel closes them, unless the whole host is gone. */
  closeAllOf(process: SimProcess, isSilent: boolean): void {
    for (const end of this.ends) {
      if (end.process !== process) continue;
      if (isSilent) end.vanish();
      else end.close();
    }
    for (const [key, listener] of this.#listeners) if (listener.process === process) this.#listeners.delete(key);
  }

  latency(from: string, to: string): number {
    return LATENCY_MS + this.#random.nextFloat() * JITTER_MS + this.fault(from, to).extraLatencyMs;
  }

  splits(): boolean {
    return this.#random.nextFloat() < SPLIT_SHARE;
  }

  splitAt(length: number): number {
    return 1 + (this.#random.nextU32() % (length - 1));
  }

  /** Calls back when the link lets packets through again. */
  whenOpen(from: string, to: string, retry: () => void): void {
    this.#waiting.push({ from, to, retry });
  }

  #pass(from: string, to: string, arrive: () => void): void {
    this.world.timer(this.latency(from, to), () => {
      if (this.fault(from, to).blocked) this.whenOpen(from, to, () => this.#pass(from, to, arrive));
      else arrive();
    });
  }

  #retry(): void {
    const waiting = this.#waiting.splice(0);
    for (const entry of waiting) {
      if (this.fault(entry.from, entry.to).blocked) this.#waiting.push(entry);
      else entry.retry();
    }
  }
}

export interface EndHandler {
  onOpen(): void;
  /** The bytes belong to the handler. */
  onData(bytes: Buffer): void;
  /** The other side sends nothing more. */
  onFin(): void;
  /** The connection is over; without a code it was closed here. Exactly once. */
  onClosed(code: string | undefined): void;
  /** The kernel takes more again. */
  onSpace(): void;
}

type Packet = { readonly kind: "data"; readonly bytes: Buffer } | { readonly kind: "fin" | "reset" };

/** One end of a connection, kernel and all. */
export class TcpEnd {
  readonly process: SimProcess;
  readonly name: string;
  handler: EndHandler | undefined = undefined;
  isOpen = false;
  /** Nothing more will be told to the handler. */
  isClosed = false;
  readonly #network: SimNetwork;
  readonly #here: string;
  readonly #there: string;
  #other: TcpEnd | undefined = undefined;
  #isGone = false;
  /** Sent by us and not yet read by the other process. */
  #inFlightBytes = 0;
  #wantsSpace = false;
  #sentFin = false;
  // Towards us.
  readonly #arriving: { readonly packet: Packet; readonly atMs: number }[] = [];
  #isTimed = false;
  #lastArrivalMs = 0;
  readonly #received: Packet[] = [];
  #isReading = true;
  #isScheduled = false;

  constructor(network: SimNetwork, process: SimProcess, here: string, there: string, name: string) {
    this.#network = network;
    this.process = process;
    this.#here = here;
    this.#there = there;
    this.name = name;
  }

  get remoteHost(): string {
    return this.#there;
  }

  join(other: TcpEnd): void {
    this.#other = other;
  }

  opened(): void {
    if (this.isClosed) return;
    this.isOpen = true;
    this.process.enqueue(() => {
      if (!this.isClosed) this.handler?.onOpen();
    });
    this.#wake();
  }

  /** Hands bytes to the kernel, which copies them. False: no more until `onSpace`. */
  send(bytes: Uint8Array): boolean {
    if (this.isClosed || this.#sentFin) return true;
    this.#inFlightBytes += bytes.length;
    this.#transmit({ kind: "data", bytes: Buffer.from(bytes) });
    if (this.#inFlightBytes < WINDOW_BYTES) return true;
    this.#wantsSpace = true;
    return false;
  }

  get hasSpace(): boolean {
    return this.#inFlightBytes < WINDOW_BYTES;
  }

  /** No more from us. */
  fin(): void {
    if (this.isClosed || this.#sentFin) return;
    this.#sentFin = true;
    this.#transmit({ kind: "fin" });
  }

  pauseReading(): void {
    this.#isReading = false;
  }

  resumeReading(): void {
    if (this.#isReading) return;
    this.#isReading = true;
    this.#wake();
  }

  /** Closes this end: what was sent still arrives, then the end. */
  close(): void {
    if (this.isClosed) return;
    this.fin();
    this.#end(undefined);
  }

  reset(): void {
    const other = this.#other;
    this.#network.world.marks.mark("connection reset");
    other?.failed("ECONNRESET");
    this.failed("ECONNRESET");
  }

  failed(code: string): void {
    if (!this.isClosed) this.#end(code);
  }

  /** The host is gone: it neither says nor answers anything. */
  vanish(): void {
    this.isClosed = true;
    this.#isGone = true;
    this.#forget();
  }

  /** @internal Of the other end: the packet is on its way to us. */
  receive(packet: Packet): void {
    const { world } = this.#network;
    const { bytesPerMs } = this.#network.fault(this.#there, this.#here);
    const sendMs = packet.kind === "data" && bytesPerMs !== Infinity ? packet.bytes.length / bytesPerMs : 0;
    const atMs = Math.max(this.#lastArrivalMs, world.nowMs + this.#network.latency(this.#there, this.#here)) + sendMs;
    this.#lastArrivalMs = atMs;
    this.#arriving.push({ packet, atMs });
    this.#awaitArrival();
  }

  /** @internal Of the other end: it read that much of ours. */
  taken(byteCount: number): void {
    this.#inFlightBytes -= byteCount;
    if (!this.#wantsSpace || this.#inFlightBytes >= WINDOW_BYTES / 2) return;
    this.#wantsSpace = false;
    this.process.enqueue(() => {
      if (!this.isClosed) this.handler?.onSpace();
    });
  }

  #transmit(packet: Packet): void {
    const other = this.#other;
    if (other === undefined) return;
    if (packet.kind === "data" && packet.bytes.length > 1 && this.#network.splits()) {
      this.#network.world.marks.mark("packet split");
      const at = this.#network.splitAt(packet.bytes.length);
      other.receive({ kind: "data", bytes: packet.bytes.subarray(0, at) });
      other.receive({ kind: "data", bytes: packet.bytes.subarray(at) });
    } else other.receive(packet);
  }

  #awaitArrival(): void {
    const next = this.#arriving[0];
    if (this.#isTimed || next === undefined) return;
    this.#isTimed = true;
    const { world } = this.#network;
    world.timer(Math.max(0, next.atMs - world.nowMs), () => this.#arrive());
  }

  #arrive(): void {
    if (this.#network.fault(this.#there, this.#here).blocked) {
      this.#network.whenOpen(this.#there, this.#here, () => {
        this.#isTimed = false;
        this.#awaitArrival();
      });
      return;
    }
    this.#isTimed = false;
    const { packet } = this.#arriving.shift()!;
    this.#awaitArrival();
    if (this.#isGone) {
      // Nobody is there. Once the host is up again its kernel answers what it does not know.
      if (packet.kind === "data") this.#network.world.timer(5_000, () => this.#other?.failed("ECONNRESET"));
      return;
    }
    if (packet.kind === "reset") {
      this.failed("ECONNRESET");
    } else if (this.isClosed) {
      if (packet.kind === "data") this.#other?.receive({ kind: "reset" });
    } else {
      this.#received.push(packet);
      if (this.#isScheduled || !this.isOpen || !this.#isReading) return;
      this.#isScheduled = true;
      this.process.interrupt(() => this.#read());
    }
  }

  #wake(): void {
    if (this.#isScheduled || !this.isOpen || !this.#isReading || this.#received.length === 0) return;
    this.#isScheduled = true;
    this.process.enqueue(() => this.#read());
  }

  #read(): void {
    this.#isScheduled = false;
    const { handler } = this;
    if (handler === undefined) return;
    while (this.#isReading && !this.isClosed) {
      const packet = this.#received.shift();
      if (packet === undefined) return;
      if (packet.kind === "fin") handler.onFin();
      else if (packet.kind === "data") {
        this.#other?.taken(packet.bytes.length);
        handler.onData(packet.bytes);
      }
    }
  }

  #end(code: string | undefined): void {
    this.isClosed = true;
    this.#forget();
    this.process.enqueue(() => this.handler?.onClosed(code));
  }

  #forget(): void {
    this.#network.ends.delete(this);
    let bytes = 0;
    for (const packet of this.#received) if (packet.kind === "data") bytes += packet.bytes.length;
    this.#received.length = 0;
    if (bytes > 0) this.#other?.taken(bytes);
  }
}
