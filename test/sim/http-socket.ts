import { Duplex } from "node:stream";
import type { Server } from "node:http";
import type { HttpNetwork } from "../../src/runtime/component/index.ts";
import type { TimerHandle } from "../../src/std/index.ts";
import type { SimNetwork, TcpEnd } from "./network.ts";
import type { SimProcess } from "./world.ts";

/** Gives node's own HTTP server its connections from the simulated network. */
export function httpNetwork(network: SimNetwork, process: SimProcess): HttpNetwork {
  return {
    listen(server: Server, { port }) {
      const listening = network.listen(process, port, (end) => {
        if (server.maxConnections !== 0 && connections >= (server.maxConnections ?? Infinity)) {
          end.close();
          return;
        }
        connections++;
        const socket = new SimHttpSocket(end);
        socket.on("close", () => connections--);
        server.emit("connection", socket);
      });
      let connections = 0;
      server.on("close", listening.close);
      return Promise.resolve({ port: listening.port });
    },
  };
}

/** A socket as node's HTTP server uses one. Its idle time-out runs on the process's clock. */
const live = new WeakMap<SimProcess, Set<Duplex>>();

/** Of a server in that process: those that are open. */
export function liveHttpSockets(process: SimProcess): Iterable<Pick<Duplex, "writableLength">> {
  return live.get(process) ?? [];
}

class SimHttpSocket extends Duplex {
  readonly #end: TcpEnd;
  readonly remoteAddress: string;
  timeout = 0;
  #idle: TimerHandle | undefined = undefined;
  #lastMs = 0;
  #whenSpace: (() => void) | undefined = undefined;

  constructor(end: TcpEnd) {
    super({ allowHalfOpen: true, emitClose: true });
    this.#end = end;
    const sockets = live.get(end.process) ?? new Set();
    live.set(end.process, sockets.add(this));
    this.remoteAddress = "127.0.0.1";
    end.handler = {
      onOpen: () => undefined,
      onData: (bytes) => {
        this.#moved();
        if (!this.push(bytes)) end.pauseReading();
      },
      onFin: () => this.push(null),
      onClosed: (code) => {
        if (code === undefined) this.destroy();
        else this.destroy(Object.assign(new Error(code), { code }));
      },
      onSpace: () => {
        this.#moved();
        const taken = this.#whenSpace;
        this.#whenSpace = undefined;
        taken?.();
      },
    };
  }

  override _read(): void {
    this.#end.resumeReading();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error) => void): void {
    this.#moved();
    if (this.#end.send(chunk)) done();
    else this.#whenSpace = done;
  }

  override _writev(chunks: { chunk: Buffer }[], done: (error?: Error) => void): void {
    this._write(Buffer.concat(chunks.map(({ chunk }) => chunk)), "utf8", done);
  }

  override _final(done: (error?: Error) => void): void {
    this.#end.fin();
    done();
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#idle?.cancel();
    live.get(this.#end.process)?.delete(this);
    this.#end.close();
    done(error);
  }

  destroySoon(): void {
    if (this.writable) this.end();
    if (this.writableFinished) this.destroy();
    else this.once("finish", () => this.destroy());
  }

  setTimeout(ms: number, onTimeout?: () => void): this {
    this.timeout = ms;
    if (onTimeout !== undefined) this.once("timeout", onTimeout);
    this.#idle?.cancel();
    this.#idle = undefined;
    this.#moved();
    if (ms > 0) this.#watch();
    return this;
  }

  setNoDelay(): this {
    return this;
  }

  setKeepAlive(): this {
    return this;
  }

  ref(): this {
    return this;
  }

  unref(): this {
    return this;
  }

  #moved(): void {
    this.#lastMs = this.#end.process.clock.monotonicMs();
  }

  #watch(): void {
    const { clock } = this.#end.process;
    const leftMs = this.#lastMs + this.timeout - clock.monotonicMs();
    this.#idle = clock.setTimer(Math.max(1, leftMs), () => {
      this.#idle = undefined;
      if (this.destroyed) return;
      if (clock.monotonicMs() - this.#lastMs >= this.timeout) {
        this.#moved();
        this.emit("timeout");
      }
      if (!this.destroyed && this.timeout > 0) this.#watch();
    });
  }
}
