import type * as zeromq from "zeromq";
import { DynamoError } from "../../errors/index.ts";
import { MAX_PAYLOAD_BYTES } from "./limits.ts";

/**
 * The native library, loaded on first use and kept: one context (one I/O thread) for all planes of the process. Nothing
 * lingers: a closed socket drops what it had not sent, so that neither `close` nor the end of the process waits.
 */
export interface Zmq {
  readonly library: typeof zeromq;
  readonly context: zeromq.Context;
}

let loading: Promise<Zmq> | undefined;

export function loadZmq(): Promise<Zmq> {
  loading ??= load().catch((cause: unknown) => {
    loading = undefined;
    throw new DynamoError("library-unavailable", "the ZeroMQ library could not be loaded", { cause });
  });
  return loading;
}

async function load(): Promise<Zmq> {
  const library = await import("zeromq");
  // Two sockets per remote process and subscriber side; the library's default of 1,023 would end at 500 workers.
  return { library, context: new library.Context({ blocky: false, maxSockets: 16_384 }) };
}

/** Options of every socket that talks to other processes. */
export function socketOptions(zmq: Zmq, isIpv6: boolean) {
  return {
    context: zmq.context,
    ipv6: isIpv6,
    linger: 0,
    /** A larger frame ends the connection inside the library, before it is in memory. */
    maxMessageSize: MAX_PAYLOAD_BYTES,
    reconnectInterval: 100,
    reconnectMaxInterval: 2_000,
    /** One that never answers counts as unreachable too. */
    connectTimeout: 3_000,
    /** A peer whose machine vanished without a word is noticed; answered by the I/O thread, so a busy loop is no vanished peer. */
    heartbeatInterval: 5_000,
    heartbeatTimeout: 15_000,
  };
}
