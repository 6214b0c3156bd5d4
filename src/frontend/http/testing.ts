import { once } from "node:events";
import { connect, type Socket } from "node:net";
import type { TestContext } from "node:test";
import { Metrics, silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { DEFAULT_LIMITS } from "../config.ts";
import { HttpServer, type HttpServerOptions, type Route } from "./server.ts";

/** For the tests of the HTTP edge only: a server that ends with its test, and a client that speaks raw bytes. */
export interface TestServer {
  readonly server: HttpServer;
  readonly port: number;
  readonly metrics: Metrics;
}

export async function startServer(
  t: TestContext,
  routes: readonly Route[],
  options: Partial<Pick<HttpServerOptions, "logger" | "clock" | "stalledWriteMs">> & {
    limits?: Partial<HttpServerOptions["limits"]>;
  } = {},
): Promise<TestServer> {
  const metrics = new Metrics();
  const server = new HttpServer({
    host: "127.0.0.1",
    port: 0,
    routes,
    logger: options.logger ?? silentLogger,
    clock: options.clock ?? systemClock,
    metrics,
    ...(options.stalledWriteMs === undefined ? {} : { stalledWriteMs: options.stalledWriteMs }),
    limits: { ...DEFAULT_LIMITS, ...options.limits },
  });
  const { port } = await server.listen();
  t.after(() => server.close({ graceMs: 0 }));
  return { server, port, metrics };
}

const DEADLINE_MS = 5_000;

export interface RawAnswer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: string;
}

export class RawClient {
  readonly socket: Socket;
  /** Everything that came and was not consumed by `answer`, one character per byte. */
  received = "";
  closed = false;
  #wake: () => void = () => undefined;

  constructor(socket: Socket) {
    this.socket = socket;
    socket.on("data", (chunk: Buffer) => {
      this.received += chunk.toString("latin1");
      this.#wake();
    });
    socket.on("error", () => undefined);
    socket.on("close", () => {
      this.closed = true;
      this.#wake();
    });
  }

  static async open(t: TestContext, port: number): Promise<RawClient> {
    const socket = connect({ port, host: "127.0.0.1", noDelay: true });
    t.after(() => socket.destroy());
    await once(socket, "connect");
    return new RawClient(socket);
  }

  send(bytes: string | Buffer): this {
    this.socket.write(bytes);
    return this;
  }

  post(path: string, body: string | Buffer, headers = ""): this {
    const length = Buffer.byteLength(body);
    this.send(`POST ${path} HTTP/1.1\r\nhost: test\r\ncontent-length: ${length}\r\n${headers}\r\n`);
    return this.send(body);
  }

  get(path: string, headers = ""): this {
    return this.send(`GET ${path} HTTP/1.1\r\nhost: test\r\n${headers}\r\n`);
  }

  async until(what: string, holds: () => boolean): Promise<void> {
    const deadline = performance.now() + DEADLINE_MS;
    while (!holds()) {
      const leftMs = deadline - performance.now();
      if (leftMs <= 0 || this.closed)
        throw new Error(`${what} did not happen; received ${JSON.stringify(this.received.slice(0, 500))}`);
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, Math.min(leftMs, 50));
        this.#wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
  }

  untilClosed(): Promise<void> {
    return this.until("the end of the connection", () => this.closed);
  }

  /** Takes one complete answer off the connection. */
  async answer(): Promise<RawAnswer> {
    await this.until("an answer's head", () => this.received.includes("\r\n\r\n"));
    const headEnd = this.received.indexOf("\r\n\r\n");
    const [statusLine, ...lines] = this.received.slice(0, headEnd).split("\r\n");
    const headers: Record<string, string> = {};
    for (const line of lines) {
      const colon = line.indexOf(":");
      headers[line.slice(0, colon).toLowerCase()] = line.slice(colon + 1).trim();
    }
    this.received = this.received.slice(headEnd + 4);
    const status = Number(statusLine!.split(" ")[1]);
    return { status, headers, body: await this.#body(status, headers) };
  }

  async #body(status: number, headers: Readonly<Record<string, string>>): Promise<string> {
    if (status === 100) return "";
    if (headers["transfer-encoding"] === "chunked") return this.#chunkedBody();
    const length = headers["content-length"];
    if (length === undefined) {
      await this.untilClosed();
      return this.#take(this.received.length);
    }
    await this.until("a body", () => this.received.length >= Number(length));
    return this.#take(Number(length));
  }

  async #chunkedBody(): Promise<string> {
    let body = "";
    for (;;) {
      await this.until("a chunk size", () => this.received.includes("\r\n"));
      const lineEnd = this.received.indexOf("\r\n");
      const size = Number.parseInt(this.received.slice(0, lineEnd), 16);
      await this.until("a chunk", () => this.received.length >= lineEnd + 2 + size + 2);
      body += this.received.slice(lineEnd + 2, lineEnd + 2 + size);
      this.#take(lineEnd + 2 + size + 2);
      if (size === 0) return Buffer.from(body, "latin1").toString("utf8");
    }
  }

  #take(count: number): string {
    const taken = this.received.slice(0, count);
    this.received = this.received.slice(count);
    return Buffer.from(taken, "latin1").toString("utf8");
  }
}

/** `message`, `code` and so on of an error answer in OpenAI's shape. */
export function errorOf(answer: RawAnswer): { message: string; type: string; param: string | null; code: string } {
  return (JSON.parse(answer.body) as { error: { message: string; type: string; param: string | null; code: string } })
    .error;
}
