import { fork } from "node:child_process";
import { once } from "node:events";
import { createServer, type AddressInfo } from "node:net";
import { generateLoad } from "../src/bench/index.ts";
import { table } from "./harness.ts";

/**
 * What the load generator itself costs, against a process that answers with ready-made bytes: its share must be small
 * beside what it measures (aims of the frontend: 150 us per request, 3 us per token). CPU time of this process only.
 */
const REQUEST_COUNT = 4_000;
const TOKEN_COUNT = 64;
const CONCURRENCY = 32;

function answerOf(kind: string): Buffer {
  if (kind === "json") {
    const body = JSON.stringify({
      choices: [{ message: { content: "x".repeat(600) } }],
      usage: { completion_tokens: 64 },
    });
    return Buffer.from(
      `HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`,
    );
  }
  const head =
    'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":[{';
  const event = `${head}"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n`;
  const chunk = (data: string) => `${data.length.toString(16)}\r\n${data}\r\n`;
  // Two events a chunk, as a frontend that is a little behind writes them.
  const events = chunk(event + event).repeat(TOKEN_COUNT / 2);
  const headers = "content-type: text/event-stream\r\ntransfer-encoding: chunked";
  return Buffer.from(`HTTP/1.1 200 OK\r\n${headers}\r\n\r\n${events}${chunk("data: [DONE]\n\n")}0\r\n\r\n`);
}

/** The other process: any bytes in are one request, as the generator writes each in one piece. */
async function serve(kind: string): Promise<void> {
  const answer = answerOf(kind);
  const server = createServer({ noDelay: true }, (socket) => {
    socket.on("data", () => socket.write(answer));
    socket.on("error", () => undefined);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  process.send!((server.address() as AddressInfo).port);
}

async function cpuMicroseconds(kind: "json" | "stream"): Promise<number> {
  const child = fork(import.meta.filename, ["serve", kind]);
  try {
    const [port] = (await once(child, "message")) as [number];
    const body = JSON.stringify({ model: "m", messages: [{ role: "user", content: "x".repeat(900) }] });
    const load = { host: "127.0.0.1", port, body, concurrency: CONCURRENCY };
    await generateLoad({ ...load, requestCount: REQUEST_COUNT / 4 });
    const before = process.cpuUsage();
    const report = await generateLoad({ ...load, requestCount: REQUEST_COUNT });
    const { user, system } = process.cpuUsage(before);
    if (report.okCount !== REQUEST_COUNT || report.tokenCount !== REQUEST_COUNT * TOKEN_COUNT) {
      throw new Error(`not all answers were read: ${JSON.stringify(report)}`);
    }
    return (user + system) / REQUEST_COUNT;
  } finally {
    child.kill();
    await once(child, "exit");
  }
}

export async function run(): Promise<void> {
  const perRequest = await cpuMicroseconds("json");
  const perStream = await cpuMicroseconds("stream");
  console.log(`${REQUEST_COUNT} requests of 1 kB over ${CONCURRENCY} connections`);
  console.log(
    table([
      { "load generator": "JSON answer", "CPU us": perRequest },
      { "load generator": `stream of ${TOKEN_COUNT} tokens`, "CPU us": perStream },
      { "load generator": "each token of it", "CPU us": (perStream - perRequest) / TOKEN_COUNT },
    ]),
  );
}

if (process.argv[2] === "serve") await serve(process.argv[3]!);
else if (import.meta.main) await run();
