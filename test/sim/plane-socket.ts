import { EventEmitter } from "node:events";
import type { PlaneListener, PlaneSocket, TcpNetwork } from "../../src/runtime/request-plane/index.ts";
import type { SimNetwork, TcpEnd } from "./network.ts";
import type { SimProcess } from "./world.ts";

/** The simulated network as the TCP request plane knows networks: what `connection.ts` uses of a socket, and no more. */
export function planeNetwork(network: SimNetwork, process: SimProcess): TcpNetwork {
  return {
    connect: ({ host, port }) => asSocket(new SimPlaneSocket(network.connect(process, host, port))),
    createServer: (onSocket) => {
      const server = new SimPlaneServer(network, process, (end) => onSocket(asSocket(new SimPlaneSocket(end))));
      return server as unknown as PlaneListener;
    },
  };
}

function asSocket(socket: SimPlaneSocket): PlaneSocket {
  return socket as unknown as PlaneSocket;
}

const live = new WeakMap<SimProcess, Set<SimPlaneSocket>>();

/** Of that process: those that are open. */
export function livePlaneSockets(process: SimProcess): Iterable<{ readonly writableLength: number }> {
  return live.get(process) ?? [];
}

class SimPlaneSocket extends EventEmitter {
  readonly #end: TcpEnd;
  readonly #queue: { readonly bytes: Uint8Array; readonly written: (() => void) | undefined }[] = [];
  writableLength = 0;
  #isEnding = false;
  #isDestroyed = false;

  constructor(end: TcpEnd) {
    super();
    this.#end = end;
    const sockets = live.get(end.process) ?? new Set();
    live.set(end.process, sockets.add(this));
    end.handler = {
      onOpen: () => this.#flush(),
      onData: (bytes) => this.emit("data", bytes),
      onFin: () => {
        this.emit("end");
        // As node's sockets do that are not half-open.
        if (!this.#isDestroyed) this.end();
      },
      onClosed: (code) => {
        sockets.delete(this);
        if (code !== undefined) this.emit("error", Object.assign(new Error(code), { code }));
        this.emit("close");
      },
      onSpace: () => this.#flush(),
    };
  }

  get remoteAddress(): string {
    return this.#end.remoteHost;
  }

  get remotePort(): number {
    return 0;
  }

  setNoDelay(): this {
    return this;
  }

  write(bytes: Uint8Array, written?: () => void): boolean {
    if (this.#isDestroyed || this.#isEnding) return false;
    this.writableLength += bytes.length;
    this.#queue.push({ bytes, written });
    this.#flush();
    return this.writableLength === 0;
  }

  end(): this {
    this.#isEnding = true;
    this.#flush();
    return this;
  }

  destroy(): this {
    if (this.#isDestroyed) return this;
    this.#isDestroyed = true;
    live.get(this.#end.process)?.delete(this);
    this.#queue.length = 0;
    this.#end.close();
    return this;
  }

  #flush(): void {
    if (!this.#end.isOpen) return;
    while (this.#queue.length > 0 && this.#end.hasSpace) {
      const { bytes, written } = this.#queue.shift()!;
      this.#end.send(bytes);
      this.writableLength -= bytes.length;
      if (written !== undefined) this.#end.process.enqueue(written);
    }
    if (this.#queue.length === 0 && this.#isEnding) this.#end.fin();
  }
}

class SimPlaneServer extends EventEmitter {
  maxConnections = Infinity;
  readonly #network: SimNetwork;
  readonly #process: SimProcess;
  readonly #onEnd: (end: TcpEnd) => void;
  #listening: { readonly port: number; readonly close: () => void } | undefined = undefined;

  constructor(network: SimNetwork, process: SimProcess, onEnd: (end: TcpEnd) => void) {
    super();
    this.#network = network;
    this.#process = process;
    this.#onEnd = onEnd;
  }

  listen(port: number, _host: string, listening: () => void): this {
    this.#listening = this.#network.listen(this.#process, port, this.#onEnd);
    this.#process.enqueue(listening);
    return this;
  }

  address(): { address: string; port: number; family: string } {
    return { address: this.#process.name.split("#")[0]!, port: this.#listening!.port, family: "IPv4" };
  }

  close(closed: () => void): this {
    this.#listening?.close();
    this.#process.enqueue(closed);
    return this;
  }
}
