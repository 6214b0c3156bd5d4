import { connect, createServer, type Server, type Socket } from "node:net";

/**
 * Where TCP connections come from: the system's network, or the simulator's. A simulated socket keeps what `connection.ts`
 * uses of a `Socket`: the events data, error, end and close, `write`, `end`, `destroy`, `writableLength`.
 */
export type PlaneSocket = Pick<
  Socket,
  "on" | "write" | "end" | "destroy" | "setNoDelay" | "writableLength" | "remoteAddress" | "remotePort"
>;

export type PlaneListener = Pick<Server, "on" | "off" | "once" | "listen" | "address" | "close" | "maxConnections">;

export interface TcpNetwork {
  connect(target: { readonly host: string; readonly port: number }): PlaneSocket;
  createServer(onSocket: (socket: PlaneSocket) => void): PlaneListener;
}

export const systemNetwork: TcpNetwork = {
  connect: ({ host, port }) => connect({ host, port, noDelay: true }),
  createServer: (onSocket) => createServer({ noDelay: true }, onSocket),
};
