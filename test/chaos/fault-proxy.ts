import { connect, createServer, type Server, type Socket } from "node:net";

/**
 * A TCP proxy between a frontend and a worker that can break what goes through it: reset all connections, hold all bytes
 * (a half-open network: nobody is told anything), refuse new connections. Bytes pass with back-pressure, unchanged.
 */
export class FaultProxy {
  readonly port: number;
  readonly #server: Server;
  readonly #pairs = new Set<Pair>();
  #target: number;
  #isHolding = false;
  #isRefusing = false;
  /** Connections made through it since the start. */
  connectionCount = 0;

  private constructor(server: Server, target: number) {
    this.#server = server;
    this.#target = target;
    const address = server.address();
    if (address === null || typeof address === "string") throw new Error("the proxy has no port");
    this.port = address.port;
    server.on("connection", (socket) => this.#onConnection(socket));
  }

  /** On a free port of the loopback interface, to `targetPort` there. */
  static async listen(targetPort = 0): Promise<FaultProxy> {
    const server = createServer({ noDelay: true, allowHalfOpen: true });
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    server.once("error", reject).listen(0, "127.0.0.1", resolve);
    await promise;
    return new FaultProxy(server, targetPort);
  }

  set target(port: number) {
    this.#target = port;
  }

  get openCount(): number {
    return this.#pairs.size;
  }

  /** RST to both sides of every connection; returns how many there were. */
  reset(): number {
    const count = this.#pairs.size;
    for (const pair of this.#pairs) pair.reset();
    return count;
  }

  hold(): void {
    this.#isHolding = true;
    for (const pair of this.#pairs) pair.hold();
  }

  release(): void {
    this.#isHolding = false;
    for (const pair of this.#pairs) pair.release();
  }

  refuse(isRefusing: boolean): void {
    this.#isRefusing = isRefusing;
    if (isRefusing) this.reset();
  }

  async close(): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#server.close(() => resolve());
    this.reset();
    await promise;
  }

  #onConnection(near: Socket): void {
    if (this.#isRefusing) {
      near.resetAndDestroy();
      return;
    }
    this.connectionCount++;
    const far = connect({ port: this.#target, host: "127.0.0.1", noDelay: true, allowHalfOpen: true });
    const pair = new Pair(near, far, () => this.#pairs.delete(pair));
    this.#pairs.add(pair);
    if (this.#isHolding) pair.hold();
  }
}

class Pair {
  readonly #near: Socket;
  readonly #far: Socket;
  #isHeld = false;

  constructor(near: Socket, far: Socket, onGone: () => void) {
    this.#near = near;
    this.#far = far;
    this.#forward(near, far, onGone);
    this.#forward(far, near, onGone);
  }

  reset(): void {
    this.#near.resetAndDestroy();
    this.#far.resetAndDestroy();
  }

  hold(): void {
    this.#isHeld = true;
    this.#near.pause();
    this.#far.pause();
  }

  release(): void {
    this.#isHeld = false;
    this.#near.resume();
    this.#far.resume();
  }

  #forward(from: Socket, to: Socket, onGone: () => void): void {
    from.on("data", (bytes: Buffer) => {
      if (!to.write(bytes)) from.pause();
    });
    to.on("drain", () => {
      if (!this.#isHeld) from.resume();
    });
    // What one side does, the other sees: an orderly end as an end, anything else as a reset.
    from.on("end", () => to.end());
    from.on("error", () => to.resetAndDestroy());
    from.on("close", () => {
      to.end();
      // A held socket reads no end of its other side either: it stays here until it is reset.
      if (to.destroyed) onGone();
    });
  }
}
