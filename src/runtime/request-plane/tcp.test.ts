import { createServer } from "node:net";
import { requestPlaneBattery } from "./request-plane.battery.ts";
import { TcpRequestPlane } from "./tcp.ts";

/** A port that was free a moment ago. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

requestPlaneBattery("tcp", () => {
  const planes: TcpRequestPlane[] = [];
  return {
    plane: ({ limits = {}, address } = {}) => {
      const plane = new TcpRequestPlane({ limits, port: address === undefined ? 0 : Number(new URL(address).port) });
      planes.push(plane);
      return plane;
    },
    deadAddress: async () => `tcp://127.0.0.1:${await freePort()}`,
    close: async () => {
      await Promise.all(planes.map((plane) => plane.close()));
    },
  };
});
