import assert from "node:assert/strict";
import { fork, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { connect, createServer, type Server, type Socket } from "node:net";
import { test } from "node:test";
import { Metrics, createLogger, type Logger } from "../../observability/index.ts";
import { systemClock, type Clock } from "../../std/index.ts";
import { CLIENT_FRAMES, FRAME, FrameDecoder, HANDSHAKE_FRAMES, decodeError, encodeFrame } from "./frame.ts";
import { decodeHello, encodeHello, encodeWelcome, newNonce, proofOf } from "./hello.ts";
import { Outbox } from "./outbox.ts";
import { ENDPOINT, Served, assertReason, open, until } from "./request-plane.battery.ts";
import { TcpRequestPlane, type TcpRequestPlaneOptions } from "./tcp.ts";

/**
 * What can go wrong on a real socket: strangers, wrong secrets and versions, frozen peers, resets, killed processes. Peers
 * that misbehave are raw sockets or child processes.
 */
interface Cleanup {
  readonly planes: TcpRequestPlane[];
  readonly sockets: Socket[];
  readonly servers: Server[];
  readonly children: ChildProcess[];
}

interface Tools {
  readonly plane: (options?: TcpRequestPlaneOptions) => TcpRequestPlane;
  /** A raw connection to a plane's server. */
  readonly socket: (address: string) => Peer;
  /** A raw server; every connection becomes a peer. Returns its address. */
  readonly rawServer: (onPeer: (peer: Peer) => void) => Promise<string>;
  /** The process of `fixtures/echo-server.ts` and its address. */
  readonly echoProcess: () => Promise<{ child: ChildProcess; address: string }>;
}

function faultTest(title: string, run: (tools: Tools) => Promise<void>): void {
  test(`tcp: ${title}`, async () => {
    const cleanup: Cleanup = { planes: [], sockets: [], servers: [], children: [] };
    try {
      await run(toolsFor(cleanup));
    } finally {
      for (const child of cleanup.children) {
        if (child.exitCode !== null || child.signalCode !== null) continue;
        child.kill("SIGKILL");
        await once(child, "exit");
      }
      for (const socket of cleanup.sockets) socket.destroy();
      await Promise.all(cleanup.planes.map((plane) => plane.close()));
      await Promise.all(cleanup.servers.map((server) => new Promise((resolve) => server.close(resolve))));
    }
  });
}

function toolsFor({ planes, sockets, servers, children }: Cleanup): Tools {
  const peerOf = (socket: Socket): Peer => {
    sockets.push(socket);
    return new Peer(socket);
  };
  return {
    plane: (options = {}) => {
      const plane = new TcpRequestPlane(options);
      planes.push(plane);
      return plane;
    },
    socket: (address) => peerOf(connect({ host: "127.0.0.1", port: Number(new URL(address).port) })),
    rawServer: async (onPeer) => {
      const server = createServer((socket) => onPeer(peerOf(socket)));
      servers.push(server);
      server.listen(0, "127.0.0.1");
      await once(server, "listening");
      return `tcp://127.0.0.1:${(server.address() as { port: number }).port}`;
    },
    echoProcess: async () => {
      const script = new URL("./fixtures/echo-server.ts", import.meta.url);
      const child = fork(script, { stdio: ["ignore", "inherit", "inherit", "ipc"] });
      children.push(child);
      const [address] = (await once(child, "message")) as [string];
      return { child, address };
    },
  };
}

/** A socket that speaks frames by hand. */
class Peer {
  readonly frames: { type: number; body: Buffer }[] = [];
  readonly socket: Socket;
  closed = false;
  readonly #decoder = new FrameDecoder(HANDSHAKE_FRAMES);

  constructor(socket: Socket) {
    this.socket = socket;
    socket.on("data", (chunk: Buffer) => this.#decoder.push(chunk, { closed: false, onFrame: this.#keep }));
    socket.on("error", () => undefined);
    socket.on("close", () => (this.closed = true));
  }

  readonly #keep = (type: number, bytes: Buffer, start: number, end: number): void => {
    this.frames.push({ type, body: Buffer.from(bytes.subarray(start, end)) });
  };

  /** Everything a client or server may send, for after the handshake. */
  acceptAll(): void {
    const all = Float64Array.from(CLIENT_FRAMES);
    for (const type of [FRAME.open, FRAME.cancel, FRAME.credit]) all[type] = 1 << 26;
    for (const type of [FRAME.hello, FRAME.welcome, FRAME.refuse]) all[type] = 1 << 16;
    this.#decoder.limits = all;
  }

  async frame(type: number, skip = 0): Promise<Buffer> {
    const find = (): { body: Buffer } | undefined => this.frames.filter((frame) => frame.type === type)[skip];
    await until(() => find() !== undefined || this.closed, `no frame of type ${type}`);
    const found = find();
    assert.ok(found !== undefined, `closed before a frame of type ${type}`);
    return found.body;
  }

  /** Behaves like a client up to the end of the handshake. */
  async enterAsClient(): Promise<void> {
    await this.frame(FRAME.hello);
    this.acceptAll();
    this.socket.write(encodeHello({ role: "client", peerId: 1n, nonce: newNonce(), proof: Buffer.alloc(0) }));
    await this.frame(FRAME.welcome);
  }

  /** Behaves like a server up to the end of the handshake. */
  async enterAsServer(): Promise<void> {
    this.acceptAll();
    this.socket.write(encodeHello({ role: "server", peerId: 1n, nonce: newNonce(), proof: Buffer.alloc(0) }));
    await this.frame(FRAME.hello);
    this.socket.write(encodeWelcome({ version: 1, proof: Buffer.alloc(0) }));
  }
}

interface Observed {
  readonly metrics: Metrics;
  readonly logger: Logger;
  readonly lines: string[];
  readonly errorCount: (side: string, kind: string) => number;
}

function observed(): Observed {
  const metrics = new Metrics();
  const lines: string[] = [];
  return {
    metrics,
    lines,
    logger: createLogger({ level: "warn", format: "jsonl", write: (line) => lines.push(line) }),
    errorCount: (side, kind) => metrics.counter("dynamo_transport_tcp_errors_total").labels(side, kind).value,
  };
}

function openBytes(wireId = 1): Buffer {
  const outbox = new Outbox();
  const fields = { wireId, timeoutMs: 60_000, windowBytes: 1 << 20, endpoint: ENDPOINT, requestId: "r" };
  outbox.open({ ...fields, traceparent: "" }, Buffer.from("payload"));
  return outbox.take();
}

const strangers: [string, (server: Buffer) => Buffer, RegExp][] = [
  ["plain HTTP", () => Buffer.from("GET / HTTP/1.1\r\nHost: worker\r\n\r\n"), /broke the request-plane protocol/],
  ["a hello with another magic", () => damagedHello((body) => body.writeUInt32LE(0xdead_beef, 0)), /does not speak/],
  ["a hello of a version to come", () => damagedHello((body) => body.fill(9, 4, 8)), /no common protocol version/],
  ["a hello in the wrong role", () => damagedHello((body) => (body[8] = 2)), /wrong role/],
  ["a hello cut short", () => encodeFrame(FRAME.hello, damagedHello(() => undefined).subarray(5, 25)), /broke the/],
  ["a request before the hello", () => openBytes(), /broke the request-plane protocol/],
];

function damagedHello(damage: (body: Buffer) => void): Buffer {
  const frame = encodeHello({ role: "client", peerId: 1n, nonce: newNonce(), proof: Buffer.alloc(0) });
  damage(frame.subarray(5));
  return frame;
}

for (const [what, bytes, message] of strangers) {
  faultTest(`${what} is refused with a reason, counted, and logged once`, async ({ plane, socket }) => {
    const { metrics, logger, lines, errorCount } = observed();
    const server = await plane({ metrics, logger }).listen();
    server.serve(ENDPOINT, () => assert.fail("a stranger got through"));
    for (let i = 1; i <= 3; i++) {
      const peer = socket(server.address);
      const hello = await peer.frame(FRAME.hello);
      peer.socket.write(bytes(hello));
      const refuse = await peer.frame(FRAME.refuse);
      assert.match(decodeError(refuse, 0, refuse.length).publicMessage, message);
      await until(() => peer.closed, "the stranger stays connected");
      assert.equal(errorCount("server", "refused"), i);
    }
    assert.equal(lines.length, 1, lines.join(""));
    assert.match(lines[0]!, /refused a connection/);
  });
}

faultTest("a cluster secret must be the same on both sides, or on none", async ({ plane }) => {
  const pairs: [string | undefined, string | undefined, boolean][] = [
    ["secret", "secret", true],
    [undefined, undefined, true],
    ["secret", "other", false],
    ["secret", undefined, false],
    [undefined, "secret", false],
  ];
  for (const [serverSecret, clientSecret, ok] of pairs) {
    const options = (secret: string | undefined): TcpRequestPlaneOptions =>
      secret === undefined ? {} : { clusterSecret: secret };
    const server = await plane(options(serverSecret)).listen();
    server.serve(ENDPOINT, (stream) => {
      assert.ok(ok, "a peer with the wrong secret got through");
      stream.end();
      return { onCancel: () => undefined };
    });
    const recorder = await open(plane(options(clientSecret)), server.address).ended();
    if (ok) assert.equal(recorder.end, undefined);
    else {
      assertReason(recorder.end, "protocol-version");
      assert.match(recorder.end!.publicMessage, /cluster secret/);
    }
  }
});

faultTest("a recorded or mirrored proof is worth nothing", async ({ plane, socket }) => {
  const clusterSecret = "secret";
  const server = await plane({ clusterSecret }).listen();
  const first = socket(server.address);
  const { nonce: serverNonce } = decodeHello(await first.frame(FRAME.hello), 0, 49, "server");
  const clientNonce = newNonce();
  const proof = proofOf(clusterSecret, { role: "client", serverNonce, clientNonce });
  const recorded = encodeHello({ role: "client", peerId: 1n, nonce: clientNonce, proof });
  first.socket.write(recorded);
  const welcome = await first.frame(FRAME.welcome);
  const replay = socket(server.address);
  await replay.frame(FRAME.hello);
  replay.socket.write(recorded);
  await replay.frame(FRAME.refuse);
  const mirror = socket(server.address);
  await mirror.frame(FRAME.hello);
  const serverProof = Buffer.from(welcome.subarray(3));
  mirror.socket.write(encodeHello({ role: "client", peerId: 1n, nonce: clientNonce, proof: serverProof }));
  await mirror.frame(FRAME.refuse);
});

faultTest("a peer that says nothing is refused after the connect timeout", async ({ plane, socket }) => {
  const { metrics, errorCount } = observed();
  const server = await plane({ metrics, connectTimeoutMs: 60 }).listen();
  const peer = socket(server.address);
  const refusal = await peer.frame(FRAME.refuse);
  assert.match(refusal.toString("latin1"), /connect-timeout/, "a caller that stood still may go elsewhere");
  await until(() => peer.closed, "the silent peer stays connected");
  assert.equal(errorCount("server", "refused"), 1);
});

faultTest("a server that never says hello ends streams with worker-unreachable", async ({ plane, rawServer }) => {
  const address = await rawServer(() => undefined);
  const recorder = await open(plane({ connectTimeoutMs: 60 }), address).ended();
  assertReason(recorder.end, "worker-unreachable");
});

faultTest("a server that speaks another protocol ends streams with its reason", async ({ plane, rawServer }) => {
  const address = await rawServer((peer) => peer.socket.write("HTTP/1.1 400 Bad Request\r\n\r\n"));
  assertReason((await open(plane(), address).ended()).end, "malformed-frame");
});

faultTest("streams share an attempt, and while backing off they fail at once without another", async (tools) => {
  let attemptCount = 0;
  const address = await tools.rawServer((peer) => {
    attemptCount++;
    peer.socket.destroy();
  });
  let nowMs = 0;
  const clock: Clock = { ...systemClock, monotonicMs: () => nowMs };
  const client = tools.plane({ clock });
  const first = Array.from({ length: 100 }, () => open(client, address));
  for (const recorder of first) assertReason((await recorder.ended()).end, "worker-unreachable");
  assert.equal(attemptCount, 1);
  for (let i = 0; i < 10; i++) assertReason((await open(client, address).ended()).end, "worker-unreachable");
  assert.equal(attemptCount, 1, "tried again while backing off");
  let backOffMs = 50;
  for (let attempt = 2; attempt <= 8; attempt++) {
    nowMs += backOffMs - 1;
    await open(client, address).ended();
    assert.equal(attemptCount, attempt - 1, `tried again before ${backOffMs} ms`);
    nowMs += 1;
    assertReason((await open(client, address).ended()).end, "worker-unreachable");
    assert.equal(attemptCount, attempt);
    backOffMs = Math.min(2_000, backOffMs * 2);
  }
  for (const [afterMs, attempts] of [
    [49, 8],
    [1, 9],
    [49, 9],
    [1, 10],
  ] as const) {
    // prettier-ignore
    nowMs += afterMs;
    await open(client, address, { isLastResort: true }).ended();
    assert.equal(attemptCount, attempts, "who has nobody else to ask waits for the first back-off only");
  }
});

faultTest(
  "a frozen server is found out by its silence, its streams end with worker-lost",
  async ({ plane, rawServer }) => {
    const peers: Peer[] = [];
    const address = await rawServer((peer) => {
      peers.push(peer);
      void peer.enterAsServer();
    });
    const { metrics, errorCount } = observed();
    const client = plane({ heartbeatMs: 60, heartbeatMisses: 3, metrics });
    const recorder = open(client, address);
    await until(() => peers.length === 1, "no connection");
    await peers[0]!.frame(FRAME.open);
    const silentSinceMs = performance.now();
    await recorder.ended();
    assertReason(recorder.end, "worker-lost");
    const tookMs = performance.now() - silentSinceMs;
    assert.ok(tookMs > 150 && tookMs < 2_500, `found out after ${tookMs} ms`);
    assert.ok(peers[0]!.frames.filter(({ type }) => type === FRAME.ping).length >= 1, "was not asked first");
    assert.equal(errorCount("client", "frozen"), 1);
  },
);

faultTest("a frozen client is found out by its silence, its handlers are told", async ({ plane, socket }) => {
  const server = await plane({ heartbeatMs: 60, heartbeatMisses: 3 }).listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const peer = socket(server.address);
  await peer.enterAsClient();
  peer.socket.write(openBytes());
  const stream = await served.stream();
  await peer.frame(FRAME.ping);
  await until(() => stream.ended, "the frozen client was not noticed");
  assert.equal(served.cancelsOf(stream).length, 1);
  assertReason(served.cancelsOf(stream)[0], "client-gone");
});

faultTest("an idle connection stays open as long as both sides answer", async ({ plane }) => {
  const { metrics } = observed();
  const server = await plane({ heartbeatMs: 40, heartbeatMisses: 2 }).listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const client = plane({ heartbeatMs: 40, heartbeatMisses: 2, metrics });
  const recorder = open(client, server.address);
  const stream = await served.stream();
  const startMs = performance.now();
  await until(() => performance.now() - startMs > 400, "time stands still");
  assert.equal(recorder.endCount, 0);
  assert.equal(metrics.gauge("dynamo_transport_tcp_pool_active").labels("client").value, 1);
  stream.end();
  await recorder.ended();
});

faultTest("a reset in the middle of streams ends them with worker-lost, new ones connect again", async (tools) => {
  const { metrics, errorCount } = observed();
  const peers: Peer[] = [];
  const address = await tools.rawServer((peer) => {
    peers.push(peer);
    void peer.enterAsServer();
  });
  const client = tools.plane({ metrics });
  const recorders = [open(client, address), open(client, address)];
  await until(() => peers.length === 1, "no connection");
  await peers[0]!.frame(FRAME.open, 1);
  const outbox = new Outbox();
  outbox.item(0, Buffer.from("before"));
  peers[0]!.socket.write(outbox.take());
  await until(() => recorders[0]!.items.length === 1, "the item did not come");
  peers[0]!.socket.resetAndDestroy();
  for (const recorder of recorders) assertReason((await recorder.ended()).end, "worker-lost");
  assert.equal(errorCount("client", "broken"), 1);
  const again = open(client, address);
  await until(() => peers.length === 2, "did not connect again");
  await peers[1]!.frame(FRAME.open);
  again.stream!.cancel();
});

faultTest("a client that resets ends its streams with client-gone, others go on", async ({ plane, socket }) => {
  const server = await plane().listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const peer = socket(server.address);
  await peer.enterAsClient();
  peer.socket.write(openBytes(7));
  const broken = await served.stream();
  const recorder = open(plane(), server.address);
  const whole = await served.stream(1);
  peer.socket.resetAndDestroy();
  await until(() => broken.ended, "the reset was not noticed");
  assertReason(served.cancelsOf(broken)[0], "client-gone");
  whole.end();
  assert.equal((await recorder.ended()).end, undefined);
});

faultTest("a frame that breaks the format after the hello ends the connection, not the server", async (tools) => {
  const { metrics, errorCount } = observed();
  const server = await tools.plane({ metrics }).listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const hostile = [
    Buffer.concat([openBytes(), openBytes()]),
    encodeFrame(FRAME.open, Buffer.alloc(3)),
    encodeFrame(FRAME.credit, Buffer.alloc(7)),
    encodeFrame(FRAME.batch),
    Buffer.from([0xff, 0xff, 0xff, 0xff, FRAME.open]),
  ];
  for (const [i, bytes] of hostile.entries()) {
    const peer = tools.socket(server.address);
    await peer.enterAsClient();
    peer.socket.write(bytes);
    await until(() => peer.closed, "the hostile peer stays connected");
    assert.equal(errorCount("server", "malformed"), i + 1);
  }
  await until(() => server.activeStreamCount === 0, "a hostile peer's stream runs on");
  const recorder = open(tools.plane(), server.address);
  (await served.stream(1)).end();
  assert.equal((await recorder.ended()).end, undefined);
});

faultTest("a client that stops reading gets slow-reader ends instead of our memory", async ({ plane, socket }) => {
  const limits = { queuedBytesPerConnection: 256 * 1024 };
  const server = await plane({ limits }).listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const peer = socket(server.address);
  await peer.enterAsClient();
  for (let id = 1; id <= 200; id++) peer.socket.write(openBytes(id));
  await served.stream(199);
  peer.socket.pause();
  const item = Buffer.alloc(16 * 1024);
  const recorder = open(plane(), server.address);
  await served.stream(200);
  // The kernel takes some megabytes first; 200 windows of 1 MiB are far more than it has room for.
  for (let round = 0; round < 60; round++) {
    for (const stream of served.streams.slice(0, 200)) stream.write(item);
    server.flush();
    await new Promise((resolve) => setImmediate(resolve));
  }
  const slow = served.streams.slice(0, 200).filter((stream) => served.cancelsOf(stream)[0]?.reason === "slow-reader");
  assert.ok(slow.length > 150, `${slow.length} of 200 streams ended`);
  const good = served.streams[200]!;
  good.write(Buffer.from("not stalled"));
  good.end();
  assert.deepEqual((await recorder.ended()).texts, ["not stalled"]);
});

faultTest("a server over its connection limit turns further clients away", async ({ plane }) => {
  const server = await plane({ limits: { maxConnections: 1 } }).listen();
  const served = new Served();
  server.serve(ENDPOINT, served.handler);
  const first = open(plane(), server.address);
  await served.stream();
  assertReason((await open(plane(), server.address).ended()).end, "worker-unreachable");
  served.streams[0]!.end();
  assert.equal((await first.ended()).end, undefined);
});

faultTest(
  "a server process that is killed ends its streams with worker-lost at once",
  async ({ plane, echoProcess }) => {
    const { child, address } = await echoProcess();
    const client = plane();
    const recorders = Array.from({ length: 10 }, () => open(client, address));
    await until(() => recorders.every(({ items }) => items.length > 0), "the child does not answer");
    const killedMs = performance.now();
    child.kill("SIGKILL");
    for (const recorder of recorders) assertReason((await recorder.ended()).end, "worker-lost");
    assert.ok(performance.now() - killedMs < 2_500, "waited for the heartbeat instead of the closed socket");
    assertReason((await open(client, address).ended()).end, "worker-unreachable");
  },
);

faultTest(
  "a stopped server process is found out, and a new one is reached at the same port",
  async ({ plane, echoProcess }) => {
    const { child, address } = await echoProcess();
    const client = plane({ heartbeatMs: 50, heartbeatMisses: 3 });
    const recorder = open(client, address);
    await until(() => recorder.items.length > 0, "the child does not answer");
    child.kill("SIGSTOP");
    assertReason((await recorder.ended()).end, "worker-lost");
    child.kill("SIGKILL");
    await once(child, "exit");
    const server = await plane({ port: Number(new URL(address).port) }).listen();
    const served = new Served();
    server.serve(ENDPOINT, served.handler);
    const again = open(client, server.address);
    (await served.stream()).end();
    assert.equal((await again.ended()).end, undefined);
  },
);
