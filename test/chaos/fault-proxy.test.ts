import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { test, type TestContext } from "node:test";
import { until } from "../helpers/in-process-cluster.ts";
import { FaultProxy } from "./fault-proxy.ts";

/** A server that echoes, a proxy in front of it, and a client through both. */
async function echoThroughProxy(t: TestContext) {
  const sockets: Socket[] = [];
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    sockets.push(socket);
    socket.on("error", () => undefined);
    socket.pipe(socket);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  assert.ok(typeof address === "object" && address !== null);
  const proxy = await FaultProxy.listen(address.port);
  t.after(async () => {
    await proxy.close();
    for (const socket of sockets) socket.destroy();
    server.close();
    await once(server, "close");
  });
  const open = async () => {
    const socket = connect({ port: proxy.port, host: "127.0.0.1" });
    const seen = { bytes: 0, error: "", ended: false };
    socket.on("data", (bytes: Buffer) => (seen.bytes += bytes.length));
    socket.on("error", (error: NodeJS.ErrnoException) => (seen.error = error.code ?? ""));
    socket.on("end", () => (seen.ended = true));
    if (socket.connecting) await once(socket, "connect");
    return { socket, seen };
  };
  return { proxy, open };
}

test("fault proxy: bytes pass whole, and an orderly end is one", async (t) => {
  const { proxy, open } = await echoThroughProxy(t);
  const { socket, seen } = await open();
  socket.end(Buffer.alloc(4 * 1024 * 1024, 7));
  await until(() => seen.ended, "the end");
  assert.deepEqual(seen, { bytes: 4 * 1024 * 1024, error: "", ended: true });
  await until(() => proxy.openCount === 0, "the pair to go");
});

test("fault proxy: a reset is a reset, a hold holds both ways without a word, and what was held comes", async (t) => {
  const { proxy, open } = await echoThroughProxy(t);
  const first = await open();
  first.socket.write("abc");
  await until(() => first.seen.bytes === 3, "the echo");
  proxy.hold();
  first.socket.write("defg");
  const second = await open();
  second.socket.write("hi");
  await new Promise((resolve) => setTimeout(resolve, 50));
  assert.deepEqual(
    [first.seen, second.seen],
    [
      { bytes: 3, error: "", ended: false },
      { bytes: 0, error: "", ended: false },
    ],
  );
  proxy.release();
  await until(() => first.seen.bytes === 7 && second.seen.bytes === 2, "what was held");
  assert.equal(proxy.reset(), 2);
  await until(() => first.seen.error === "ECONNRESET" && second.seen.error === "ECONNRESET", "the resets");
  proxy.refuse(true);
  // One side gone while the other is held: closing the proxy (after the test) still ends both.
  proxy.refuse(false);
  const fourth = await open();
  fourth.socket.write("x");
  await until(() => fourth.seen.bytes === 1, "the echo");
  proxy.hold();
  fourth.socket.destroy();
  await until(() => fourth.socket.closed, "our end to close");
  proxy.refuse(true);
  const refused = connect({ port: proxy.port, host: "127.0.0.1" });
  const [error] = (await once(refused, "error", { signal: AbortSignal.timeout(5_000) })) as [NodeJS.ErrnoException];
  assert.equal(error.code, "ECONNRESET");
});
