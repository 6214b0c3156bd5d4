import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { DEFAULT_LIMITS } from "../../../src/frontend/index.ts";
import { HttpServer } from "../../../src/frontend/http/index.ts";
import { readChatRequest, readCompletionRequest } from "../../../src/frontend/openai/index.ts";
import { Metrics, silentLogger } from "../../../src/observability/index.ts";
import { encodeRequest } from "../../../src/protocol/index.ts";
import { TcpRequestPlane, type StreamEnd } from "../../../src/runtime/request-plane/index.ts";
import {
  CLIENT_FRAMES,
  FRAME,
  FrameDecoder,
  HANDSHAKE_FRAMES,
  decodeError,
  decodeOpen,
  encodeError,
  encodeFrame,
  serverFrames,
  type FrameLimits,
} from "../../../src/runtime/request-plane/frame.ts";
import { decodeHello, decodeWelcome, encodeHello, encodeWelcome, newNonce, proofOf } from "../../../src/runtime/request-plane/hello.ts"; // prettier-ignore
import { DynamoError } from "../../../src/errors/index.ts";
import { systemClock, type Random } from "../../../src/std/index.ts";
import { startInProcessCluster } from "../../helpers/in-process-cluster.ts";
import { allowing } from "../allowed.ts";
import { targetOf, type AnyTarget } from "../fuzzer.ts";
import { below, bytesTarget, mutateBytes, pick, showBytes, smallerBytes } from "../mutate-bytes.ts";
import { jsonTarget } from "../mutate-json.ts";
import { REQUEST } from "./wire.ts";

/** What listens on a socket, as it really runs: hostile peers get an answer or lose their connection, and nobody else does. */

// ---- Request plane ----

const HELLO = encodeHello({ role: "client", peerId: 7n, nonce: Buffer.alloc(16, 1), proof: Buffer.alloc(0) });
const OPEN = ((): Buffer => {
  const head = Buffer.alloc(18);
  head.writeUInt32LE(1, 0);
  head.writeUInt32LE(1_000, 4);
  head.writeUInt32LE(65_536, 8);
  head.writeUInt16LE(4, 12);
  head.writeUInt16LE(2, 14);
  return Buffer.concat([head, Buffer.from("echoid"), Buffer.from("payload")]);
})();
const ERROR = encodeError(new DynamoError("cancelled", "stop"));
const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
};
const CLIENT_BYTES = [
  encodeFrame(FRAME.open, OPEN),
  encodeFrame(FRAME.cancel, Buffer.concat([u32(1), ERROR])),
  encodeFrame(FRAME.credit, Buffer.concat([u32(1), u32(1_000)])),
  encodeFrame(FRAME.ping),
  Buffer.concat([encodeFrame(FRAME.open, OPEN), encodeFrame(FRAME.credit, Buffer.concat([u32(1), u32(9)]))]),
];
const SERVER_BYTES = [
  encodeFrame(FRAME.batch, Buffer.concat([u32(1), u32(3), Buffer.from("abc"), u32(0x8000_0001), u32(0)])),
  encodeFrame(FRAME.batch, Buffer.concat([u32(0x8000_0001), u32(ERROR.length), ERROR])),
  encodeFrame(FRAME.goaway),
  encodeFrame(FRAME.ping),
];

function frameDecoder(): AnyTarget {
  const sides: readonly FrameLimits[] = [HANDSHAKE_FRAMES, serverFrames(1 << 20), CLIENT_FRAMES];
  return bytesTarget({
    name: "frame-decoder",
    about: "FrameDecoder and the frames' decoders; whole and in pieces give the same",
    corpus: [...CLIENT_BYTES, ...SERVER_BYTES, encodeFrame(FRAME.hello, HELLO), encodeFrame(FRAME.refuse, ERROR)],
    run(bytes) {
      for (const limits of sides) {
        const whole = frames(limits, bytes, bytes.length || 1);
        assert.equal(frames(limits, bytes, 1), whole);
        assert.equal(frames(limits, bytes, 5), whole);
      }
      allowing(["malformed-frame"], () => decodeOpen(bytes, 0, bytes.length));
      allowing(["malformed-frame"], () => decodeError(bytes, 0, bytes.length));
      for (const role of ["client", "server"] as const) {
        // A stranger gets a refusal, whatever it is.
        allowing(["malformed-frame", "protocol-version"], () => decodeHello(bytes, 0, bytes.length, role));
        allowing(["malformed-frame", "protocol-version"], () => decodeWelcome(bytes, 0, bytes.length));
      }
    },
  });
}

function frames(limits: FrameLimits, bytes: Buffer, pieceBytes: number): string {
  const seen: string[] = [];
  const decoder = new FrameDecoder(limits);
  const sink = {
    closed: false,
    onFrame: (type: number, from: Buffer, start: number, end: number) =>
      void seen.push(`${type}:${from.toString("hex", start, end)}`),
  };
  try {
    for (let at = 0; at < bytes.length; at += pieceBytes) decoder.push(bytes.subarray(at, at + pieceBytes), sink);
  } catch (thrown) {
    if (!(thrown instanceof DynamoError) || thrown.reason !== "malformed-frame") throw thrown;
    seen.push("malformed");
  }
  assert.ok(decoder.bufferBytes <= 4_096 + 2 * bytes.length, `${decoder.bufferBytes} bytes kept of ${bytes.length}`);
  return seen.join(" ");
}

/** A server's side: it echoes; each case is a stranger who greets well and then sends what it likes. */
async function requestPlaneServer(): Promise<AnyTarget> {
  const plane = new TcpRequestPlane({ logger: silentLogger, heartbeatMs: 60_000 });
  const server = await plane.listen();
  server.serve("echo", (stream, payload) => {
    stream.write(Buffer.from(payload));
    stream.end();
    server.flush();
    return { onCancel: () => undefined };
  });
  const port = portOf(server.address);
  let count = 0;
  return bytesTarget({
    name: "request-plane-server",
    about: "a real server of the request plane; a stranger's bytes after the greeting",
    corpus: CLIENT_BYTES,
    async run(bytes) {
      const socket = await open(port);
      const answer = greet(socket);
      await answer;
      for (let at = 0; at < bytes.length; at += 1 + (bytes.length >> 2)) {
        socket.write(bytes.subarray(at, at + 1 + (bytes.length >> 2)));
      }
      socket.end();
      await closed(socket);
      if (++count % 50 === 0) await echoes(plane, server.address);
      assert.ok(server.activeStreamCount <= 64, `${server.activeStreamCount} streams are left`);
    },
    close: () => plane.close(),
  });
}

/** Says hello as a client and waits for the welcome. */
async function greet(socket: Socket): Promise<void> {
  const decoder = new FrameDecoder(HANDSHAKE_FRAMES);
  const { promise, resolve } = Promise.withResolvers<void>();
  let step = 0;
  const sink = {
    closed: false,
    onFrame(type: number, bytes: Buffer, start: number, end: number) {
      if (type === FRAME.hello && step++ === 0) {
        const { nonce: serverNonce } = decodeHello(bytes, start, end, "server");
        const nonce = newNonce();
        const proof = proofOf(undefined, { role: "client", serverNonce, clientNonce: nonce });
        socket.write(encodeFrame(FRAME.hello, encodeHello({ role: "client", peerId: 7n, nonce, proof })));
      } else {
        this.closed = true;
        resolve();
      }
    },
  };
  socket.on("data", (chunk: Buffer) => {
    if (!sink.closed) decoder.push(chunk, sink);
  });
  socket.once("close", () => resolve());
  await promise;
}

async function echoes(plane: TcpRequestPlane, address: string): Promise<void> {
  const end = await call(plane, address, Buffer.from("still there?"));
  assert.equal(end?.publicMessage, undefined, "the server no longer answers");
}

function call(plane: TcpRequestPlane, address: string, payload: Uint8Array, endpoint = "echo"): Promise<StreamEnd> {
  const { promise, resolve } = Promise.withResolvers<StreamEnd>();
  plane.client.open(
    address,
    payload,
    { endpoint, requestId: "r", traceparent: "", timeoutMs: 1_500, autoCredit: true },
    {
      onItem: () => undefined,
      onTurnEnd: () => undefined,
      onEnd: resolve,
    },
  );
  return promise;
}

/** A client's side: the server it calls is a stranger. */
async function requestPlaneClient(): Promise<AnyTarget> {
  let answerBytes: Buffer = Buffer.alloc(0);
  const server = createServer((socket) => {
    socket.on("error", () => undefined);
    const nonce = newNonce();
    const proof = Buffer.alloc(0);
    socket.write(encodeFrame(FRAME.hello, encodeHello({ role: "server", peerId: 9n, nonce, proof })));
    const decoder = new FrameDecoder(HANDSHAKE_FRAMES);
    let isGreeted = false;
    const sink = {
      closed: false,
      onFrame(type: number, bytes: Buffer, start: number, end: number) {
        if (type !== FRAME.hello) return;
        const { nonce: clientNonce } = decodeHello(bytes, start, end, "client");
        const own = proofOf(undefined, { role: "server", serverNonce: nonce, clientNonce });
        socket.write(encodeFrame(FRAME.welcome, encodeWelcome({ version: 1, proof: own })));
        isGreeted = true;
        this.closed = true;
      },
    };
    socket.on("data", (chunk: Buffer) => {
      if (!isGreeted) decoder.push(chunk, sink);
      // The answer to whatever was asked, cut in two.
      if (isGreeted) {
        socket.write(answerBytes.subarray(0, answerBytes.length >> 1));
        socket.end(answerBytes.subarray(answerBytes.length >> 1));
      }
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  assert.ok(typeof address === "object" && address !== null);
  return bytesTarget({
    name: "request-plane-client",
    about: "a real client of the request plane; the server's bytes after the greeting",
    corpus: SERVER_BYTES,
    async run(bytes) {
      answerBytes = Buffer.from(bytes);
      // A new client each time: one that was answered badly waits before it tries the address again.
      const plane = new TcpRequestPlane({ logger: silentLogger, heartbeatMs: 60_000 });
      // Ends, with whatever; a stream that never ends is caught by its deadline, and that is a failure of the connection's end.
      const error = await call(plane, `tcp://127.0.0.1:${address.port}`, Buffer.from("?"));
      await plane.close();
      assert.notEqual(error?.reason, "internal", error?.diagnostic ?? "");
    },
    async close() {
      await new Promise((resolve) => server.close(resolve));
    },
  });
}

/** Whole workers, asked by somebody who speaks the request plane and nothing else right. */
async function workerRequests(): Promise<AnyTarget> {
  const cluster = await startInProcessCluster({ workers: 1 });
  await cluster.addWorker({
    modelName: "mock",
    component: "mock",
    engine: {
      ...(await import("../../../src/engines/mocker/index.ts")).mockerConfig({ speedupRatio: 0 }),
      kind: "mocker",
    },
  });
  const { client } = cluster.frontendPlanes.request;
  const instances = await cluster.frontendPlanes.discovery.list("v1/instances/");
  const addresses = instances.map(({ value }) => {
    const { address, component, endpoint } = value as { address: string; component: string; endpoint: string };
    return { address, endpoint: `dynamo.${component}.${endpoint}` };
  });
  const json = ((): Buffer => Buffer.from(encodeRequest(REQUEST)))();
  return bytesTarget({
    name: "worker-requests",
    about: "the generate endpoint of workers with the echo and the mock engine, called directly",
    corpus: [json, Buffer.from(encodeRequest({ ...REQUEST, output: { topLogprobs: 0, promptLogprobs: true } }))],
    async run(bytes) {
      for (const { address, endpoint } of addresses) {
        const { promise, resolve } = Promise.withResolvers<StreamEnd>();
        const stream = client.open(
          address,
          bytes,
          { endpoint, requestId: "r", traceparent: "", timeoutMs: 300, autoCredit: true },
          { onItem: () => stream?.cancel(), onTurnEnd: () => undefined, onEnd: resolve },
        );
        await promise;
      }
      const running = cluster.workers.map((worker) => worker.load().runningRequests + worker.load().waitingRequests);
      assert.ok(Math.max(...running) <= 4, `${running.join(" and ")} requests are left on the workers`);
    },
    close: () => cluster.stop(),
  });
}

// ---- HTTP ----

const CHAT = { model: "echo", messages: [{ role: "user", content: "hi" }], max_tokens: 2 };
const GOOD = `POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: ${JSON.stringify(CHAT).length}\r\n\r\n${JSON.stringify(CHAT)}`; // prettier-ignore
const CHUNKED = `POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n11\r\n{"model":"echo","\r\nd\r\nprompt":"abc"}\r\n0\r\n\r\n`; // prettier-ignore
const HTTP_CORPUS = [
  GOOD,
  CHUNKED,
  `${GOOD}${GOOD}`,
  "GET /v1/models HTTP/1.1\r\nhost: t\r\n\r\n",
  "GET /health?x=%00 HTTP/1.0\r\n\r\n",
  "GET /v1/models/%e0%a4%a HTTP/1.1\r\nhost: t\r\n\r\n",
  "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
  GOOD.replace("host: t", "host: t\r\n__proto__: x\r\nconstructor: y\r\ncontent-length: 5"),
  GOOD.replace("host: t", "host: t\r\ntransfer-encoding: chunked"),
  GOOD.replace("host: t", `host: t\r\n${"x-a: b\r\n".repeat(120)}`),
  `GET /${"a".repeat(20_000)} HTTP/1.1\r\nhost: t\r\n\r\n`,
  "OPTIONS * HTTP/1.1\r\nhost: t\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
  "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
  "CONNECT t:443 HTTP/1.1\r\nhost: t\r\n\r\n",
  "GET http://other/v1/models HTTP/1.1\r\nhost: t\r\n\r\n",
  "GET //%2f..%2f HTTP/1.1\r\nhost: t\r\n\r\n",
].map((text) => Buffer.from(text, "latin1"));

async function http(): Promise<AnyTarget> {
  const limits = { ...DEFAULT_LIMITS, bodyBytes: 64 * 1024, headersTimeoutMs: 1_000, bodyTimeoutMs: 1_000 };
  const server = new HttpServer({
    host: "127.0.0.1",
    port: 0,
    limits,
    logger: silentLogger,
    clock: systemClock,
    metrics: new Metrics(),
    routes: [
      { method: "POST", path: "/v1/chat/completions", family: "openai", body: "json", handle: (exchange) => exchange.json(200, { model: readChatRequest(exchange.body, limits).model }) }, // prettier-ignore
      { method: "POST", path: "/v1/completions", family: "openai", body: "json", handle: (exchange) => exchange.json(200, { model: readCompletionRequest(exchange.body, limits).model }) }, // prettier-ignore
      { method: "GET", path: "/v1/models", family: "openai", handle: (exchange) => exchange.json(200, {}) },
      { method: "GET", path: "/v1/models/*", family: "openai", handle: (exchange) => exchange.json(200, { path: exchange.path }) }, // prettier-ignore
      { method: "GET", path: "/health", family: "plain", handle: (exchange) => exchange.json(200, {}) },
    ],
  });
  const { port } = await server.listen();
  return targetOf<{ readonly bytes: Buffer; readonly cut: number }>({
    name: "http",
    about: "raw bytes to the real HTTP server with the real validation",
    generate: (random: Random) => ({
      bytes: mutateBytes(random, HTTP_CORPUS),
      cut: pick(random, [1, 7, 100, 1_000_000]) + below(random, 3),
    }),
    async run({ bytes, cut }) {
      const socket = await open(port);
      let text = "";
      socket.on("data", (chunk: Buffer) => (text += chunk.toString("latin1")));
      // Tiny pieces of long inputs would test patience only.
      const step = bytes.length > 2_000 ? Math.max(cut, 500) : cut;
      for (let at = 0; at < bytes.length; at += step) socket.write(bytes.subarray(at, at + step));
      socket.end();
      await closed(socket);
      checkAnswers(text);
      if (bytes === HTTP_CORPUS[0]) assert.match(text, /^HTTP\/1\.1 200 /);
    },
    smaller: function* ({ bytes, cut }) {
      for (const smaller of smallerBytes(bytes)) yield { bytes: smaller, cut };
      if (cut < 1_000_000) yield { bytes, cut: 1_000_000 };
    },
    show: ({ bytes, cut }) => `in pieces of ${cut}: ${showBytes(bytes)}`,
    close: () => server.close({ graceMs: 0 }),
  });
}

/** Every answer is HTTP, none is a 500, and what is not 2xx carries an error of the catalogue. */
function checkAnswers(text: string): void {
  if (text === "") return;
  assert.match(text, /^HTTP\/1\.1 \d{3} /);
  for (const [, status] of text.matchAll(/HTTP\/1\.1 (\d{3}) /g)) {
    assert.ok(status !== "500", `a 500: ${text.slice(0, 600)}`);
  }
  const errors = [...text.matchAll(/"code":"(\w+)"/g)].map((match) => match[1]!);
  for (const code of errors) assert.notEqual(code, "internal_error", text.slice(0, 600));
}

/** Bodies to a whole cluster: validation, template, tokenizer, router, worker, writers. */
async function api(): Promise<AnyTarget> {
  const cluster = await startInProcessCluster({ workers: 1, frontend: { limits: { bodyBytes: 1 << 20 } } });
  const chat = { ...CHAT, temperature: 0.5, top_p: 0.9, stop: ["x"], seed: 3, logprobs: true, top_logprobs: 2, n: 2, stream: true, stream_options: { include_usage: true } }; // prettier-ignore
  return jsonTarget({
    name: "api",
    about: "request bodies to chat, completions and route of a whole cluster in this process",
    corpus: [
      { path: "/v1/chat/completions", body: CHAT },
      { path: "/v1/chat/completions", body: chat },
      { path: "/v1/chat/completions", body: { ...CHAT, tools: [{ type: "function", function: { name: "f", parameters: { type: "object" } } }], response_format: { type: "text" }, logit_bias: { "5": -100 }, metadata: { a: "b" } } }, // prettier-ignore
      { path: "/v1/chat/completions", body: { ...CHAT, messages: [{ role: "system", content: [{ type: "text", text: "x" }] }, { role: "assistant", content: "y" }], nvext: { agent_hints: {} }, chat_template_kwargs: { x: 1 } } }, // prettier-ignore
      { path: "/v1/completions", body: { model: "echo", prompt: [[1, 2, 3], [4]], max_tokens: 3, echo: true, logprobs: 2, n: 2 } }, // prettier-ignore
      { path: "/v1/completions", body: { model: "echo", prompt: ["a", "b"], max_tokens: 1, min_tokens: 1, ignore_eos: true, stop_token_ids: [5] } }, // prettier-ignore
      { path: "/v1/route", body: { model: "echo", prompt: "x" } },
    ],
    async run(text) {
      // The whole document is fuzzed; what is no request with a path and a body is sent as a body.
      const found = /^\{"path":"(\/v1\/[a-z/]+)","body":([^]*)\}$/.exec(text);
      const path = found?.[1] ?? "/v1/chat/completions";
      const answer = await fetch(`${cluster.baseUrl}${path}`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: found?.[2] ?? text,
        signal: AbortSignal.timeout(10_000),
      });
      const body = await answer.text();
      assert.notEqual(answer.status, 500, body.slice(0, 600));
      if (answer.status >= 400) {
        const { error } = JSON.parse(body) as { error: { code: string; message: string } };
        assert.ok(error.code !== "internal_error" && error.message !== "", body.slice(0, 600));
      } else assert.ok(!body.includes('"internal_error"'), body.slice(0, 600));
    },
    close: () => cluster.stop(),
  });
}

// ---- Sockets ----

async function open(port: number): Promise<Socket> {
  const socket = connect({ port, host: "127.0.0.1", noDelay: true });
  socket.on("error", () => undefined);
  await once(socket, "connect");
  return socket;
}

/** The other side must close what we ended within the fuzzer's time box. */
async function closed(socket: Socket): Promise<void> {
  socket.resume();
  const timer = setTimeout(() => socket.destroy(new Error("not closed")), 10_000);
  let late = false;
  socket.once("error", (error) => (late = error.message === "not closed"));
  if (!socket.closed) await once(socket, "close").catch(() => undefined);
  clearTimeout(timer);
  assert.ok(!late, "the server keeps a connection that its client has ended");
}

function portOf(address: string): number {
  return Number(address.slice(address.lastIndexOf(":") + 1));
}

export const SOCKET_TARGETS: Record<string, () => AnyTarget | Promise<AnyTarget>> = {
  "frame-decoder": frameDecoder,
  "request-plane-server": requestPlaneServer,
  "request-plane-client": requestPlaneClient,
  "worker-requests": workerRequests,
  http,
  api,
};
