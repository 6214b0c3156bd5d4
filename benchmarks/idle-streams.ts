import { fork, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { connect, type Socket } from "node:net";
import { startInProcessCluster, until, type InProcessCluster } from "../test/helpers/in-process-cluster.ts";
import { machineLine, residentBytes, table } from "./harness.ts";

/**
 * Ten thousand streams that get a token every three seconds: what each costs, whether others are served as before,
 * and whether all of it comes back. Frontend and worker are this process, the clients are processes of their own.
 *
 * Usage: node benchmarks/idle-streams.ts [--streams=10000]
 */
const STREAMS = Number(process.argv.find((argument) => argument.startsWith("--streams="))?.split("=")[1] ?? 10_000);
/** Sockets of one client process: within the usual limit of open files. */
const PER_CLIENT = 2_500;

const IDLE = {
  kind: "echo",
  contextLength: 4_096,
  maxSequences: STREAMS,
  blockSizeTokens: 16,
  stepMs: 3_000,
} as const;
const QUICK = { ...IDLE, maxSequences: 64, stepMs: 0 } as const;

export async function run(): Promise<void> {
  console.log(machineLine());
  const cluster = await startInProcessCluster({
    workers: 0,
    frontend: {
      limits: {
        connections: STREAMS + 100,
        concurrentRequests: STREAMS + 100,
        requestTimeoutMs: 3_600_000,
        idleTimeoutMs: 0,
      },
    },
  });
  const clients: ChildProcess[] = [];
  try {
    await cluster.addWorker({ engine: IDLE, modelName: "idle" });
    await cluster.addWorker({ engine: QUICK, modelName: "quick" });
    await cluster.settled(2);
    await latency(cluster);
    const before = await memory();
    const quietMs = await latency(cluster);
    while (clients.length * PER_CLIENT < STREAMS) {
      const count = Math.min(PER_CLIENT, STREAMS - clients.length * PER_CLIENT);
      const client = fork(import.meta.filename, ["client", String(cluster.frontend.port), String(count)]);
      clients.push(client);
      await once(client, "message");
    }
    await until(async () => (await openCount(cluster)) === STREAMS, "all streams to be open", 60_000);
    const during = await memory();
    const busyMs = await latency(cluster);
    for (const client of clients) client.kill("SIGKILL");
    await until(async () => (await openCount(cluster)) === 0, "all streams to be gone", 60_000);
    const after = await memory();
    console.log(
      table(
        [
          {
            at: "before",
            "heap MB": before.heap / 1e6,
            "resident MB": before.resident / 1e6,
            "another request, ms": quietMs,
          },
          {
            at: `${STREAMS} idle`,
            "heap MB": during.heap / 1e6,
            "resident MB": during.resident / 1e6,
            "another request, ms": busyMs,
          },
          {
            at: "after",
            "heap MB": after.heap / 1e6,
            "resident MB": after.resident / 1e6,
            "another request, ms": await latency(cluster),
          },
        ],
        1,
      ),
    );
    const each = (a: number, b: number): string => ((b - a) / STREAMS / 1_000).toFixed(1);
    console.log(
      `\nan idle stream, frontend and worker together: ${each(before.heap, during.heap)} kB of heap, ${each(before.resident, during.resident)} kB resident`,
    );
  } finally {
    for (const client of clients) client.kill("SIGKILL");
    await cluster.stop();
  }
}

async function openCount({ baseUrl }: InProcessCluster): Promise<number> {
  const answer = await fetch(`${baseUrl}/v1/admin/requests?limit=1`);
  return ((await answer.json()) as { total: number }).total;
}

/** Mean over fifty requests, one after the other. */
async function latency({ baseUrl }: InProcessCluster): Promise<number> {
  const startMs = performance.now();
  for (let i = 0; i < 50; i++) {
    const answer = await fetch(`${baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "quick", prompt: "abc", max_tokens: 4 }),
    });
    if (answer.status !== 200) throw new Error(`status ${answer.status}`);
    await answer.text();
  }
  return (performance.now() - startMs) / 50;
}

async function memory(): Promise<{ heap: number; resident: number }> {
  for (let i = 0; i < 3; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return { heap: process.memoryUsage().heapUsed, resident: residentBytes(process.pid) };
}

/** A process with many clients that read and wait. */
async function runClient(port: number, count: number): Promise<void> {
  const body = JSON.stringify({ model: "idle", prompt: "abcdefgh", max_tokens: 4_000, stream: true, ignore_eos: true });
  const head = `POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n`;
  const sockets: Socket[] = [];
  const first: Promise<unknown>[] = [];
  // A hundred at a time: the listener's backlog has room for some hundreds.
  while (sockets.length < count) {
    const batch = Array.from({ length: Math.min(100, count - sockets.length) }, () => connect(port, "127.0.0.1"));
    await Promise.all(batch.map((socket) => once(socket, "connect")));
    for (const socket of batch) {
      first.push(once(socket, "data"));
      socket.write(head + body);
    }
    sockets.push(...batch);
  }
  await Promise.all(first);
  for (const socket of sockets) socket.resume();
  process.send!("open");
}

if (process.argv[2] === "client") await runClient(Number(process.argv[3]), Number(process.argv[4]));
else if (import.meta.main) {
  if (globalThis.gc === undefined) {
    // Heap figures need a collection before each; the benchmark starts itself again with the flag for it.
    const child = fork(import.meta.filename, process.argv.slice(2), { execArgv: ["--expose-gc"] });
    const [code] = (await once(child, "exit")) as [number | null];
    process.exitCode = code ?? 1;
  } else await run();
}
