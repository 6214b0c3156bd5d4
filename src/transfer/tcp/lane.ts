import { connect, type Socket } from "node:net";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import { newNonce, provesSecret, secretProof, type TimerHandle } from "../../std/index.ts";
import type { AgentContext } from "../backend.ts";
import {
  MAX_TEXT_BYTES,
  PROOF_LABEL,
  RESPONSE,
  RESPONSE_HEADER_BYTES,
  decodeError,
  decodeServerHello,
  decoding,
  encodeHello,
  malformed,
} from "./wire.ts";

/**
 * One connection that this side dialled: sends requests, takes responses. What follows a DATA header is read from the
 * socket straight into registered memory: Node asks for the next buffer before each read (`onread` of node:net), and gets
 * the header's 16 bytes, the text's, or a piece of the destination. No byte of a payload is copied in this process.
 *
 *     connecting ──hello, proof, welcome──> ready ──error, end, close()──> closed: onLaneClosed once
 */
export interface PayloadSink {
  /** Where the next bytes go; at most what is still due of this response. */
  nextBuffer(): Buffer;
  onBytes(byteCount: number): void;
}

export interface LaneOwner {
  onLaneReady(lane: Lane): void;
  /** A response; its payload, if any, goes to the sink it returns, `onPayloadEnd` follows. May throw. */
  onResponse(lane: Lane, type: number, id: number, text: Buffer, payloadBytes: number): PayloadSink | undefined;
  onPayloadEnd(lane: Lane): void;
  /** Exactly once, never within a call of the owner's, unless the owner called `close`. */
  onLaneClosed(lane: Lane, error: DynamoError): void;
}

/** Where a peer listens. */
export type DialAddress = { readonly host: string; readonly port: number } | { readonly path: string };

export interface LaneOptions {
  readonly context: AgentContext;
  readonly owner: LaneOwner;
  readonly address: DialAddress;
  readonly peerIncarnation: bigint;
  /** Our own listening port, told to the peer. */
  readonly ownPort: number;
  readonly connectTimeoutMs: number;
}

export class Lane {
  ready = false;
  closed = false;
  readonly #owner: LaneOwner;
  readonly #context: AgentContext;
  readonly #peerIncarnation: bigint;
  readonly #ownPort: number;
  readonly #socket: Socket;
  readonly #timeout: TimerHandle;
  readonly #header = Buffer.allocUnsafeSlow(RESPONSE_HEADER_BYTES);
  #headerBytes = 0;
  #text: Buffer | undefined = undefined;
  #textBytes = 0;
  #payloadLeft = 0;
  #sink: PayloadSink | undefined = undefined;
  #nonces: { readonly serverNonce: Buffer; readonly clientNonce: Buffer } | undefined = undefined;

  constructor({ context, owner, address, peerIncarnation, ownPort, connectTimeoutMs }: LaneOptions) {
    this.#owner = owner;
    this.#context = context;
    this.#peerIncarnation = peerIncarnation;
    this.#ownPort = ownPort;
    const onread = {
      buffer: (): Uint8Array => this.#nextBuffer(),
      callback: (byteCount: number): boolean => {
        this.#onRead(byteCount);
        return true;
      },
    };
    // The types know fixed buffers only; a function has been documented since Node 13.
    this.#socket = connect({ ...address, noDelay: true, keepAlive: true, onread: onread as never });
    this.#socket.on("error", (error) => this.#fail(peerLost(error)));
    this.#socket.on("close", () => this.#fail(peerLost()));
    this.#timeout = context.clock.setTimer(connectTimeoutMs, () => {
      this.#fail(new DynamoError("connect-timeout", "the peer of a transfer did not answer in time"));
    });
  }

  send(frame: Buffer): void {
    this.#socket.write(frame);
  }

  /** Ends it; the owner is not called. No byte is read into anybody's memory from here on. */
  close(): void {
    this.closed = true;
    this.#timeout.cancel();
    this.#sink = undefined;
    this.#socket.destroy();
  }

  #fail(error: DynamoError): void {
    if (this.closed) return;
    this.close();
    setImmediate(() => this.#owner.onLaneClosed(this, error));
  }

  #nextBuffer(): Uint8Array {
    if (this.#sink !== undefined) return this.#sink.nextBuffer();
    if (this.#text !== undefined) return this.#text.subarray(this.#textBytes);
    return this.#header.subarray(this.#headerBytes);
  }

  #onRead(byteCount: number): void {
    if (this.closed) return;
    try {
      if (this.#sink !== undefined) this.#onPayload(this.#sink, byteCount);
      else if (this.#text !== undefined) this.#onText(this.#text, byteCount);
      else this.#onHeader(byteCount);
    } catch (thrown) {
      this.#fail(toDynamoError(thrown));
    }
  }

  #onPayload(sink: PayloadSink, byteCount: number): void {
    this.#payloadLeft -= byteCount;
    sink.onBytes(byteCount);
    if (this.#payloadLeft > 0) return;
    this.#sink = undefined;
    this.#owner.onPayloadEnd(this);
  }

  #onHeader(byteCount: number): void {
    this.#headerBytes += byteCount;
    if (this.#headerBytes < RESPONSE_HEADER_BYTES) return;
    this.#headerBytes = 0;
    const textBytes = this.#header.readUInt16LE(2);
    if (textBytes > MAX_TEXT_BYTES) throw malformed(`a text of ${textBytes} bytes`);
    if (textBytes === 0) this.#onWhole(NO_TEXT);
    else {
      this.#text = Buffer.allocUnsafe(textBytes);
      this.#textBytes = 0;
    }
  }

  #onText(text: Buffer, byteCount: number): void {
    this.#textBytes += byteCount;
    if (this.#textBytes < text.length) return;
    this.#text = undefined;
    this.#onWhole(text);
  }

  #onWhole(text: Buffer): void {
    const type = this.#header[0]!;
    const id = this.#header.readUInt32LE(4);
    const payloadBytes = this.#header.readDoubleLE(8);
    if (!this.ready) {
      this.#onHandshake(type, text);
      return;
    }
    const sink = this.#owner.onResponse(this, type, id, text, payloadBytes);
    if (payloadBytes === 0 || this.closed) return;
    if (sink === undefined) throw malformed(`${payloadBytes} bytes that nobody asked for`);
    this.#sink = sink;
    this.#payloadLeft = payloadBytes;
  }

  #onHandshake(type: number, text: Buffer): void {
    const { clusterSecret: secret, name, incarnation } = this.#context;
    if (type === RESPONSE.error) throw decodeError(text);
    if (this.#nonces === undefined) {
      if (type !== RESPONSE.hello) throw malformed(`response ${type} in place of a hello`);
      const nonces = { serverNonce: decoding(() => decodeServerHello(text)), clientNonce: newNonce() };
      this.#nonces = nonces;
      const proof = secretProof(PROOF_LABEL, secret, { role: "client", ...nonces });
      const hello = { serverIncarnation: this.#peerIncarnation, incarnation, port: this.#ownPort, name };
      this.send(encodeHello({ ...hello, nonce: nonces.clientNonce, proof }));
      return;
    }
    if (type !== RESPONSE.welcome) throw malformed(`response ${type} in place of a welcome`);
    if (!provesSecret(PROOF_LABEL, secret, text, { role: "server", ...this.#nonces })) {
      throw new DynamoError("protocol-version", "the peer of a transfer has another cluster secret");
    }
    this.#timeout.cancel();
    this.ready = true;
    this.#owner.onLaneReady(this);
  }
}

const NO_TEXT = Buffer.alloc(0);

function peerLost(cause?: Error): DynamoError {
  const diagnostic = cause?.message ?? "the connection was closed";
  return new DynamoError("transfer-peer-lost", "the connection to the peer of a transfer broke", { diagnostic });
}
