import type { SimNetwork, TcpEnd } from "./network.ts";
import type { SimProcess } from "./world.ts";

/**
 * A client of one HTTP request on a connection of its own: writes bytes, reads the answer as far as it comes, knows how
 * it ended. Whoever owns it may read slowly or leave.
 */
export interface HttpAnswer {
  readonly status: number;
  readonly headers: ReadonlyMap<string, string>;
  readonly body: string;
  /** The body came whole, as its framing says. */
  readonly isWhole: boolean;
}

export class HttpCall {
  status = 0;
  headers = new Map<string, string>();
  body = "";
  isWhole = false;
  isOver = false;
  /** ECONNRESET and the like, or "closed"; undefined while it goes on and after a whole answer. */
  broken: string | undefined = undefined;
  readonly end: TcpEnd;
  readonly #request: readonly Uint8Array[];
  readonly #onProgress: () => void;
  readonly #onOver: () => void;
  #text = "";
  #hasHead = false;
  #chunkLeft = -1;
  #bodyLeft = -1;
  #next = 0;

  constructor(
    network: SimNetwork,
    process: SimProcess,
    target: { readonly host: string; readonly port: number },
    request: readonly Uint8Array[],
    hooks: { readonly onProgress: () => void; readonly onOver: () => void },
  ) {
    this.#request = request;
    this.#onProgress = hooks.onProgress;
    this.#onOver = hooks.onOver;
    this.end = network.connect(process, target.host, target.port);
    this.end.handler = {
      onOpen: () => this.#send(),
      onData: (bytes) => this.#onData(bytes),
      onFin: () => this.#over("closed"),
      onClosed: (code) => this.#over(code ?? "closed"),
      onSpace: () => this.#send(),
    };
  }

  /** Goes away without a word. */
  leave(): void {
    this.isOver = true;
    this.end.close();
  }

  #send(): void {
    while (this.#next < this.#request.length && this.end.hasSpace) this.end.send(this.#request[this.#next++]!);
  }

  #onData(bytes: Buffer): void {
    if (this.isOver) return;
    this.#text += bytes.toString("latin1");
    if (!this.#hasHead && !this.#readHead()) return;
    this.#readBody();
    if (this.isWhole) this.#over(undefined);
    else this.#onProgress();
  }

  #readHead(): boolean {
    for (;;) {
      const end = this.#text.indexOf("\r\n\r\n");
      if (end < 0) return false;
      const [first = "", ...lines] = this.#text.slice(0, end).split("\r\n");
      this.#text = this.#text.slice(end + 4);
      this.status = Number(/^HTTP\/1\.1 (\d{3})/.exec(first)?.[1] ?? 0);
      // 100 Continue: the answer proper follows.
      if (this.status === 100) continue;
      for (const line of lines) {
        const at = line.indexOf(":");
        this.headers.set(line.slice(0, at).toLowerCase(), line.slice(at + 1).trim());
      }
      this.#hasHead = true;
      const length = this.headers.get("content-length");
      if (length !== undefined) this.#bodyLeft = Number(length);
      return true;
    }
  }

  #readBody(): void {
    if (this.#bodyLeft >= 0) {
      this.body += this.#text;
      this.#bodyLeft -= this.#text.length;
      this.#text = "";
      this.isWhole = this.#bodyLeft <= 0;
      return;
    }
    for (;;) {
      if (this.#chunkLeft < 0) {
        const end = this.#text.indexOf("\r\n");
        if (end < 0) return;
        this.#chunkLeft = Number.parseInt(this.#text.slice(0, end), 16);
        this.#text = this.#text.slice(end + 2);
      }
      if (this.#text.length < this.#chunkLeft + 2) return;
      if (this.#chunkLeft === 0) {
        this.isWhole = true;
        return;
      }
      this.body += this.#text.slice(0, this.#chunkLeft);
      this.#text = this.#text.slice(this.#chunkLeft + 2);
      this.#chunkLeft = -1;
    }
  }

  #over(code: string | undefined): void {
    if (this.isOver) return;
    this.isOver = true;
    if (code !== undefined) this.broken = code;
    this.end.close();
    this.#onOver();
  }
}
