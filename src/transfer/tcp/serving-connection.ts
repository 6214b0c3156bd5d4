import type { Socket } from "node:net";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import { newNonce, provesSecret, secretProof, type ByteReader, type TimerHandle } from "../../std/index.ts";
import type { AgentContext } from "../backend.ts";
import { MAX_MESSAGE_BYTES } from "../limits.ts";
import type { Region } from "../region.ts";
import {
  MAX_DATA_BYTES,
  MAX_REQUEST_BYTES,
  PROOF_LABEL,
  REQUEST,
  RESPONSE,
  RequestDecoder,
  decodeDescriptors,
  decodeHello,
  decodePull,
  decoding,
  encodeError,
  encodeResponse,
  encodeServerHello,
  malformed,
  type PullRequest,
} from "./wire.ts";

/**
 * One connection that a peer dialled: answers its requests. Bytes leave from registered memory with one `writev` per
 * request, without a copy in this process. Every descriptor is checked against the registrations at the time it is asked
 * for. A peer that breaks the protocol loses the connection.
 */
export interface ServingOwner {
  /** The pieces of a running write's source, for `[start, start + byteCount)`. Throws when that peer has no such grant. */
  resolveGrant(grant: bigint, peerIncarnation: bigint, start: number, byteCount: number): Piece[];
  /** Starts fetching for a write of the peer's. Answers through `connection.answer`. Throws what it refuses. */
  onPull(connection: ServingConnection, pull: PullRequest): void;
  onCancel(connection: ServingConnection, id: number): void;
  onServingClosed(connection: ServingConnection): void;
}

export interface Piece {
  readonly region: Region;
  readonly offset: number;
  readonly byteCount: number;
}

/** Bytes a connection may have asked for and not taken. A dialler of ours asks for a window of 8 MiB. */
const MAX_UNSENT_BYTES = 64 * 1024 * 1024;
/** No byte taken for so long while some are due. */
const SEND_STALL_MS = 30_000;

export class ServingConnection {
  peerName = "";
  peerIncarnation = 0n;
  /** Where the peer listens for our fetches, on the address it dialled from; 0: nowhere. */
  peerPort = 0;
  readonly remoteAddress: string;
  readonly #socket: Socket;
  readonly #context: AgentContext;
  readonly #owner: ServingOwner;
  readonly #serverNonce = newNonce();
  readonly #decoder = new RequestDecoder();
  readonly #timeout: TimerHandle;
  #ready = false;
  #closed = false;
  #unsentBytes = 0;

  constructor(socket: Socket, context: AgentContext, owner: ServingOwner, handshakeTimeoutMs: number) {
    this.#socket = socket;
    this.#context = context;
    this.#owner = owner;
    this.remoteAddress = socket.remoteAddress ?? "";
    this.#timeout = context.clock.setTimer(handshakeTimeoutMs, () => this.close());
    socket.on("error", () => this.close());
    socket.on("close", () => this.close());
    socket.on("data", (chunk: Buffer) => this.#onData(chunk));
    // A peer that asked and stopped taking would pin our memory for good.
    socket.setTimeout(SEND_STALL_MS, () => {
      if (this.#unsentBytes > 0) this.close();
    });
    socket.write(encodeServerHello(this.#serverNonce));
  }

  /** DONE or ERROR for a request. */
  answer(id: number, error?: DynamoError): void {
    if (this.#closed) return;
    this.#socket.write(error === undefined ? encodeResponse(RESPONSE.done, id) : encodeError(id, error));
  }

  close(): void {
    this.#socket.destroy();
    this.#end();
  }

  /** Tells the peer why, in answer to no request, and closes. */
  #refuse(error: DynamoError): void {
    if (this.#closed) return;
    // Behind bytes that the peer does not take, the reason would never leave.
    if (this.#unsentBytes > 0) this.#socket.destroy();
    else {
      this.#socket.write(encodeError(0, error));
      this.#socket.destroySoon();
    }
    this.#end();
  }

  #end(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#timeout.cancel();
    this.#owner.onServingClosed(this);
  }

  #onData(chunk: Buffer): void {
    if (this.#closed) return;
    try {
      decoding(() => this.#decoder.feed(chunk, (type, body) => this.#onRequest(type, body)));
    } catch (thrown) {
      const error = toDynamoError(thrown);
      this.#context.logger.warn(
        { peer: this.peerName, why: error.diagnostic ?? error.message },
        "transfers: a connection was refused",
      );
      this.#refuse(error);
    }
  }

  #onRequest(type: number, body: ByteReader): void {
    if (this.#closed) return;
    if (!this.#ready) {
      if (type !== REQUEST.hello) throw malformed(`request ${type} in place of a hello`);
      this.#onHello(body);
      return;
    }
    switch (type) {
      case REQUEST.read: {
        const id = body.u32();
        return this.#serve(id, () => this.#resolveRead(body));
      }
      case REQUEST.fetch: {
        const id = body.u32();
        const grant = body.u64();
        const start = body.f64();
        const byteCount = body.u32();
        return this.#serve(id, () => this.#owner.resolveGrant(grant, this.peerIncarnation, start, byteCount));
      }
      case REQUEST.pull: {
        const pull = decodePull(body);
        return this.#attempt(pull.id, () => this.#owner.onPull(this, pull));
      }
      case REQUEST.notify: {
        const id = body.u32();
        if (body.remaining > MAX_MESSAGE_BYTES) throw malformed("a message over the limit");
        const message = Buffer.from(body.bytes(body.remaining));
        return this.#attempt(id, () => {
          this.#context.deliver(this.peerName, message);
          this.answer(id);
        });
      }
      case REQUEST.cancel:
        return this.#owner.onCancel(this, body.u32());
      default:
        throw malformed(`unknown request ${type}`);
    }
  }

  #onHello(body: ByteReader): void {
    const hello = decodeHello(body);
    const { clusterSecret: secret, incarnation } = this.#context;
    const nonces = { serverNonce: this.#serverNonce, clientNonce: hello.nonce };
    if (!provesSecret(PROOF_LABEL, secret, hello.proof, { role: "client", ...nonces })) {
      throw new DynamoError("protocol-version", "the cluster secret differs");
    }
    if (hello.serverIncarnation !== incarnation) {
      throw new DynamoError("transfer-stale", "the agent that was asked for is gone, another one listens here");
    }
    this.peerName = hello.name;
    this.peerIncarnation = hello.incarnation;
    this.peerPort = hello.port;
    this.#decoder.maxBytes = MAX_REQUEST_BYTES;
    this.#timeout.cancel();
    this.#ready = true;
    const proof = secretProof(PROOF_LABEL, secret, { role: "server", ...nonces });
    this.#socket.write(encodeResponse(RESPONSE.welcome, 0, 0, proof));
  }

  /** What a peer asked for and may not have is an answer, not the end of the connection; a malformed frame is the end. */
  #attempt(id: number, run: () => void): void {
    try {
      run();
    } catch (thrown) {
      const error = toDynamoError(thrown);
      if (error.reason === "malformed-frame") throw error;
      this.answer(id, error);
    }
  }

  #resolveRead(body: ByteReader): Piece[] {
    const list = decodeDescriptors(body);
    const pieces: Piece[] = [];
    let sum = 0;
    for (let i = 0; i < list.count; i++) {
      const offset = list.offsets[i]!;
      const byteCount = list.lengths[i]!;
      sum += byteCount;
      if (sum > MAX_DATA_BYTES) throw malformed(`more than ${MAX_DATA_BYTES} bytes in one read`);
      const region = this.#context.regions.check(list.regionIds[i]!, offset, byteCount, "read");
      if (region.kind !== "host")
        throw new DynamoError("transfer-no-path", `${region.kind} memory cannot be read over tcp`);
      pieces.push({ region, offset, byteCount });
    }
    return pieces;
  }

  #serve(id: number, resolve: () => Piece[]): void {
    this.#attempt(id, () => {
      const pieces = resolve();
      let byteCount = 0;
      for (const piece of pieces) byteCount += piece.byteCount;
      this.#unsentBytes += byteCount;
      if (this.#unsentBytes > MAX_UNSENT_BYTES) throw malformed("the peer asks for more than it takes");
      for (const { region } of pieces) region.pin();
      const socket = this.#socket;
      socket.cork();
      socket.write(encodeResponse(RESPONSE.data, id, byteCount));
      const last = pieces.length - 1;
      const onSent = (): void => {
        this.#unsentBytes -= byteCount;
        for (const { region } of pieces) region.unpin();
      };
      pieces.forEach(({ region, offset, byteCount: length }, i) => {
        const bytes = region.bytes.subarray(offset, offset + length);
        if (i === last) socket.write(bytes, onSent);
        else socket.write(bytes);
      });
      socket.uncork();
    });
  }
}
