import { execFileSync, spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { closeSync, fsyncSync, openSync } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { nixlForTests } from "../test/helpers/nixl.ts";
import { PeerProcess } from "../src/transfer/fixtures/peer.ts";
import { DescriptorList, TransferAgent, type BackendName, type PreparedTable } from "../src/transfer/index.ts";
import { cpuTimeOf, median, table } from "./harness.ts";

/**
 * Blocks between two processes, and to files and objects, beside a plain program that does nothing but move the same bytes
 * through the same medium in the same run: a C program (write/read on a socket, memcpy into a mapped tmpfs file) where the
 * machine has a compiler. Blocks of 360 kB and of 33 kB (SmolLM2's KV block), in scattered order so that neighbours are never
 * merged. Each of our rounds stands between two rounds of the plain program and is compared with their mean; medians of the
 * ratios. CPU is that of both processes, per gigabyte (10^9 bytes).
 */
const REGION_BYTES = 64 * 1024 * 1024;
const ROUNDS = 5;
const PASSES = { fast: 6, slow: 3 };
const BLOCKS = [360 * 1024, 33 * 1024] as const;

const PLAIN_C = String.raw`
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
static char *memory(size_t n, int value) { char *p = malloc(n); memset(p, value, n); return p; }
int main(int argc, char **argv) {
  const char *mode = argv[1]; size_t region = strtoull(argv[2], 0, 10), block = strtoull(argv[3], 0, 10), total = strtoull(argv[4], 0, 10);
  size_t blocks = region / block; double start, seconds;
  if (!strcmp(mode, "shm")) {
    int fd = open(argv[5], O_RDWR | O_CREAT | O_TRUNC, 0600); if (fd < 0 || ftruncate(fd, region)) return 1;
    char *to = mmap(0, region, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *from = memory(region, 3); memset(to, 1, region);
    start = now(); size_t done = 0;
    for (size_t i = 0; done < total; i++, done += block) memcpy(to + (i * 7919 % blocks) * block, from + (i % blocks) * block, block);
    seconds = now() - start; unlink(argv[5]); printf("%f\n", done / seconds / 1e9); return 0;
  }
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1; struct sockaddr_in at = { .sin_family = AF_INET }; socklen_t length = sizeof at;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK); bind(listener, (void *)&at, sizeof at); listen(listener, 1); getsockname(listener, (void *)&at, &length);
  pid_t child = fork();
  if (child == 0) {
    int s = socket(AF_INET, SOCK_STREAM, 0); connect(s, (void *)&at, sizeof at); setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    char *from = memory(region, 3); size_t done = 0; char go; if (read(s, &go, 1) != 1) return 1;
    for (size_t i = 0; done < total; i++, done += block)
      for (size_t sent = 0; sent < block;) { ssize_t n = write(s, from + (i % blocks) * block + sent, block - sent); if (n <= 0) return 1; sent += n; }
    return 0;
  }
  int s = accept(listener, 0, 0); char *to = memory(region, 1); size_t done = 0; start = now(); if (write(s, "g", 1) != 1) return 1;
  for (size_t i = 0; done < total; i++, done += block)
    for (size_t got = 0; got < block;) { ssize_t n = read(s, to + (i * 7919 % blocks) * block + got, block - got); if (n <= 0) return 1; got += n; }
  seconds = now() - start; waitpid(child, 0, 0); printf("%f\n", done / seconds / 1e9); return 0;
}
`;

type Row = Record<string, string | number>;

/** Gigabytes per second of the plain program over one round. */
type Plain = (blockBytes: number, totalBytes: number) => number;

async function main(): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-bench-transfer-"));
  try {
    const program = await compile(folder);
    const call =
      (mode: string, path: string): Plain =>
      (blockBytes, totalBytes) =>
        Number(
          execFileSync(program, [mode, String(REGION_BYTES), String(blockBytes), String(totalBytes), path], {
            encoding: "utf8",
          }),
        );
    const tcp = call("tcp", "");
    const shm = call("shm", join("/dev/shm", `dynamo-bench-${process.pid}`));
    const rows: Row[] = [];
    const { libraryFolder, reason } = await nixlForTests();
    await between(rows, { name: "tcp", backend: "tcp", agent: { shm: false }, plain: tcp, passes: PASSES.fast });
    await between(rows, {
      name: "shm",
      backend: "shm",
      agent: { shm: {}, tcp: false },
      plain: shm,
      passes: PASSES.fast,
    });
    if (libraryFolder === undefined) console.log(`nixl: not measured: ${reason}`);
    else {
      process.env["UCX_TLS"] = "tcp";
      const agent = { shm: false, tcp: false, nixl: { libraryFolder } } as const;
      await between(rows, { name: "nixl, UCX over TCP", backend: "nixl", agent, plain: tcp, passes: PASSES.slow });
    }
    console.log("between two processes; plain: a C program, 360 kB blocks, same medium (nixl: beside tcp's)\n");
    console.log(table(rows));
    const stored: Row[] = [];
    await files(stored, folder);
    await objects(stored, folder);
    console.log("\nstorage, one process\n");
    console.log(table(stored));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

async function compile(folder: string): Promise<string> {
  const source = join(folder, "plain.c");
  const program = join(folder, "plain");
  await writeFile(source, PLAIN_C);
  try {
    execFileSync("cc", ["-O2", "-o", program, source], { stdio: ["ignore", "ignore", "pipe"] });
  } catch (cause) {
    throw new Error("this benchmark compares with a C program and found no working compiler (cc)", { cause });
  }
  return program;
}

interface Between {
  readonly name: string;
  readonly backend: BackendName;
  readonly agent: Parameters<typeof PeerProcess.start>[0]["agent"] extends infer A ? Omit<A, "name"> : never;
  readonly plain: Plain;
  readonly passes: number;
}

async function between(rows: Row[], { name, backend, agent: options, plain, passes }: Between): Promise<void> {
  const child = await PeerProcess.start({
    agent: { ...options, name: "peer" } as never,
    byteLength: REGION_BYTES,
    fill: 3,
  });
  const agent = await TransferAgent.start({ ...(options as object), name: "initiator" });
  try {
    const local = await agent.allocate(REGION_BYTES);
    local.bytes.fill(5);
    const peer = agent.addPeer(child.metadata);
    const [remote] = peer.metadata.regions.values();
    for (const blockBytes of BLOCKS) {
      const lists = {
        local: DescriptorList.blocks(local, { blockBytes }),
        remote: DescriptorList.blocks(remote!, { blockBytes }),
      };
      const prepared = agent.prepare(peer, lists, { backend });
      for (const operation of ["read", "write"] as const) {
        const round = (): Promise<number> => moveAll(agent, prepared, operation, passes);
        const roundBytes = passes * lists.local.count * blockBytes;
        await round();
        const rates: number[] = [];
        const ratios: number[] = [];
        let cpuSeconds = 0;
        let before = plain(BLOCKS[0], roundBytes);
        for (let i = 0; i < ROUNDS; i++) {
          const cpu = totalCpu() + (await child.cpuSeconds());
          const rate = await round();
          cpuSeconds += totalCpu() + (await child.cpuSeconds()) - cpu;
          const after = plain(BLOCKS[0], roundBytes);
          rates.push(rate);
          ratios.push(rate / ((before + after) / 2));
          before = after;
        }
        rows.push({
          "back end": name,
          "block kB": blockBytes / 1024,
          operation,
          "GB/s": median(rates),
          "of plain %": Math.round(median(ratios) * 100),
          "CPU s/GB": cpuSeconds / ((ROUNDS * roundBytes) / 1e9),
        });
      }
    }
  } finally {
    await agent.close();
    await child.close();
  }
}

function totalCpu(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
}

/** Every block of the table, scattered, `passes` times with two batches in flight; GB/s. */
async function moveAll(
  agent: TransferAgent,
  prepared: PreparedTable,
  operation: "read" | "write",
  passes: number,
): Promise<number> {
  const { count } = prepared.local;
  const here = Uint32Array.from({ length: count }, (_, i) => i);
  // 7919 is prime and larger than the counts' factors: a permutation that leaves no neighbours.
  const there = here.map((i) => (i * 7_919) % count);
  const startMs = performance.now();
  let posted = 0;
  const lane = async (): Promise<void> => {
    while (posted++ < passes) await agent.transfer(operation, prepared, here, there).done;
  };
  await Promise.all([lane(), lane()]);
  return (passes * prepared.local.byteCount) / 1e6 / (performance.now() - startMs);
}

async function files(rows: Row[], folder: string): Promise<void> {
  const agent = await TransferAgent.start({ name: "files", tcp: false });
  try {
    const local = await agent.allocate(REGION_BYTES);
    local.bytes.fill(5);
    for (const direct of [false, true]) {
      const file = await agent.register({
        kind: "file",
        path: join(folder, `slab-${direct}`),
        byteLength: REGION_BYTES,
        direct,
      });
      for (const bytes of BLOCKS) {
        const blockBytes = direct ? Math.ceil(bytes / 4_096) * 4_096 : bytes;
        const lists = {
          local: DescriptorList.blocks(local, { blockBytes }),
          remote: DescriptorList.blocks(file, { blockBytes }),
        };
        const prepared = agent.prepare(agent.self, lists);
        for (const operation of ["write", "read"] as const) {
          const rates: number[] = [];
          await moveAll(agent, prepared, operation, 1);
          const cpu = totalCpu();
          for (let i = 0; i < 5; i++) rates.push(await moveAll(agent, prepared, operation, PASSES.slow));
          const movedBytes = 5 * PASSES.slow * prepared.local.byteCount;
          rows.push({
            medium: direct ? "file, O_DIRECT" : "file, page cache",
            "block kB": blockBytes / 1024,
            operation,
            "GB/s": median(rates),
            "CPU s/GB": (totalCpu() - cpu) / (movedBytes / 1e9),
          });
        }
      }
      // What the page cache still holds is written now and not during the next measurement.
      const fd = openSync(join(folder, `slab-${direct}`), "r+");
      fsyncSync(fd);
      closeSync(fd);
    }
  } finally {
    await agent.close();
  }
}

const BUCKET = "bench";

async function objects(rows: Row[], folder: string): Promise<void> {
  const { child, endpoint } = await startS3rver(folder);
  const keys = { accessKeyId: "S3RVER", secretAccessKey: "S3RVER" };
  const agent = await TransferAgent.start({ name: "objects", tcp: false, shm: false, s3: { endpoint, ...keys } });
  try {
    const local = await agent.allocate(REGION_BYTES);
    local.bytes.fill(5);
    for (const blockBytes of [4 * 1024 * 1024, ...BLOCKS]) {
      const slotCount = Math.min(256, Math.floor(REGION_BYTES / blockBytes));
      const keyOf = (slot: number): string => `${blockBytes}/${slot}`;
      const memory = {
        kind: "object",
        bucket: BUCKET,
        slotBytes: blockBytes,
        slotCount,
        keyOf,
        onExists: "replace",
      } as const;
      const region = await agent.register(memory);
      const lists = {
        local: DescriptorList.blocks(local, { blockBytes, blockCount: slotCount }),
        remote: DescriptorList.blocks(region, { blockBytes }),
      };
      const prepared = agent.prepare(agent.self, lists);
      for (const operation of ["write", "read"] as const) {
        await moveAll(agent, prepared, operation, 1);
        const rates: number[] = [];
        const cpu = totalCpu();
        const serverMs = cpuTimeOf(child.pid!);
        for (let i = 0; i < 3; i++) rates.push(await moveAll(agent, prepared, operation, 1));
        const gigabytes = (3 * prepared.local.byteCount) / 1e9;
        const server = cpuTimeOf(child.pid!);
        const serverSeconds = (server.userMs + server.systemMs - serverMs.userMs - serverMs.systemMs) / 1_000;
        rows.push({
          medium: `s3 (s3rver, which takes ${(serverSeconds / gigabytes).toFixed(1)} CPU s/GB itself)`,
          "block kB": blockBytes / 1024,
          operation,
          "GB/s": median(rates),
          "CPU s/GB": (totalCpu() - cpu) / gigabytes,
        });
      }
    }
  } finally {
    await agent.close();
    const gone = once(child, "exit");
    child.kill();
    await gone;
  }
}

async function startS3rver(folder: string): Promise<{ child: ChildProcess; endpoint: string }> {
  const program = join(dirname(createRequire(import.meta.url).resolve("s3rver/package.json")), "bin", "s3rver.js");
  const args = [
    program,
    "--directory",
    join(folder, "s3"),
    "--address",
    "127.0.0.1",
    "--port",
    "0",
    "--configure-bucket",
    BUCKET,
    "--silent",
  ];
  const child = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "inherit"] });
  let said = "";
  const port = await new Promise<string>((resolve, reject) => {
    // It goes on logging each request: its output is read to the end.
    child.stdout!.on("data", (chunk: Buffer) => {
      if (said.length < 10_000) said += chunk.toString();
      const found = /listening on \S*?:(\d+)/.exec(said)?.[1];
      if (found !== undefined) resolve(found);
    });
    child.once("exit", () => reject(new Error(`s3rver did not start: ${said}`)));
  });
  return { child, endpoint: `http://127.0.0.1:${port}` };
}

export const run = main;
if (import.meta.main) await main();
