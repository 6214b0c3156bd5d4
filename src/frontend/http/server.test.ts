import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { createLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { DEFAULT_LIMITS } from "../config.ts";
import { Metrics, silentLogger } from "../../observability/index.ts";
import type { Exchange } from "./exchange.ts";
import { HttpServer, type Route } from "./server.ts";
import { RawClient, errorOf, startServer } from "./testing.ts";

const echo: Route = {
  method: "POST",
  path: "/v1/echo",
  family: "openai",
  handle: (exchange) => exchange.json(200, exchange.body),
};
const health: Route = {
  method: "GET",
  path: "/health",
  family: "plain",
  handle: (exchange) => exchange.text(200, `ok ${exchange.query.get("q") ?? ""}`),
};
const JSON_TYPE = "content-type: application/json\r\n";

/** A route whose exchanges the test answers itself. */
function heldRoute(): { route: Route; exchanges: Exchange[]; next: (count: number) => Promise<Exchange> } {
  const exchanges: Exchange[] = [];
  let wake: () => void = () => undefined;
  return {
    route: {
      method: "POST",
      path: "/v1/held",
      family: "openai",
      handle: (exchange) => {
        exchanges.push(exchange);
        wake();
      },
    },
    exchanges,
    next: async (count) => {
      const deadline = performance.now() + 5_000;
      while (exchanges.length < count) {
        if (performance.now() > deadline) throw new Error(`exchange ${count} did not come`);
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, 50);
          wake = () => {
            clearTimeout(timer);
            resolve();
          };
        });
      }
      return exchanges[count - 1]!;
    },
  };
}

test("http: a JSON body reaches its handler and the answer keeps the connection open", async (t) => {
  const { port } = await startServer(t, [echo, health]);
  const client = await RawClient.open(t, port);
  for (const type of [JSON_TYPE, "content-type: Application/JSON; charset=UTF-8\r\n", ""]) {
    const answer = await client.post("/v1/echo", '{"a":"é"}', type).answer();
    assert.equal(answer.status, 200);
    assert.equal(answer.body, '{"a":"é"}');
    assert.equal(answer.headers["content-type"], "application/json");
    assert.equal(answer.headers["content-length"], "10");
  }
  const plain = await client.get("/health?q=a%20b").answer();
  assert.equal(plain.body, "ok a b");
});

test("http: x-request-id is echoed when it is short visible ASCII, and made otherwise", async (t) => {
  const { port } = await startServer(t, [health]);
  const client = await RawClient.open(t, port);
  const idOf = async (header: string): Promise<string> =>
    (await client.get("/health", header).answer()).headers["x-request-id"]!;
  assert.equal(await idOf("x-request-id: abc-123/~!\r\n"), "abc-123/~!");
  assert.equal(await idOf(`x-request-id: ${"x".repeat(128)}\r\n`), "x".repeat(128));
  for (const bad of ["", "x-request-id: a b\r\n", `x-request-id: ${"x".repeat(129)}\r\n`, "x-request-id: \xe9\r\n"]) {
    assert.match(await idOf(bad), /^[0-9a-f-]{36}$/);
  }
  assert.notEqual(await idOf(""), await idOf(""));
});

test("http: unknown paths are 404 in OpenAI's shape, wrong methods 405 with allow; the connection lives on", async (t) => {
  const { port, metrics } = await startServer(t, [echo, health]);
  const client = await RawClient.open(t, port);
  const missing = await client.get("/v1/nope").answer();
  assert.equal(missing.status, 404);
  assert.deepEqual(errorOf(missing), {
    message: "no such path: GET /v1/nope",
    type: "invalid_request_error",
    param: null,
    code: "route_not_found",
  });
  const wrong = await client.get("/v1/echo").answer();
  assert.equal(wrong.status, 405);
  assert.equal(wrong.headers.allow, "POST");
  const plain = await client.send("DELETE /health HTTP/1.1\r\nhost: test\r\n\r\n").answer();
  assert.equal(plain.status, 405);
  assert.equal(plain.body, "route-not-found: /health does not take DELETE; it takes GET\n");
  assert.equal((await client.get("/health").answer()).status, 200);
  assert.match(
    await metrics.render(),
    /requests_total\{model="",endpoint="unknown",request_type="",status="error",error_type="not_found"\} 3/,
  );
});

test("http: HEAD is GET without the body", async (t) => {
  const { port } = await startServer(t, [health]);
  const client = await RawClient.open(t, port);
  client.send("HEAD /health HTTP/1.1\r\nhost: test\r\n\r\n").get("/nope");
  await client.until("both answers", () => client.received.includes("no such path"));
  assert.match(client.received, /^HTTP\/1\.1 200 OK\r\n[^]*content-length: 3\r\n[^]*\r\n\r\nHTTP\/1\.1 404/);
});

test("http: a POST to an unknown path is answered and closed without reading its body", async (t) => {
  const { port } = await startServer(t, [echo]);
  const client = await RawClient.open(t, port);
  client.send("POST /v1/nope HTTP/1.1\r\nhost: test\r\ncontent-length: 1000000\r\n\r\n");
  const answer = await client.answer();
  assert.equal(answer.status, 404);
  assert.equal(answer.headers.connection, "close");
  client.socket.end();
  await client.untilClosed();
});

test("http: a content-length over the limit is refused before a byte of the body is read", async (t) => {
  const { port } = await startServer(t, [echo], { limits: { bodyBytes: 1_000 } });
  const client = await RawClient.open(t, port);
  client.send("POST /v1/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 1073741824\r\n\r\n");
  const answer = await client.answer();
  assert.equal(answer.status, 413);
  assert.equal(answer.headers.connection, "close");
  assert.equal(errorOf(answer).message, "the request body is too large: expected at most 1000 bytes");
  assert.equal(errorOf(answer).code, "body_too_large");
  await client.untilClosed();
});

test("http: a body of 1 GB sent in chunks is cut off at the limit and never buffered", async (t) => {
  const { port } = await startServer(t, [echo], { limits: { bodyBytes: 1_000_000 } });
  const client = await RawClient.open(t, port);
  client.send("POST /v1/echo HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n");
  const chunk = Buffer.concat([Buffer.from("10000\r\n"), Buffer.alloc(0x10000, 0x20), Buffer.from("\r\n")]);
  const before = process.memoryUsage().arrayBuffers;
  let sent = 0;
  const pump = (): void => {
    while (sent < 1 << 30 && !client.closed) {
      sent += 0x10000;
      if (!client.socket.write(chunk)) break;
    }
  };
  client.socket.on("drain", pump);
  pump();
  const answer = await client.answer();
  assert.equal(answer.status, 413);
  await client.untilClosed();
  assert.ok(sent < 1 << 30, "the connection was cut before everything was sent");
  assert.ok(process.memoryUsage().arrayBuffers - before < 64 << 20, "no body piled up");
});

test("http: bodies being read share one memory budget", async (t) => {
  const { port } = await startServer(t, [echo], { limits: { bodyBytes: 1_000 } });
  // 16 bodies of the largest size may be under way at once; the 17th finds no room.
  const clients: RawClient[] = [];
  for (let i = 0; i < 17; i++) {
    const client = await RawClient.open(t, port);
    client.send(`POST /v1/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\n`).send(" ".repeat(990));
    clients.push(client);
  }
  // One taker of answers per client: two would take them from each other.
  const answers = clients.map(async (client, index) => ({ index, answer: await client.answer() }));
  const refused = await Promise.race(answers);
  assert.equal(refused.answer.status, 529);
  assert.equal(refused.answer.headers["retry-after"], "1");
  const other = refused.index === 0 ? 1 : 0;
  clients[other]!.send('{"a":1}   ');
  assert.equal((await answers[other]!).answer.status, 200);
});

test("http: headers that do not come are answered with 408 and the end", async (t) => {
  const { port } = await startServer(t, [echo], { limits: { headersTimeoutMs: 100 } });
  for (const start of ["", "POST /v1/echo HTTP/1.1\r\nhost: te"]) {
    const client = await RawClient.open(t, port);
    client.send(start);
    const answer = await client.answer();
    assert.equal(answer.status, 408);
    assert.match(errorOf(answer).message, /headers did not arrive/);
    client.socket.end();
    await client.untilClosed();
  }
});

test("http: a body that does not come is answered with 408 and the end", async (t) => {
  const { port } = await startServer(t, [echo], { limits: { bodyTimeoutMs: 100 } });
  const client = await RawClient.open(t, port);
  client.send('POST /v1/echo HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\n{"a"');
  const answer = await client.answer();
  assert.equal(answer.status, 408);
  assert.equal(answer.headers.connection, "close");
  assert.equal(errorOf(answer).message, "the request body did not arrive within 100 ms");
  await client.untilClosed();
});

test("http: bodies that are not JSON get 400 with the position, and the connection stays usable", async (t) => {
  const { port } = await startServer(t, [echo]);
  const client = await RawClient.open(t, port);
  const answer = await client.post("/v1/echo", '{"a": }', JSON_TYPE).answer();
  assert.equal(answer.status, 400);
  assert.deepEqual(errorOf(answer), {
    message: 'the request body is not valid JSON: unexpected "}" at position 6 (line 1, column 7)',
    type: "invalid_request_error",
    param: null,
    code: "malformed_json",
  });
  const bytes = await client.post("/v1/echo", Buffer.from([0x22, 0xff, 0x22])).answer();
  assert.equal(errorOf(bytes).message, "the request body is not valid UTF-8");
  assert.equal((await client.post("/v1/echo", "[".repeat(100_000)).answer()).status, 400);
  assert.equal((await client.post("/v1/echo", "").answer()).status, 400);
  assert.equal((await client.post("/v1/echo", "{}").answer()).status, 200);
});

test("http: other content types and encodings get 415", async (t) => {
  const { port } = await startServer(t, [echo]);
  const refused: readonly (readonly [string, RegExp])[] = [
    ["content-type: text/plain\r\n", /^content-type: expected application\/json, got "text\/plain"$/],
    ["content-type: application/json; charset=latin1\r\n", /^content-type/],
    ["content-encoding: gzip\r\n", /^content-encoding: expected no encoding or identity, got "gzip"$/],
  ];
  for (const [header, message] of refused) {
    const client = await RawClient.open(t, port);
    const answer = await client.post("/v1/echo", "{}", header).answer();
    assert.equal(answer.status, 415);
    assert.match(errorOf(answer).message, message);
  }
  const client = await RawClient.open(t, port);
  assert.equal((await client.post("/v1/echo", "{}", "content-encoding: identity\r\n").answer()).status, 200);
});

test("http: requests that two parsers could read differently are refused with 400", async (t) => {
  const { port } = await startServer(t, [echo, health]);
  const head = "POST /v1/echo HTTP/1.1\r\nhost: test\r\n";
  const smuggled = [
    `${head}content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n`,
    `${head}transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n`,
    `${head}content-length: 2\r\ncontent-length: 2\r\n\r\n{}`,
    `${head}content-length: 2\r\ncontent-length: 3\r\n\r\n{} `,
    `${head}content-length: +2\r\n\r\n{}`,
    `${head}content-length: 2, 2\r\n\r\n{}`,
    `${head}content-length: -1\r\n\r\n{}`,
    `${head}transfer-encoding: chunked, identity\r\n\r\n{}`,
    `${head}transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n`,
    `${head}transfer-encoding: chunked\r\n\r\n2\r\n{}X0\r\n\r\n`,
    `${head}content-length : 2\r\n\r\n{}`,
    `${head}a: b\r\n folded: c\r\ncontent-length: 2\r\n\r\n{}`,
    "GET /health HTTP/1.1\r\nhost: test\nx: y\r\n\r\n\0",
    "GET /health\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "GET /health HTTP/1.1\r\n\r\n",
  ];
  for (const bytes of smuggled) {
    const client = await RawClient.open(t, port);
    client.send(bytes);
    await client.until(
      `an answer to ${JSON.stringify(bytes)}`,
      () => client.closed || client.received.includes("\r\n\r\n"),
    );
    if (client.received !== "") {
      const answer = await client.answer();
      assert.equal(answer.status, 400, JSON.stringify(bytes));
      assert.equal(answer.headers.connection?.toLowerCase(), "close", JSON.stringify(bytes));
      client.socket.end();
    }
    await client.untilClosed();
  }
  const client = await RawClient.open(t, port);
  assert.equal((await client.get("/health").answer()).status, 200);
});

test("http: too many or too large headers get 431, strange header names harm nothing", async (t) => {
  const { port } = await startServer(t, [health]);
  const many = await RawClient.open(t, port);
  assert.equal((await many.get("/health", "a: b\r\n".repeat(200)).answer()).status, 431);
  const large = await RawClient.open(t, port);
  const answer = await large.get("/health", `a: ${"b".repeat(20_000)}\r\n`).answer();
  assert.equal(answer.status, 431);
  assert.match(errorOf(answer).message, /headers are too large: expected at most 16384 bytes/);
  const odd = await RawClient.open(t, port);
  const names = "__proto__: a\r\nconstructor: b\r\ntoString: c\r\nhasOwnProperty: d\r\n";
  assert.equal((await odd.get("/health", names).answer()).status, 200);
});

test("http: expect 100-continue is answered only after the size was checked", async (t) => {
  const { port } = await startServer(t, [echo], { limits: { bodyBytes: 100 } });
  const client = await RawClient.open(t, port);
  const head = "POST /v1/echo HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\n";
  client.send(`${head}content-length: 2\r\n\r\n`);
  assert.equal((await client.answer()).status, 100);
  assert.equal((await client.send("{}").answer()).status, 200);
  client.send(`${head}content-length: 101\r\n\r\n`);
  assert.equal((await client.answer()).status, 413);
  const odd = await RawClient.open(t, port);
  odd.send("POST /v1/echo HTTP/1.1\r\nhost: test\r\nexpect: tea\r\ncontent-length: 2\r\n\r\n");
  assert.equal((await odd.answer()).status, 417);
});

test("http: pipelined requests are handled one at a time and answered in order", async (t) => {
  const held = heldRoute();
  const { port } = await startServer(t, [echo, held.route]);
  const client = await RawClient.open(t, port);
  client.post("/v1/held", '{"i":0}').post("/v1/held", '{"i":1}').post("/v1/echo", '{"i":2}');
  const first = await held.next(1);
  await new Promise((resolve) => setImmediate(resolve));
  assert.equal(held.exchanges.length, 1, "the second waits for its turn");
  assert.deepEqual(first.body, { i: 0 });
  const stream = first.sse();
  stream.push("data: a\n\n", true);
  stream.flush();
  stream.end();
  const second = await held.next(2);
  assert.deepEqual(second.body, { i: 1 });
  second.json(201, "b");
  assert.equal((await client.answer()).body, "data: a\n\n");
  assert.equal((await client.answer()).status, 201);
  assert.equal((await client.answer()).body, '{"i":2}');
});

test("http: a client that sends too many requests ahead is disconnected", async (t) => {
  const held = heldRoute();
  const { port } = await startServer(t, [health, held.route]);
  const client = await RawClient.open(t, port);
  client.post("/v1/held", "{}");
  const first = await held.next(1);
  const gone = new Promise<string>((resolve) => (first.onGone = resolve));
  for (let i = 0; i < 40; i++) client.get("/health");
  await client.untilClosed();
  assert.equal(await gone, "client-gone");
});

test("http: connections over the limit are closed at once, and counted", async (t) => {
  const { port, metrics } = await startServer(t, [health], { limits: { connections: 2 } });
  const one = await RawClient.open(t, port);
  const two = await RawClient.open(t, port);
  assert.equal((await one.get("/health").answer()).status, 200);
  assert.equal((await two.get("/health").answer()).status, 200);
  const three = await RawClient.open(t, port);
  await three.untilClosed();
  assert.match(await metrics.render(), /admission_rejection_total\{gate="connections",model=""\} 1/);
  assert.equal((await one.get("/health").answer()).status, 200);
});

test("http: a handler that throws costs its own exchange a 500 and is logged without its request", async (t) => {
  const lines: string[] = [];
  const logger = createLogger({ level: "info", format: "jsonl", write: (line) => lines.push(line) });
  const failing = (path: string, handle: Route["handle"]): Route => ({
    method: "POST",
    path,
    family: "openai",
    handle,
  });
  const { port } = await startServer(
    t,
    [
      echo,
      failing("/sync", () => {
        throw new Error("secret state");
      }),
      failing("/async", async () => {
        await Promise.resolve();
        throw new Error("secret state");
      }),
      failing("/known", () => {
        throw new DynamoError("model-not-found", "no model m", { param: "model" });
      }),
      failing("/stream", (exchange) => {
        exchange.sse().push("data: a\n\n", true);
        exchange.sse().flush();
        throw new Error("secret state");
      }),
    ],
    { logger },
  );
  const client = await RawClient.open(t, port);
  for (const path of ["/sync", "/async"]) {
    const answer = await client.post(path, '{"prompt":"private"}').answer();
    assert.equal(answer.status, 500);
    assert.deepEqual(errorOf(answer), {
      message: "internal error",
      type: "server_error",
      param: null,
      code: "internal_error",
    });
  }
  const known = await client.post("/known", "{}").answer();
  assert.equal(known.status, 404);
  assert.equal(errorOf(known).code, "model_not_found");
  assert.equal((await client.post("/v1/echo", "{}").answer()).status, 200);
  await client.post("/stream", "{}").untilClosed();
  assert.equal(lines.length, 3);
  assert.ok(lines.every((line) => line.includes("secret state") && !line.includes("private")));
});

test("http: onGone is called once when the client leaves, before or in the middle of an answer", async (t) => {
  const held = heldRoute();
  const { port } = await startServer(t, [held.route]);
  for (const streaming of [false, true]) {
    const client = await RawClient.open(t, port);
    client.post("/v1/held", "{}");
    const exchange = await held.next(held.exchanges.length + 1);
    let calls = 0;
    const gone = new Promise<string>((resolve) => {
      exchange.onGone = (reason) => {
        calls++;
        resolve(reason);
      };
    });
    if (streaming) {
      exchange.sse().push("data: a\n\n", true);
      exchange.sse().flush();
      await client.until("the first event", () => client.received.includes("data: a"));
    }
    client.socket.destroy();
    assert.equal(await gone, "client-gone");
    assert.equal(exchange.gone, true);
    // Later answers go nowhere and harm nothing.
    exchange.sse().push("data: b\n\n", true);
    exchange.sse().flush();
    exchange.sse().end();
    exchange.json(200, {});
    exchange.sendError(new DynamoError("internal", "x"));
    await new Promise((resolve) => setImmediate(resolve));
    assert.equal(calls, 1);
  }
});

test("http: callbacks that throw are logged and cost their own connection only", async (t) => {
  const lines: string[] = [];
  const logger = createLogger({ level: "info", format: "jsonl", write: (line) => lines.push(line) });
  const held = heldRoute();
  const { port } = await startServer(t, [health, held.route], { logger, limits: { responseBufferBytes: 64 << 20 } });
  const leaving = await RawClient.open(t, port);
  leaving.post("/v1/held", "{}");
  const exchange = await held.next(1);
  exchange.onGone = () => {
    throw new Error("defect in onGone");
  };
  leaving.socket.destroy();
  const slow = await RawClient.open(t, port);
  slow.post("/v1/held", "{}");
  const sse = (await held.next(2)).sse();
  sse.onDrained = () => {
    throw new Error("defect in onDrained");
  };
  slow.socket.pause();
  for (let i = 0; i < 16; i++) {
    sse.push("x".repeat(1 << 20), true);
    sse.flush();
  }
  slow.socket.resume();
  await slow.untilClosed();
  assert.equal((await (await RawClient.open(t, port)).get("/health").answer()).status, 200);
  assert.match(lines[0]!, /a callback failed.*defect in onGone|defect in onGone.*a callback failed/);
  assert.match(lines[1]!, /defect in onDrained/);
});

test("http: onGone is not called when the answer was complete", async (t) => {
  const held = heldRoute();
  const { port } = await startServer(t, [held.route]);
  const client = await RawClient.open(t, port);
  client.post("/v1/held", "{}");
  const exchange = await held.next(1);
  exchange.onGone = () => assert.fail("called after the answer");
  exchange.json(200, {});
  await client.answer();
  client.socket.destroy();
  await client.untilClosed();
  assert.throws(() => exchange.json(200, {}), /answered twice/);
});

test("http: a client that leaves a whole answer unread is cut off; a quiet stream is not", async (t) => {
  const held = heldRoute();
  const { port } = await startServer(t, [held.route], { stalledWriteMs: 100 });
  const quiet = await RawClient.open(t, port);
  quiet.post("/v1/held", "{}");
  const stream = (await held.next(1)).sse();
  stream.push("data: a\n\n", true);
  stream.flush();
  const stuck = await RawClient.open(t, port);
  stuck.socket.pause();
  stuck.post("/v1/held", "{}");
  const text = "x".repeat(32 << 20);
  (await held.next(2)).json(200, text);
  // Longer than the limit: the paused client only learns of its end when it reads on.
  await new Promise((resolve) => setTimeout(resolve, 300));
  stuck.socket.resume();
  await stuck.untilClosed();
  assert.ok(stuck.received.length < text.length);
  stream.push("data: b\n\n", true);
  stream.end();
  assert.equal((await quiet.answer()).body, "data: a\n\ndata: b\n\n");
});

test("http: HTTP/1.0 clients get unframed streams that end with the connection", async (t) => {
  const held = heldRoute();
  const { port } = await startServer(t, [held.route]);
  const client = await RawClient.open(t, port);
  client.send("POST /v1/held HTTP/1.0\r\ncontent-length: 2\r\n\r\n{}");
  const stream = (await held.next(1)).sse();
  stream.push("data: a\n\n", true);
  stream.flush();
  stream.push("data: b\n\n", true);
  stream.end();
  const answer = await client.answer();
  assert.equal(answer.headers["transfer-encoding"], undefined);
  assert.equal(answer.body, "data: a\n\ndata: b\n\n");
});

test("http: a port that is taken is one clear sentence", async (t) => {
  const { port } = await startServer(t, [health]);
  const second = new HttpServer({
    host: "127.0.0.1",
    port,
    routes: [],
    limits: DEFAULT_LIMITS,
    logger: silentLogger,
    clock: systemClock,
    metrics: new Metrics(),
  });
  await assert.rejects(second.listen(), (error: DynamoError) => {
    assert.equal(error.reason, "address-in-use");
    assert.equal(error.publicMessage, `the address 127.0.0.1:${port} is already in use`);
    return true;
  });
  await second.close({ graceMs: 0 });
});

test("http: close lets running answers finish, closes idle connections at once, and asks for no reuse", async (t) => {
  const held = heldRoute();
  const { port, server } = await startServer(t, [health, held.route]);
  const idle = await RawClient.open(t, port);
  await idle.get("/health").answer();
  const streaming = await RawClient.open(t, port);
  const whole = await RawClient.open(t, port);
  streaming.post("/v1/held", "{}");
  const stream = (await held.next(1)).sse();
  stream.push("data: a\n\n", true);
  stream.flush();
  whole.post("/v1/held", "{}");
  const pending = await held.next(2);
  const closed = server.close({ graceMs: 60_000 });
  await idle.untilClosed();
  pending.json(200, {});
  assert.equal((await whole.answer()).headers.connection, "close");
  await whole.untilClosed();
  stream.push("data: b\n\n", true);
  stream.end();
  assert.equal((await streaming.answer()).body, "data: a\n\ndata: b\n\n");
  await streaming.untilClosed();
  await closed;
});

test("http: close cuts off what is still running when the grace is over", async (t) => {
  const held = heldRoute();
  const { port, server } = await startServer(t, [held.route]);
  const client = await RawClient.open(t, port);
  client.post("/v1/held", "{}");
  const exchange = await held.next(1);
  const gone = new Promise<string>((resolve) => (exchange.onGone = resolve));
  await server.close({ graceMs: 20 });
  assert.equal(await gone, "client-gone");
  await client.untilClosed();
});

test("http: random bytes never end the server", async (t) => {
  const { port } = await startServer(t, [echo, health]);
  const pieces = [
    "POST /v1/echo HTTP/1.1\r\n",
    "host: a\r\n",
    "content-length: 5\r\n",
    "\r\n",
    "{}",
    "0\r\n\r\n",
    "\0\xff",
    "GET ",
  ];
  let seed = 7;
  const next = (limit: number): number => (seed = (seed * 1_103_515_245 + 12_345) % 2_147_483_648) % limit;
  for (let round = 0; round < 60; round++) {
    const client = await RawClient.open(t, port);
    for (let i = next(8); i >= 0; i--) client.send(pieces[next(pieces.length)]!);
    client.socket.end();
    await once(client.socket, "close");
  }
  const client = await RawClient.open(t, port);
  assert.equal((await client.get("/health").answer()).status, 200);
});
