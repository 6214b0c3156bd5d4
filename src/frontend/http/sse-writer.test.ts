import assert from "node:assert/strict";
import { test } from "node:test";
import type { Exchange } from "./exchange.ts";
import type { Route } from "./server.ts";
import { RawClient, startServer } from "./testing.ts";

/** A route that hands each exchange to the test. */
function streamRoute(): { route: Route; next: () => Promise<Exchange> } {
  const ready: Exchange[] = [];
  const takers: ((exchange: Exchange) => void)[] = [];
  return {
    route: {
      method: "POST",
      path: "/stream",
      family: "openai",
      handle: (exchange) => {
        const taker = takers.shift();
        if (taker === undefined) ready.push(exchange);
        else taker(exchange);
      },
    },
    next: () => {
      const exchange = ready.shift();
      return exchange === undefined ? new Promise((resolve) => takers.push(resolve)) : Promise.resolve(exchange);
    },
  };
}

test("sse: headers and first events leave together, each flush is one chunk, the connection is used again", async (t) => {
  const { route, next } = streamRoute();
  const { port } = await startServer(t, [route]);
  const client = await RawClient.open(t, port);
  for (let round = 0; round < 3; round++) {
    client.post("/stream", "{}");
    const exchange = await next();
    const sse = exchange.sse();
    assert.equal(exchange.headersSent, false);
    let packets = 0;
    const count = (): number => packets++;
    client.socket.on("data", count);
    sse.push("data: 1\n\n", true);
    sse.push("data: 2\n\n", true);
    assert.equal(sse.bufferedBytes, 18);
    sse.flush();
    assert.equal(exchange.headersSent, true);
    await client.until("the first events", () => client.received.includes("data: 2"));
    assert.equal(packets, 1, "headers and events came in one packet");
    assert.match(client.received, /\r\n\r\n12\r\ndata: 1\n\ndata: 2\n\n\r\n$/);
    sse.flush();
    sse.push("data: é😀\n\n", false);
    sse.flush();
    await client.until("the second flush", () => client.received.endsWith("\n\n\r\n") && packets === 2);
    sse.push("data: [DONE]\n\n", true);
    sse.end();
    assert.equal(exchange.answered, true);
    const answer = await client.answer();
    assert.equal(packets, 3, "the last event and the end mark came in one packet");
    client.socket.off("data", count);
    assert.equal(answer.headers["content-type"], "text/event-stream; charset=utf-8");
    assert.equal(answer.headers["cache-control"], "no-cache");
    assert.equal(answer.headers["x-request-id"], exchange.requestId);
    assert.equal(answer.body, "data: 1\n\ndata: 2\n\ndata: é😀\n\ndata: [DONE]\n\n");
    assert.equal(client.received, "");
  }
});

test("sse: a stream that ends without a flush is one complete answer", async (t) => {
  const { route, next } = streamRoute();
  const { port } = await startServer(t, [route]);
  const client = await RawClient.open(t, port);
  client.post("/stream", "{}");
  const sse = (await next()).sse();
  sse.push("data: a\n\n", true);
  sse.end();
  sse.push("data: late\n\n", true);
  sse.flush();
  sse.end();
  assert.equal((await client.answer()).body, "data: a\n\n");
  client.post("/stream", "{}");
  (await next()).sse().end();
  assert.equal((await client.answer()).body, "");
});

test("sse: a client that stops reading is cut off at the bound; others are served on", async (t) => {
  const { route, next } = streamRoute();
  const limit = 256 * 1024;
  const { port } = await startServer(t, [route], { limits: { responseBufferBytes: limit } });
  const slow = await RawClient.open(t, port);
  slow.socket.pause();
  slow.post("/stream", "{}");
  const slowExchange = await next();
  const reader = await RawClient.open(t, port);
  reader.post("/stream", "{}");
  const readerSse = (await next()).sse();

  const gone = new Promise<string>((resolve) => (slowExchange.onGone = resolve));
  const sse = slowExchange.sse();
  const event = `data: ${"x".repeat(16 * 1024)}\n\n`;
  let pushed = 0;
  let largest = 0;
  // The kernel takes some megabytes first; the end of the loop is the server's doing.
  while (!slowExchange.gone && pushed < 256 << 20) {
    sse.push(event, true);
    sse.flush();
    pushed += event.length;
    largest = Math.max(largest, sse.bufferedBytes);
    if (pushed % (1 << 20) < event.length) {
      readerSse.push("data: tick\n\n", true);
      readerSse.flush();
      await new Promise((resolve) => setImmediate(resolve));
    }
  }
  assert.equal(await gone, "slow-reader");
  assert.ok(largest <= limit + event.length, `at most the limit was held, got ${largest}`);
  assert.ok(pushed < 256 << 20);
  sse.push(event, true);
  sse.flush();
  assert.equal(sse.bufferedBytes, 0, "nothing is kept for a client that is gone");
  slow.socket.resume();
  await slow.untilClosed();
  assert.ok(!slow.received.endsWith("0\r\n\r\n"), "the cut stream does not look complete");
  readerSse.end();
  assert.match((await reader.answer()).body, /^(data: tick\n\n)+$/);
});

test("sse: onDrained is called when unread bytes are gone, not when there were none", async (t) => {
  const { route, next } = streamRoute();
  const { port } = await startServer(t, [route], { limits: { responseBufferBytes: 64 << 20 } });
  const client = await RawClient.open(t, port);
  client.post("/stream", "{}");
  const sse = (await next()).sse();
  let drained = 0;
  let wake: () => void = () => undefined;
  sse.onDrained = () => {
    drained++;
    wake();
  };
  sse.push("data: small\n\n", true);
  sse.flush();
  await client.until("the small event", () => client.received.includes("small"));
  assert.equal(sse.bufferedBytes, 0);
  assert.equal(drained, 0);
  for (let round = 1; round <= 2; round++) {
    client.socket.pause();
    const done = new Promise<void>((resolve) => (wake = resolve));
    for (let i = 0; i < 16; i++) {
      sse.push("x".repeat(1 << 20), true);
      sse.flush();
    }
    assert.ok(sse.bufferedBytes > 0);
    client.received = "";
    client.socket.resume();
    await done;
    assert.equal(drained, round);
    assert.equal(sse.bufferedBytes, 0);
  }
});
