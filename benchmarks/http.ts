import { fork, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { createServer } from "node:http";
import { connect, type AddressInfo, type Socket } from "node:net";
import { DEFAULT_LIMITS } from "../src/frontend/config.ts";
import { HttpServer, type Route } from "../src/frontend/http/server.ts";
import { ChatStreamWriter, ChatWholeWriter } from "../src/frontend/openai/chat-writer.ts";
import { readChatRequest } from "../src/frontend/openai/validate-chat.ts";
import { Metrics, silentLogger } from "../src/observability/index.ts";
import { systemClock } from "../src/std/index.ts";

/**
 * CPU time (user + system, the kernel's accounting) of the HTTP edge per request and per SSE chunk, beside a bare
 * node:http server that does the least: collect the body, `JSON.parse`, `res.end` or `res.write`. Each server runs in a
 * process of its own; the load comes from this one. Loopback charges the receiver's TCP work to the sender.
 */
const CONNECTIONS = 32;
const REQUESTS = 12_000;
const STREAMS = 64;
const CHUNKS = 600;
const TOKEN = " token";
const USAGE = { promptTokens: 200, completionTokens: CHUNKS, cachedTokens: 0 };

function chatBody(stream: boolean): string {
  const content = "The quick brown fox jumps over the lazy dog. ".repeat(18);
  const messages = [
    { role: "system", content: "You are a helpful assistant." },
    { role: "user", content },
  ];
  return JSON.stringify({ model: "m", messages, temperature: 0.7, max_tokens: 128, stream });
}

// The servers, each in a child process.

type Kind = "bare" | "ours";

/** Calls `step` for every open stream once per loop turn, as engine steps do. */
class Stepper {
  readonly #open = new Set<() => boolean>();

  add(step: () => boolean): void {
    this.#open.add(step);
    if (this.#open.size === 1) setImmediate(() => this.#turn());
  }

  #turn(): void {
    for (const step of this.#open) if (!step()) this.#open.delete(step);
    if (this.#open.size > 0) setImmediate(() => this.#turn());
  }
}

async function startBare(): Promise<number> {
  const stepper = new Stepper();
  const server = createServer((request, response) => {
    const parts: Buffer[] = [];
    request.on("data", (part: Buffer) => parts.push(part));
    request.on("end", () => {
      const body = JSON.parse(Buffer.concat(parts).toString()) as { stream: boolean; model: string };
      if (!body.stream) {
        const text = JSON.stringify({ model: body.model, choices: [{ message: { content: TOKEN } }] });
        response.writeHead(200, { "content-type": "application/json", "content-length": text.length });
        response.end(text);
        return;
      }
      response.writeHead(200, { "content-type": "text/event-stream" });
      let left = CHUNKS;
      stepper.add(() => {
        const choices = [{ index: 0, delta: { content: TOKEN }, logprobs: null, finish_reason: null }];
        const chunk = { id: "chatcmpl-0", object: "chat.completion.chunk", created: 0, model: body.model, choices };
        response.write(`data: ${JSON.stringify(chunk)}\n\n`);
        if (--left > 0) return true;
        response.end("data: [DONE]\n\n");
        return false;
      });
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return (server.address() as AddressInfo).port;
}

async function startOurs(deltasPerFlush: number): Promise<number> {
  const stepper = new Stepper();
  const chat: Route = {
    method: "POST",
    path: "/v1/chat/completions",
    family: "openai",
    handle: (exchange) => {
      const { model, options } = readChatRequest(exchange.body, DEFAULT_LIMITS);
      const details = { exchange, id: "0", model, created: 0, choices: 1, includeUsage: false };
      const writer = options.stream ? new ChatStreamWriter(details) : new ChatWholeWriter(details);
      if (!options.stream) {
        writer.delta(0, TOKEN, undefined);
        writer.finish(0, "stop");
        writer.complete(USAGE);
        return;
      }
      let left = CHUNKS;
      stepper.add(() => {
        for (let i = 0; i < deltasPerFlush && left > 0; i++, left--) writer.delta(0, TOKEN, undefined);
        writer.flush();
        if (left > 0) return true;
        writer.finish(0, "length");
        writer.complete(USAGE);
        return false;
      });
    },
  };
  const server = new HttpServer({
    host: "127.0.0.1",
    port: 0,
    limits: DEFAULT_LIMITS,
    routes: [chat],
    logger: silentLogger,
    clock: systemClock,
    metrics: new Metrics(),
  });
  return (await server.listen()).port;
}

async function serve(kind: Kind, deltasPerFlush: number): Promise<void> {
  const port = kind === "bare" ? await startBare() : await startOurs(deltasPerFlush);
  process.on("message", () => process.send!(process.cpuUsage()));
  process.on("disconnect", () => process.exit(0));
  process.send!({ port });
}

// The load.

interface ServerProcess {
  readonly child: ChildProcess;
  readonly port: number;
}

async function spawn(kind: Kind, deltasPerFlush: number): Promise<ServerProcess> {
  const child = fork(import.meta.filename, ["--serve", kind, String(deltasPerFlush)]);
  const [{ port }] = (await once(child, "message")) as [{ port: number }];
  return { child, port };
}

async function cpuUs(child: ChildProcess): Promise<number> {
  child.send("cpu");
  const [usage] = (await once(child, "message")) as [NodeJS.CpuUsage];
  return usage.user + usage.system;
}

async function open(port: number): Promise<Socket> {
  const socket = connect({ port, host: "127.0.0.1", noDelay: true });
  await once(socket, "connect");
  return socket;
}

function request(stream: boolean): string {
  const body = chatBody(stream);
  return (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n" +
    `content-length: ${body.length}\r\n\r\n${body}`
  );
}

/** Every answer of one server has the same length, learned from the first one. */
async function driveRequests(port: number, count: number): Promise<void> {
  const bytes = request(false);
  const probe = await open(port);
  probe.write(bytes);
  const [first] = (await once(probe, "data")) as [Buffer];
  probe.destroy();
  if (!first.toString("latin1").startsWith("HTTP/1.1 200")) throw new Error(first.toString());
  let left = count;
  const connection = async (): Promise<void> => {
    const socket = await open(port);
    await new Promise<void>((resolve) => {
      let got = 0;
      const next = (): void => {
        if (left-- > 0) socket.write(bytes);
        else resolve();
      };
      socket.on("data", (part: Buffer) => {
        got += part.length;
        if (got < first.length) return;
        got = 0;
        next();
      });
      next();
    });
    socket.destroy();
  };
  await Promise.all(Array.from({ length: CONNECTIONS }, connection));
}

async function driveStreams(port: number): Promise<void> {
  const stream = async (): Promise<void> => {
    const socket = await open(port);
    socket.write(request(true));
    await new Promise<void>((resolve) => {
      socket.on("data", (part: Buffer) => {
        if (part.subarray(-7).toString("latin1") === "\r\n0\r\n\r\n") resolve();
      });
    });
    socket.destroy();
  };
  await Promise.all(Array.from({ length: STREAMS }, stream));
}

interface Cost {
  requestUs: number;
  chunkUs: number;
}

async function measure(server: ServerProcess, drive: () => Promise<void>, count: number): Promise<number> {
  const before = await cpuUs(server.child);
  await drive();
  return ((await cpuUs(server.child)) - before) / count;
}

/** Rounds of all servers take turns, so that a noisy minute hits all of them; the best of each counts. */
async function measureAll(servers: readonly ServerProcess[]): Promise<Cost[]> {
  const costs = servers.map(() => ({ requestUs: Number.POSITIVE_INFINITY, chunkUs: Number.POSITIVE_INFINITY }));
  for (let round = 0; round < 4; round++) {
    for (const [index, server] of servers.entries()) {
      const requestUs = await measure(server, () => driveRequests(server.port, REQUESTS), REQUESTS);
      const chunkUs = await measure(server, () => driveStreams(server.port), STREAMS * CHUNKS);
      if (round === 0) continue;
      const cost = costs[index]!;
      cost.requestUs = Math.min(cost.requestUs, requestUs);
      cost.chunkUs = Math.min(cost.chunkUs, chunkUs);
    }
  }
  return costs;
}

function measureValidation(): void {
  const text = chatBody(true);
  const body: unknown = JSON.parse(text);
  const calls = 100_000;
  const perCall = (work: () => unknown): number => {
    let best = Number.POSITIVE_INFINITY;
    for (let round = 0; round < 4; round++) {
      const startMs = performance.now();
      for (let i = 0; i < calls; i++) work();
      best = Math.min(best, ((performance.now() - startMs) * 1_000) / calls);
    }
    return best;
  };
  const validate = perCall(() => readChatRequest(body, DEFAULT_LIMITS));
  const parse = perCall(() => JSON.parse(text) as unknown);
  console.log(`  validation of a usual chat body: ${validate.toFixed(2)} us (JSON.parse of it ${parse.toFixed(2)} us)`);
}

export async function run(): Promise<void> {
  console.log(
    `HTTP edge, CPU us (best of 3): requests of ${chatBody(false).length} B, ${STREAMS} streams of ${CHUNKS} chunks`,
  );
  const servers = await Promise.all([spawn("bare", 1), spawn("ours", 1), spawn("ours", 4)]);
  const costs = await measureAll(servers);
  for (const { child } of servers) {
    const exited = once(child, "exit");
    child.disconnect();
    await exited;
  }
  const [bare, ours, packed] = costs as [Cost, Cost, Cost];
  const ratio = (a: number, b: number): string => `${(a / b).toFixed(2)} of bare`;
  console.log(
    `  request: bare node:http ${bare.requestUs.toFixed(1)}, ours with validation ${ours.requestUs.toFixed(1)} (${ratio(ours.requestUs, bare.requestUs)})`,
  );
  console.log(
    `  chunk:   bare node:http ${bare.chunkUs.toFixed(2)}, ours ${ours.chunkUs.toFixed(2)} (${ratio(ours.chunkUs, bare.chunkUs)}), four tokens a write ${packed.chunkUs.toFixed(2)}`,
  );
  measureValidation();
}

if (process.argv[2] === "--serve") await serve(process.argv[3] as Kind, Number(process.argv[4]));
else if (import.meta.main) await run();
