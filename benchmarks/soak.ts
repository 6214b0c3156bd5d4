import { spawn, type ChildProcess } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { generateLoad, type LoadReport } from "../src/bench/index.ts";
import { until } from "../test/helpers/in-process-cluster.ts";
import { freePort } from "../test/helpers/process-cluster.ts";
import { machineLine, residentBytes, table } from "./harness.ts";

/**
 * Soak: a million mixed requests (short, long, whole and streamed, refused, cancelled half-way, read slowly) against a
 * frontend and two mock workers as processes. Memory must be flat and handles back to the start. At each of up to 80 samples the
 * load pauses, the processes collect their garbage (over the inspector), and what is in use, resident and open is taken;
 * the slope is fitted over the second half and stated per 100,000 requests.
 *
 * Environment: SOAK_REQUESTS (default 1,000,000), SOAK_SECONDS to stop earlier; the report says how many were really run.
 */
const REQUESTS = Number(process.env["SOAK_REQUESTS"] ?? 1_000_000);
const MAX_MS = Number(process.env["SOAK_SECONDS"] ?? Infinity) * 1_000;
const SAMPLES = Math.min(80, Math.max(4, Math.floor(REQUESTS / 2_500)));
const WORKERS = 2;
const MAIN = resolve(import.meta.dirname, "../src/cli/main.ts");
const MODEL = "mock";

/** Shares of the requests of a round. */
const SHARES = { whole: 0.5, streamed: 0.3, refused: 0.1, cancelled: 0.07, slow: 0.03 } as const;
type Kind = keyof typeof SHARES;

class Role {
  readonly name: string;
  readonly child: ChildProcess;
  readonly ready: Promise<void>;
  #inspector: WebSocket | undefined;
  #output = "";
  #nextId = 1;
  readonly #answers = new Map<number, (result: Answer) => void>();

  constructor(name: string, args: readonly string[]) {
    this.name = name;
    const env = Object.fromEntries(Object.entries(process.env).filter(([key]) => !key.startsWith("DYN_")));
    this.child = spawn(process.execPath, ["--inspect=127.0.0.1:0", MAIN, ...args], {
      env: { ...env, DYN_LOG: "error", DYN_CLUSTER_SECRET: "soak", DYN_SUPERVISED: "1" },
      stdio: ["ignore", "ignore", "pipe", "ipc"],
    });
    this.child.stderr!.on("data", (bytes: Buffer) => (this.#output = (this.#output + bytes.toString()).slice(-20_000)));
    const { promise, resolve: isReady, reject } = Promise.withResolvers<void>();
    this.child.once("message", () => isReady());
    this.child.once("exit", (code) => reject(new Error(`${name} ended with ${code}: ${this.#output}`)));
    this.ready = promise;
    promise.catch(() => undefined);
  }

  async inspect(): Promise<void> {
    let url: string | undefined;
    await until(() => (url = /ws:\/\/\S+/.exec(this.#output)?.[0]) !== undefined, `${this.name}'s inspector`);
    const inspector = new WebSocket(url!);
    this.#inspector = inspector;
    inspector.addEventListener("message", ({ data }) => {
      const { id, result } = JSON.parse(String(data)) as { id?: number; result?: Answer };
      if (id === undefined) return;
      this.#answers.get(id)?.(result ?? {});
      this.#answers.delete(id);
    });
    await new Promise((opened, failed) => {
      inspector.addEventListener("open", opened, { once: true });
      inspector.addEventListener("error", failed, { once: true });
    });
  }

  #ask(method: string, params: object = {}): Promise<Answer> {
    const id = this.#nextId++;
    const { promise, resolve: answered } = Promise.withResolvers<Answer>();
    this.#answers.set(id, answered);
    this.#inspector!.send(JSON.stringify({ id, method, params }));
    return promise;
  }

  async sample(): Promise<Taken> {
    await this.#ask("HeapProfiler.collectGarbage");
    const { usedSize = 0, embedderHeapUsedSize = 0, backingStorageSize = 0 } = await this.#ask("Runtime.getHeapUsage");
    const { result } = await this.#ask("Runtime.evaluate", {
      expression: "process.getBuiltinModule('v8').getHeapStatistics().total_physical_size",
    });
    const pid = this.child.pid!;
    const engineHeapBytes = Number(result?.value ?? 0);
    const files = fileBytes(pid);
    const resident = residentBytes(pid);
    return {
      heapBytes: usedSize + embedderHeapUsedSize,
      bufferBytes: backingStorageSize,
      residentBytes: resident,
      fileBytes: files,
      engineHeapBytes,
      restBytes: resident - files - engineHeapBytes - backingStorageSize,
      handles: readdirSync(`/proc/${pid}/fd`).length,
    };
  }

  async stop(): Promise<void> {
    this.#inspector?.close();
    if (this.child.exitCode !== null) return;
    const ended = new Promise((exited) => this.child.once("exit", exited));
    this.child.kill("SIGTERM");
    const timer = setTimeout(() => this.child.kill("SIGKILL"), 15_000);
    await ended;
    clearTimeout(timer);
  }
}

interface Answer extends Partial<Record<"usedSize" | "embedderHeapUsedSize" | "backingStorageSize", number>> {
  readonly result?: { readonly value: unknown };
}

interface Taken {
  readonly heapBytes: number;
  readonly bufferBytes: number;
  readonly residentBytes: number;
  /** Of it: pages of files, code and mapped libraries. */
  readonly fileBytes: number;
  /** Of it: what the JavaScript engine has from the system for its heap, in use or not. */
  readonly engineHeapBytes: number;
  /** Of it: what is left besides buffers: memory of native code and the allocator's own. */
  readonly restBytes: number;
  readonly handles: number;
}

function fileBytes(pid: number): number {
  const match = /^RssFile:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"));
  return Number(match?.[1] ?? 0) * 1_024;
}

// ---- Load ----

/** Different prompts, so that the prefix cache and the router's index are filled and evicted. */
function body(index: number, fields: object): string {
  const words = `${(index * 2_654_435_761) % 50_000} ${"lorem ipsum ".repeat(1 + (index % 12))}`;
  return JSON.stringify({ model: MODEL, prompt: words, ...fields });
}

const REFUSED = [
  (): string => "{",
  (index: number): string => body(index, { no_such_field: 1 }),
  (index: number): string => body(index, { max_tokens: "five" }),
  (index: number): string => body(index, { model: "no-such-model" }),
  (index: number): string => body(index, { max_tokens: 10_000_000 }),
] as const;

async function round(port: number, from: number, count: number): Promise<{ sent: number; failures: string[] }> {
  const failures: string[] = [];
  const of = (kind: Kind): number => Math.round(count * SHARES[kind]);
  const load = (requestCount: number, concurrency: number, make: (index: number) => string): Promise<LoadReport> =>
    generateLoad({
      host: "127.0.0.1",
      port,
      path: "/v1/completions",
      concurrency,
      requestCount,
      body: (index) => make(from + index),
    });
  const long = (index: number): number => (index % 20 === 0 ? 200 : 4);
  const [whole, streamed, refused] = await Promise.all([
    load(of("whole"), 24, (index) => body(index, { max_tokens: long(index) })),
    load(of("streamed"), 16, (index) => body(index, { max_tokens: long(index), stream: true })),
    load(of("refused"), 4, (index) => REFUSED[index % REFUSED.length]!(index)),
    streamsLeft(port, from, of("cancelled"), 8),
    streamsReadSlowly(port, from, of("slow"), 8),
  ]);
  if (whole.failedCount > 0) failures.push(`whole: ${JSON.stringify([whole.statuses, whole.errors])}`);
  if (streamed.failedCount > 0) failures.push(`streamed: ${JSON.stringify([streamed.statuses, streamed.errors])}`);
  if (refused.okCount > 0) failures.push(`refused: ${refused.okCount} were answered`);
  return { sent: of("whole") + of("streamed") + of("refused") + of("cancelled") + of("slow"), failures };
}

/** Clients that leave after the first bytes of a long answer. */
function streamsLeft(port: number, from: number, count: number, concurrency: number): Promise<void> {
  return rawStreams(port, from, count, concurrency, { max_tokens: 500, stream: true }, (socket) => {
    socket.once("data", () => socket.destroy());
  });
}

/** Clients that read a little, pause, and go on. */
function streamsReadSlowly(port: number, from: number, count: number, concurrency: number): Promise<void> {
  return rawStreams(port, from, count, concurrency, { max_tokens: 300, stream: true }, (socket) => {
    let pauses = 3;
    socket.on("data", () => {
      if (pauses-- <= 0) return;
      socket.pause();
      setTimeout(() => socket.resume(), 15);
    });
  });
}

async function rawStreams(
  port: number,
  from: number,
  count: number,
  concurrency: number,
  fields: object,
  read: (socket: ReturnType<typeof connect>) => void,
): Promise<void> {
  let next = 0;
  const loop = async (): Promise<void> => {
    while (next < count) {
      const text = body(from + next++, fields);
      const socket = connect({ port, host: "127.0.0.1", noDelay: true });
      const closed = new Promise((resolveClosed) => socket.once("close", resolveClosed));
      socket.on("error", () => undefined);
      read(socket);
      socket.write(
        `POST /v1/completions HTTP/1.1\r\nhost: soak\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(text)}\r\n\r\n${text}`,
      );
      await closed;
    }
  };
  await Promise.all(Array.from({ length: concurrency }, loop));
}

// ---- The run ----

/** Least squares, per 100,000 requests. */
export function slopePer100k(points: readonly (readonly [requests: number, value: number])[]): number {
  const count = points.length;
  const meanX = points.reduce((sum, [x]) => sum + x, 0) / count;
  const meanY = points.reduce((sum, [, y]) => sum + y, 0) / count;
  let above = 0;
  let below = 0;
  for (const [x, y] of points) {
    above += (x - meanX) * (y - meanY);
    below += (x - meanX) ** 2;
  }
  return below === 0 ? 0 : (above / below) * 100_000;
}

export async function run(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "dynamo-soak-"));
  const planes = `--file-kv=${folder}`;
  const port = await freePort();
  const roles = [
    new Role("frontend", ["frontend", `--http-port=${port}`, "--router-mode=kv", planes]),
    ...Array.from(
      { length: WORKERS },
      (_, index) =>
        new Role(`worker ${index}`, [
          "mocker",
          "--speedup-ratio=0",
          `--model-name=${MODEL}`,
          "--num-gpu-blocks-override=2048",
          "--max-num-seqs=64",
          planes,
        ]),
    ),
  ];
  const samples: { requests: number; taken: Taken[] }[] = [];
  const failures: string[] = [];
  const startedMs = performance.now();
  let requests = 0;
  try {
    await Promise.all(roles.map((role) => role.ready));
    await Promise.all(roles.map((role) => role.inspect()));
    await until(async () => {
      const health = (await (await fetch(`http://127.0.0.1:${port}/health`)).json()) as { instances: unknown[] };
      return health.instances.length === WORKERS;
    }, "the workers");
    const perRound = Math.ceil(REQUESTS / SAMPLES);
    const handlesAtStart = await Promise.all(roles.map(async (role) => (await role.sample()).handles));
    while (requests < REQUESTS && performance.now() - startedMs < MAX_MS) {
      const done = await round(port, requests, perRound);
      requests += done.sent;
      failures.push(...done.failures);
      await atRest(port);
      samples.push({ requests, taken: await Promise.all(roles.map((role) => role.sample())) });
      process.stderr.write(`${requests} requests, ${Math.round((performance.now() - startedMs) / 1_000)} s\r`);
    }
    // The client's keep-alive connections are closed; the frontend's own close a moment later.
    await until(
      async () => (await roles[0]!.sample()).handles <= handlesAtStart[0]! + 1,
      "the frontend's handles",
    ).catch((thrown: unknown) => failures.push(String(thrown)));
    const handlesAtEnd = await Promise.all(roles.map(async (role) => (await role.sample()).handles));
    report(roles, samples, handlesAtStart, handlesAtEnd, requests, performance.now() - startedMs);
  } finally {
    await Promise.all(roles.map((role) => role.stop()));
    rmSync(folder, { recursive: true, force: true });
  }
  for (const failure of failures.slice(0, 20)) console.error(`FAILED ${failure}`);
  if (failures.length > 0) process.exitCode = 1;
}

/** The workers have heard of every cancel. */
async function atRest(port: number): Promise<void> {
  await until(
    async () => {
      const text = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
      return [
        ...text.matchAll(/^(?:dynamo_request_plane_inflight|dynamo_frontend_active_requests\{[^}]*\}) (\S+)$/gm),
      ].every(([, value]) => Number(value) === 0);
    },
    "rest",
    60_000,
  );
}

function report(
  roles: readonly Role[],
  samples: readonly { requests: number; taken: readonly Taken[] }[],
  handlesAtStart: readonly number[],
  handlesAtEnd: readonly number[],
  requests: number,
  wallMs: number,
): void {
  const later = samples.slice(samples.length >> 1);
  const slope = (index: number, of: keyof Taken): number =>
    slopePer100k(later.map(({ requests: at, taken }) => [at, taken[index]![of]]));
  const mib = (bytes: number): string => (bytes / 2 ** 20).toFixed(1);
  const kib = (bytes: number): string => (bytes / 1024).toFixed(0);
  console.log(machineLine());
  console.log(
    `${requests} requests in ${Math.round(wallMs / 1_000)} s, ${samples.length} samples; slopes over the second half`,
  );
  console.log(
    table(
      roles.map((role, index) => ({
        process: role.name,
        "heap, half and end (MiB)": `${mib(later[0]!.taken[index]!.heapBytes)} / ${mib(later.at(-1)!.taken[index]!.heapBytes)}`,
        "heap per 100k (KiB)": kib(slope(index, "heapBytes")),
        "buffers per 100k (KiB)": kib(slope(index, "bufferBytes")),
        "resident, half and end (MiB)": `${mib(later[0]!.taken[index]!.residentBytes)} / ${mib(later.at(-1)!.taken[index]!.residentBytes)}`,
        "resident per 100k (KiB)": kib(slope(index, "residentBytes")),
        "of it files, engine's heap, rest": `${kib(slope(index, "fileBytes"))}, ${kib(slope(index, "engineHeapBytes"))}, ${kib(slope(index, "restBytes"))}`,
        "handles, start and end": `${handlesAtStart[index]} / ${handlesAtEnd[index]}`,
      })),
    ),
  );
}

if (import.meta.main) await run();
