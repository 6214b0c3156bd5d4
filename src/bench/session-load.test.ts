import assert from "node:assert/strict";
import { createServer, type IncomingMessage, type RequestListener, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import test from "node:test";
import { generateSessionLoad, type LoadSession, type SessionLoadOptions, type SessionLoadReport } from "./session-load.ts"; // prettier-ignore

type Answer = (request: IncomingMessage, response: ServerResponse, body: string) => void;

function answerStream(response: ServerResponse, tokens: readonly string[], usage: string): void {
  response.setHeader("content-type", "text/event-stream");
  for (const token of tokens) response.write(`data: {"choices":[{"text":${JSON.stringify(token)}}],"usage":null}\n\n`);
  response.end(`data: {"choices":[],"usage":${usage}}\n\ndata: [DONE]\n\n`);
}

const USAGE =
  '{"prompt_tokens":10,"completion_tokens":3,"total_tokens":13,"prompt_tokens_details":{"cached_tokens":4}}';
const ok: Answer = (_request, response) => answerStream(response, ["a", '"usage":{"cached_tokens":9}', "c"], USAGE);

interface Served {
  readonly url: URL;
  readonly connections: () => number;
}

/** Runs `body` against a server; afterwards there is none, and no connection of ours. */
async function withServer(answer: Answer, body: (served: Served) => Promise<void>): Promise<void> {
  const listener: RequestListener = (request, response) => {
    let text = "";
    request.setEncoding("utf8").on("data", (piece: string) => (text += piece));
    request.on("end", () => answer(request, response, text));
  };
  let connections = 0;
  const server = createServer(listener).on("connection", () => connections++);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = new URL(`http://127.0.0.1:${(server.address() as AddressInfo).port}/v1/completions`);
  try {
    await body({ url, connections: () => connections });
  } finally {
    server.closeAllConnections();
    await new Promise<void>((resolve) => server.close(() => resolve()));
  }
}

function aSession(arrivalMs: number, bodies: readonly string[] = ["{}"], delayMs = 0): LoadSession {
  return { arrivalMs, requests: bodies.map((body) => ({ delayMs, body: () => body })).values() };
}

function load(url: URL, sessions: readonly LoadSession[], more: Partial<SessionLoadOptions> = {}) {
  return generateSessionLoad({ url, sessions, maxInFlight: 100, timeoutMs: 10_000, timeLimitMs: 10_000, ...more });
}

/** What must hold for any run. */
function checkReport(report: SessionLoadReport): void {
  const ends = [...Object.values(report.statuses), ...Object.values(report.errors)];
  assert.equal(ends.reduce((sum, count) => sum + count, 0), report.requestCount, "every request ends once"); // prettier-ignore
  assert.equal(report.okCount + report.failedCount, report.requestCount);
  assert.equal(report.lateMs.count, report.requestCount);
}

test("session load: sums usage over the answers, the real one and not what a text looks like", async () => {
  await withServer(ok, async ({ url }) => {
    const report = await load(url, [aSession(0), aSession(1), aSession(2), aSession(3)]);
    checkReport(report);
    assert.deepEqual([report.okCount, report.promptTokens, report.cachedTokens, report.outputTokens], [4, 40, 16, 12]);
    assert.equal(report.hitRate, 0.4);
    assert.deepEqual([report.ttftMs.count, report.itlMs.count, report.latencyMs.count], [4, 8, 4]);
    assert.equal(report.endedBy, "last-session");
  });
});

test("session load: a session begins when its time has come, though no answer came before", async () => {
  const held: (() => void)[] = [];
  const hold: Answer = (request, response, body) => {
    held.push(() => ok(request, response, body));
    // The first is only answered once all are there: a closed loop would wait for ever.
    if (held.length === 3) for (const release of held) release();
  };
  await withServer(hold, async ({ url }) => {
    const report = await load(url, [aSession(0), aSession(20), aSession(40)]);
    checkReport(report);
    assert.equal(report.okCount, 3);
    assert.ok(report.wallMs >= 39, String(report.wallMs));
  });
});

test("session load: the requests of a session follow each other with their pauses, on one connection", async () => {
  const seen: { body: string; atMs: number }[] = [];
  const note: Answer = (request, response, body) => {
    seen.push({ body, atMs: performance.now() });
    ok(request, response, body);
  };
  await withServer(note, async ({ url, connections }) => {
    const report = await load(url, [aSession(0, ["1", "2", "3"], 20)]);
    checkReport(report);
    assert.deepEqual(seen.map(({ body }) => body), ["1", "2", "3"]); // prettier-ignore
    assert.ok(seen[2]!.atMs - seen[0]!.atMs >= 38);
    assert.equal(connections(), 1);
  });
});

test("session load: closed loop keeps so many sessions going and no more, whatever their arrival", async () => {
  const held: (() => void)[] = [];
  let most = 0;
  // Answers come when three wait: fewer sessions at a time would wait for ever.
  const count: Answer = (request, response, body) => {
    most = Math.max(
      most,
      held.push(() => ok(request, response, body)),
    );
    if (held.length === 3) setImmediate(() => held.splice(0).forEach((release) => release()));
  };
  await withServer(count, async ({ url, connections }) => {
    const sessions = Array.from({ length: 30 }, (_, i) => aSession(i * 1e9));
    const report = await load(url, sessions, { concurrency: 3 });
    checkReport(report);
    assert.deepEqual([report.okCount, most, connections()], [30, 3, 3]);
  });
});

test("session load: one request more than may be under way is not sent and counted as overload", async () => {
  const held: (() => void)[] = [];
  const hold: Answer = (request, response, body) => {
    held.push(() => ok(request, response, body));
    if (held.length === 2) for (const release of held.splice(0)) release();
  };
  await withServer(hold, async ({ url }) => {
    const sessions = Array.from({ length: 5 }, () => aSession(0, ["{}", "{}"]));
    const report = await load(url, sessions, { maxInFlight: 2 });
    checkReport(report);
    assert.equal(report.overloadCount, 3);
    assert.equal(report.okCount, 4);
  });
});

test("session load: a failed request ends its session, named by what went wrong", async () => {
  const answers: Record<string, Answer> = {
    refused: (_request, response) => response.writeHead(529).end("{}"),
    unfinished: (_request, response) => {
      response.setHeader("content-type", "text/event-stream");
      response.end('data: {"choices":[{"text":"x"}]}\n\n');
    },
    error: (_request, response) => {
      response.setHeader("content-type", "text/event-stream");
      response.end('data: {"error":{"message":"no"}}\n\ndata: [DONE]\n\n');
    },
    cut: (_request, response) => {
      response.writeHead(200, { "content-length": "10" });
      response.write("12345", () => response.destroy());
    },
    silent: () => undefined,
    garbage: (_request, response) => response.socket!.end("SSH-2.0-x\r\n\r\n"),
  };
  await withServer(
    (request, response, body) => answers[body]!(request, response, body),
    async ({ url }) => {
      const sessions = Object.keys(answers).map((kind) => aSession(0, [kind, "refused"]));
      const report = await load(url, sessions, { timeoutMs: 300 });
      checkReport(report);
      assert.deepEqual(report.statuses, { 529: 1 });
      assert.deepEqual(report.errors, { "stream-broken": 2, "closed-early": 1, timeout: 1, malformed: 1 });
      assert.equal(report.hitRate, undefined);
    },
  );
});

test("session load: a server that is not there fails each session at once", async () => {
  let gone = new URL("http://127.0.0.1/");
  await withServer(ok, ({ url }) => Promise.resolve(void (gone = url)));
  const report = await load(gone, [aSession(0), aSession(1)]);
  checkReport(report);
  assert.deepEqual(report.errors, { connect: 2 });
});

test("session load: a kept connection that the server closed meanwhile costs no request", async () => {
  let count = 0;
  const closing: Answer = (request, response, body) => {
    ok(request, response, body);
    // Without saying so: the next request may already be on its way.
    if (count++ === 0) response.on("finish", () => response.socket?.destroySoon());
  };
  await withServer(closing, async ({ url }) => {
    const report = await load(url, [aSession(0, ["1", "2", "3"])]);
    checkReport(report);
    assert.deepEqual([report.okCount, report.errors], [3, {}]);
  });
});

test("session load: after the time limit nothing begins and what is under way is finished", async () => {
  const slow: Answer = (request, response, body) => setTimeout(() => ok(request, response, body), 120);
  await withServer(slow, async ({ url }) => {
    const report = await load(url, [aSession(0, ["1", "2"]), aSession(5_000)], { timeLimitMs: 60 });
    checkReport(report);
    assert.deepEqual([report.endedBy, report.okCount, report.notStartedCount], ["time-limit", 1, 1]);
    assert.ok(report.wallMs < 4_000);
  });
});

test("session load: the signal ends it at once with the report so far", async () => {
  const leave = new AbortController();
  let count = 0;
  const answer: Answer = (request, response, body) => {
    if (count++ === 0) ok(request, response, body);
    else leave.abort();
  };
  await withServer(answer, async ({ url }) => {
    const sessions = [aSession(0, ["1", "2"]), aSession(60_000), aSession(0, ["3"], 60_000)];
    const report = await load(
      url,
      sessions.toSorted((a, b) => a.arrivalMs - b.arrivalMs),
      { signal: leave.signal },
    );
    checkReport(report);
    assert.deepEqual([report.endedBy, report.okCount, report.errors], ["signal", 1, { aborted: 1 }]);
    assert.equal(report.notStartedCount, 1);
    const none = await load(url, [aSession(0)], { signal: leave.signal });
    assert.deepEqual([none.requestCount, none.notStartedCount], [0, 1]);
  });
});

test("session load: what the caller's own code throws is the run's error", async () => {
  await withServer(ok, async ({ url }) => {
    const broken = {
      delayMs: 0,
      body: (): string => {
        throw new RangeError("no body");
      },
    };
    await assert.rejects(load(url, [aSession(0), { arrivalMs: 0, requests: [broken].values() }]), /no body/);
  });
});
