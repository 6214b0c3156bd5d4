import assert from "node:assert/strict";
import { createServer, type Server } from "node:http";
import { createServer as createTcpServer, type AddressInfo, type Socket } from "node:net";
import test from "node:test";
import fc from "fast-check";
import { SeededRandom } from "../std/index.ts";
import { generateLoad, type LoadOptions } from "./load-generator.ts";

/** Text deltas, then usage and the end marker, as an OpenAI server frames them. */
function streamOf(tokens: readonly string[]): string {
  const head =
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":[{"index":0,';
  const events = tokens.map(
    (token) => `data: ${head}"delta":{"content":${JSON.stringify(token)}},"finish_reason":null}]}`,
  );
  return [
    `data: ${head}"delta":{"role":"assistant","content":""},"finish_reason":null}]}`,
    ": a comment",
    ...events,
    `data: ${head}"delta":{},"finish_reason":"stop"}]}`,
    `data: {"id":"chatcmpl-1","choices":[],"usage":{"completion_tokens":${tokens.length}}}`,
    "data: [DONE]",
    "",
  ].join("\n\n");
}

/** Writes `text` in pieces of random size, one turn each, so that they leave as separate chunks and packets. */
async function writeInPieces(write: (piece: string) => void, text: string, random: SeededRandom): Promise<void> {
  for (let at = 0; at < text.length;) {
    const to = at + 1 + (random.nextU32() % 60);
    write(text.slice(at, to));
    at = to;
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
}

async function withServer(server: Server, body: (at: { host: string; port: number }) => Promise<void>): Promise<void> {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  try {
    await body({ host: "127.0.0.1", port: (server.address() as AddressInfo).port });
  } finally {
    server.closeAllConnections();
    await new Promise<void>((resolve) => server.close(() => resolve()));
  }
}

/** A server of raw bytes: `answer` gets the socket once for each request head that came. */
async function withRawServer(
  answer: (socket: Socket, requestIndex: number) => void,
  body: (at: { host: string; port: number }) => Promise<void>,
): Promise<void> {
  const sockets = new Set<Socket>();
  let requestIndex = 0;
  const server = createTcpServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => undefined);
    socket.on("data", () => answer(socket, requestIndex++));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  try {
    await body({ host: "127.0.0.1", port: (server.address() as AddressInfo).port });
  } finally {
    for (const socket of sockets) socket.destroy();
    await new Promise<void>((resolve) => server.close(() => resolve()));
  }
}

const load = (at: { host: string; port: number }, options: Partial<LoadOptions>) =>
  generateLoad({ ...at, body: "{}", concurrency: 1, requestCount: 1, ...options });

test("load generator: counts requests and tokens of streams cut at random places, and reuses its connections", async () => {
  const random = new SeededRandom(1);
  const bodies: string[] = [];
  let connections = 0;
  const server = createServer((request, response) => {
    request.setEncoding("utf8").on("data", (text: string) => bodies.push(text));
    response.setHeader("content-type", "text/event-stream; charset=utf-8");
    void writeInPieces((piece) => response.write(piece), streamOf(["Hello", ' "world"', "\n", "é", " "]), random).then(
      () => response.end(),
    );
  });
  server.on("connection", () => connections++);
  await withServer(server, async (at) => {
    const report = await load(at, { concurrency: 4, requestCount: 20, body: (index) => JSON.stringify({ index }) });
    assert.equal(report.okCount, 20);
    assert.equal(report.failedCount, 0);
    assert.deepEqual(report.statuses, { 200: 20 });
    assert.equal(report.tokenCount, 100);
    assert.equal(report.ttftMs.count, 20);
    assert.equal(report.itlMs.count, 80);
    assert.equal(report.latencyMs.count, 20);
    assert.ok(report.ttftMs.max <= report.latencyMs.max);
    assert.equal(connections, 4);
    assert.deepEqual(new Set(bodies), new Set(Array.from({ length: 20 }, (_, index) => JSON.stringify({ index }))));
  });
});

test("load generator: reads JSON answers by content-length and takes their tokens from usage", async () => {
  const server = createServer((_request, response) => {
    response.setHeader("content-type", "application/json");
    response.end(
      '{"choices":[{"text":"\\"completion_tokens\\": 99"}],"usage":{"prompt_tokens":3,"completion_tokens": 7}}',
    );
  });
  await withServer(server, async (at) => {
    const report = await load(at, { concurrency: 2, requestCount: 10 });
    assert.deepEqual([report.okCount, report.tokenCount, report.ttftMs.count], [10, 70, 0]);
  });
});

test("load generator: counts errors by status and goes on", async () => {
  let count = 0;
  const server = createServer((_request, response) => {
    response.statusCode = [200, 404, 529][count++ % 3]!;
    response.setHeader("content-type", "application/json");
    response.end("{}");
  });
  await withServer(server, async (at) => {
    const report = await load(at, { requestCount: 9 });
    assert.deepEqual(report.statuses, { 200: 3, 404: 3, 529: 3 });
    assert.deepEqual([report.okCount, report.failedCount], [3, 6]);
    assert.equal(report.latencyMs.count, 3);
  });
});

test("load generator: a connection closed in the middle is an error and the next request opens another", async () => {
  const whole = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
  await withRawServer(
    (socket, index) => (index % 2 === 0 ? socket.end(whole.slice(0, -1)) : socket.write(whole)),
    async (at) => {
      const report = await load(at, { requestCount: 6 });
      assert.equal(report.okCount, 3);
      assert.deepEqual(report.errors, { "closed-early": 3 });
    },
  );
});

test("load generator: a stream without its end marker, or with an error event, is broken", async () => {
  const pieces = ['data: {"choices":[{"text":"x"}]}\n\n', 'data: {"error":{"message":"no"}}\n\ndata: [DONE]\n\n'];
  const server = createServer((_request, response) => {
    response.setHeader("content-type", "text/event-stream");
    response.end(pieces.pop());
  });
  await withServer(server, async (at) => {
    const report = await load(at, { requestCount: 2 });
    assert.deepEqual(report.errors, { "stream-broken": 2 });
    assert.deepEqual([report.okCount, report.failedCount, report.tokenCount], [0, 2, 1]);
  });
});

test("load generator: what is not HTTP, a bad chunk and bytes too many are malformed", async () => {
  const answers = [
    "SSH-2.0-x\r\n\r\n",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabc\r\n",
    "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab",
    `HTTP/1.1 200 OK\r\nx: ${"y".repeat(70_000)}`,
  ];
  await withRawServer(
    (socket, index) => socket.write(answers[index]!),
    async (at) => {
      const report = await load(at, { requestCount: answers.length });
      assert.deepEqual(report.errors, { malformed: answers.length });
    },
  );
});

test("load generator: a refused connection and a server that never answers are errors of their own", async () => {
  let free = 0;
  await withRawServer(
    () => undefined,
    async (at) => {
      free = at.port;
      const report = await load(at, { concurrency: 3, requestCount: 3, timeoutMs: 30 });
      assert.deepEqual(report.errors, { timeout: 3 });
    },
  );
  const report = await load({ host: "127.0.0.1", port: free }, { concurrency: 2, requestCount: 5 });
  assert.deepEqual(report.errors, { connect: 5 });
});

test("load generator: ends by duration, and at once by signal", async () => {
  const server = createServer((_request, response) => response.end("{}"));
  await withServer(server, async (at) => {
    const report = await generateLoad({ ...at, body: "{}", concurrency: 2, durationMs: 100 });
    assert.ok(report.okCount > 0 && report.wallMs >= 100, JSON.stringify(report));
    assert.equal(report.failedCount, 0);
  });
  const controller = new AbortController();
  await withRawServer(
    () => controller.abort(),
    async (at) => {
      const report = await load(at, { signal: controller.signal, requestCount: 100 });
      assert.deepEqual([report.errors, report.okCount], [{ aborted: 1 }, 0]);
    },
  );
});

test("load generator: an answer is read the same however its bytes are cut, with extensions, trailers and 100 before it", async () => {
  const stream = streamOf(["a", "b", "c"]);
  const chunks = [stream.slice(0, 7), stream.slice(7, 200), stream.slice(200)];
  const framed = chunks
    .map((chunk) => `${Buffer.byteLength(chunk).toString(16).toUpperCase()};x=y\r\n${chunk}\r\n`)
    .join("");
  const answer = `HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n${framed}0\r\nx-trailer: 1\r\n\r\n`;
  let cuts: number[] = [];
  await withRawServer(
    (socket) => {
      let at = 0;
      const writeNext = (): void => {
        const to = Math.min(answer.length, at + (cuts.shift() ?? answer.length));
        socket.write(answer.slice(at, to));
        at = to;
        if (at < answer.length) setImmediate(writeNext);
      };
      socket.setNoDelay(true);
      writeNext();
    },
    async (at) => {
      const byteByByte = Array.from({ length: answer.length }, () => 1);
      const random = fc.sample(fc.array(fc.integer({ min: 1, max: 90 }), { maxLength: 40 }), { numRuns: 60, seed: 7 });
      for (const given of [byteByByte, ...random]) {
        cuts = [...given];
        const report = await load(at, {});
        assert.deepEqual([report.okCount, report.tokenCount, report.errors], [1, 3, {}], `cut as ${String(given)}`);
      }
    },
  );
});
