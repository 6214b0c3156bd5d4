import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, createServer, type Server, type Socket } from "node:net";
import { test } from "node:test";
import { ByteWriter, newNonce } from "../../std/index.ts";
import {
  DescriptorList,
  TransferAgent,
  type Peer,
  type PreparedTable,
  type Region,
  type TransferAgentOptions,
} from "../index.ts";
import { decodeMetadata, encodeMetadata } from "../metadata.ts";
import { assertReason, until } from "../transfer.battery.ts";
import {
  RESPONSE,
  RESPONSE_HEADER_BYTES,
  decodeError,
  encodeFetch,
  encodeHello,
  encodePull,
  encodeRead,
  encodeResponse,
  encodeServerHello,
} from "./wire.ts";

/** Strangers, wrong secrets, successors and hostile peers on a real socket: raw clients against an agent, raw servers behind metadata. */
const BYTES = 64 * 1024;
const BLOCK = 4_096;

interface Tools {
  readonly agent: (name: string, options?: Partial<TransferAgentOptions>) => Promise<TransferAgent>;
  readonly client: (agent: TransferAgent, hello?: { readonly serverIncarnation?: bigint }) => Promise<RawClient>;
  /** Metadata of an agent whose server is `onSocket`. */
  readonly rawPeer: (onSocket: (socket: Socket) => void) => Promise<Buffer>;
}

function faultTest(text: string, run: (tools: Tools) => Promise<void>): void {
  test(`tcp: ${text}`, async () => {
    const agents: TransferAgent[] = [];
    const sockets: Socket[] = [];
    const servers: Server[] = [];
    const agent: Tools["agent"] = async (name, options = {}) => {
      agents.push(await TransferAgent.start({ name, shm: false, ...options }));
      return agents.at(-1)!;
    };
    const client: Tools["client"] = async (to, { serverIncarnation } = {}) => {
      const { host, port } = addressOf(to.metadata());
      const socket = connect({ host, port });
      sockets.push(socket);
      const raw = new RawClient(socket);
      await raw.next();
      const own = { incarnation: 1n, port: 1, name: "raw", nonce: newNonce(), proof: Buffer.alloc(0) };
      raw.send(encodeHello({ serverIncarnation: serverIncarnation ?? to.incarnation, ...own }));
      return raw;
    };
    const rawPeer: Tools["rawPeer"] = async (onSocket) => {
      const server = createServer((socket) => {
        sockets.push(socket);
        socket.on("error", () => undefined);
        onSocket(socket);
      });
      servers.push(server);
      server.listen(0, "127.0.0.1");
      await once(server, "listening");
      const part = new ByteWriter();
      part.text("127.0.0.1");
      part.u16((server.address() as { port: number }).port);
      const victim = await agent(`region of ${servers.length}`);
      const region = await victim.register({ kind: "host", bytes: Buffer.alloc(BYTES) });
      const identity = { name: "raw server", incarnation: 77n, hostId: "elsewhere" };
      return encodeMetadata(identity, new Map([["tcp", part.copy()]]), [region]);
    };
    try {
      await run({ agent, client, rawPeer });
    } finally {
      for (const socket of sockets) socket.destroy();
      for (const one of agents) await one.close();
      await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
    }
  });
}

function addressOf(metadata: Uint8Array): { host: string; port: number } {
  const part = decodeMetadata(metadata).backends.get("tcp")!;
  const end = part.length - 2;
  return { host: part.toString("utf8", 4, end), port: part.readUInt16LE(end) };
}

interface Response {
  readonly type: number;
  readonly id: number;
  readonly text: Buffer;
  readonly payload: Buffer;
}

/** A dialler that sends what it likes. */
class RawClient {
  readonly socket: Socket;
  closed = false;
  #bytes = Buffer.alloc(0);

  constructor(socket: Socket) {
    this.socket = socket;
    socket.on("data", (chunk: Buffer) => (this.#bytes = Buffer.concat([this.#bytes, chunk])));
    socket.on("error", () => undefined);
    socket.on("close", () => (this.closed = true));
  }

  send(bytes: Uint8Array): void {
    this.socket.write(bytes);
  }

  async next(): Promise<Response> {
    const whole = (): number => {
      if (this.#bytes.length < RESPONSE_HEADER_BYTES) return Number.POSITIVE_INFINITY;
      return RESPONSE_HEADER_BYTES + this.#bytes.readUInt16LE(2) + this.#bytes.readDoubleLE(8);
    };
    await until(() => this.#bytes.length >= whole() || this.closed, "a response");
    assert.ok(this.#bytes.length >= whole(), "the connection was closed before the response");
    const end = whole();
    const textEnd = RESPONSE_HEADER_BYTES + this.#bytes.readUInt16LE(2);
    const response = {
      type: this.#bytes[0]!,
      id: this.#bytes.readUInt32LE(4),
      text: this.#bytes.subarray(RESPONSE_HEADER_BYTES, textEnd),
      payload: this.#bytes.subarray(textEnd, end),
    };
    this.#bytes = this.#bytes.subarray(end);
    return response;
  }

  async nextError(): Promise<unknown> {
    const { type, text } = await this.next();
    assert.equal(type, RESPONSE.error);
    return decodeError(text);
  }
}

async function aTable(agent: TransferAgent, peer: Peer): Promise<{ table: PreparedTable; local: Region }> {
  const local = await agent.register({ kind: "host", bytes: Buffer.alloc(BYTES, 9) });
  const [remote] = peer.metadata.regions.values();
  const lists = {
    local: DescriptorList.blocks(local, { blockBytes: BLOCK }),
    remote: DescriptorList.blocks({ id: remote!.id, byteLength: BYTES }, { blockBytes: BLOCK }),
  };
  return { table: agent.prepare(peer, lists), local };
}

const FIRST = Uint32Array.of(0);

faultTest("with a cluster secret only those who know it get through, in both directions", async ({ agent }) => {
  const owner = await agent("owner", { clusterSecret: "right" });
  await owner.register({ kind: "host", bytes: Buffer.alloc(BYTES, 3) });
  const friend = await agent("friend", { clusterSecret: "right" });
  const { table, local } = await aTable(friend, friend.addPeer(owner.metadata()));
  await friend.read(table, FIRST, FIRST).done;
  await friend.write(table, FIRST, FIRST).done;
  assert.equal(local.bytes[0], 3);
  for (const clusterSecret of ["wrong", undefined]) {
    const stranger = await agent(`stranger ${clusterSecret}`, { clusterSecret });
    const { table: refused } = await aTable(stranger, stranger.addPeer(owner.metadata()));
    for (const operation of ["read", "write"] as const) {
      const transfer = stranger.transfer(operation, refused, FIRST, FIRST);
      await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "protocol-version"));
    }
  }
  // A server without the secret gets no write either: it cannot prove itself.
  const open = await agent("open");
  await open.register({ kind: "host", bytes: Buffer.alloc(BYTES, 3) });
  const { table: towardsOpen } = await aTable(friend, friend.addPeer(open.metadata()));
  await assert.rejects(friend.read(towardsOpen, FIRST, FIRST).done, (thrown) =>
    assertReason(thrown, "protocol-version"),
  );
});

faultTest("metadata of a predecessor at the same port are stale", async ({ agent }) => {
  const first = await agent("owner");
  await first.register({ kind: "host", bytes: Buffer.alloc(BYTES, 3) });
  const metadata = first.metadata();
  const { port } = addressOf(metadata);
  await first.close();
  const second = await agent("owner", { tcp: { port } });
  await second.register({ kind: "host", bytes: Buffer.alloc(BYTES, 4) });
  const reader = await agent("reader");
  const { table, local } = await aTable(reader, reader.addPeer(metadata));
  await assert.rejects(reader.read(table, FIRST, FIRST).done, (thrown) => assertReason(thrown, "transfer-stale"));
  const { table: fresh, local: read } = await aTable(reader, reader.addPeer(second.metadata()));
  await reader.read(fresh, FIRST, FIRST).done;
  assert.equal(local.bytes[0], 9);
  assert.equal(read.bytes[0], 4);
});

faultTest(
  "a peer may touch what is registered for it and nothing else, whatever its metadata claim",
  async ({ agent, client }) => {
    const owner = await agent("owner");
    const whole = Buffer.alloc(3 * BYTES, 1);
    const region = await owner.register({ kind: "host", bytes: whole.subarray(BYTES, 2 * BYTES) });
    const readable = await owner.register({ kind: "host", bytes: Buffer.alloc(BYTES, 2) }, { remoteAccess: "read" });
    const secret = await owner.register({ kind: "host", bytes: Buffer.alloc(BYTES, 3) }, { remoteAccess: "none" });
    const gone = await owner.register({ kind: "host", bytes: Buffer.alloc(BYTES, 3) });
    await owner.deregister(gone);
    const raw = await client(owner);
    assert.equal((await raw.next()).type, RESPONSE.welcome);
    const one = (id: number, offset: number, length: number): DescriptorList =>
      new DescriptorList(Uint32Array.of(id), Float64Array.of(offset), Uint32Array.of(length));
    const read = (id: number, offset: number, length: number): Buffer =>
      encodeRead(5, { list: one(id, offset, length), first: 0, inside: 0, byteCount: length });
    const cases = [
      [read(region.id, BYTES, 1), "transfer-out-of-bounds"],
      [read(region.id, BYTES - 1, 2), "transfer-out-of-bounds"],
      [read(region.id, -1, 2), "transfer-out-of-bounds"],
      [read(region.id, 0.5, 2), "transfer-out-of-bounds"],
      [read(region.id, Number.NaN, 2), "transfer-out-of-bounds"],
      [read(region.id, 2 ** 60, 2), "transfer-out-of-bounds"],
      [read(secret.id, 0, 1), "transfer-out-of-bounds"],
      [read(gone.id, 0, 1), "transfer-stale"],
      [read(0xffff_ffff, 0, 1), "transfer-out-of-bounds"],
      [encodeFetch(5, 12_345n, 0, 1), "transfer-out-of-bounds"],
      [
        encodePull({ id: 5, grant: 1n, timeoutMs: 1_000, message: undefined, destination: one(readable.id, 0, 1) }),
        "transfer-out-of-bounds",
      ],
      [
        encodePull({ id: 5, grant: 1n, timeoutMs: 1_000, message: undefined, destination: one(region.id, BYTES, 1) }),
        "transfer-out-of-bounds",
      ],
    ] as const;
    for (const [frame, reason] of cases) {
      raw.send(frame);
      assertReason(await raw.nextError(), reason);
    }
    raw.send(read(readable.id, 0, 2));
    assert.deepEqual((await raw.next()).payload, Buffer.from([2, 2]));
    assert.ok(whole.every((byte) => byte === 1));
  },
);

faultTest("metadata that claim more than is registered are found out by the owner", async ({ agent }) => {
  const owner = await agent("owner");
  const region = await owner.register({ kind: "host", bytes: Buffer.alloc(BYTES) });
  const { hostId, incarnation, name, backends } = decodeMetadata(owner.metadata());
  const claimed = { id: region.id, kind: "host", byteLength: 1e9, remoteAccess: "read-write", label: "" };
  const metadata = encodeMetadata({ name, incarnation, hostId }, backends, [claimed as never]);
  const reader = await agent("reader");
  const local = await reader.register({ kind: "host", bytes: Buffer.alloc(BYTES, 9) });
  const lists = {
    local: DescriptorList.blocks(local, { blockBytes: BLOCK }),
    remote: DescriptorList.blocks(
      { id: region.id, byteLength: 1e9 },
      { blockBytes: BLOCK, blockCount: 16, offset: BYTES - BLOCK },
    ),
  };
  const table = reader.prepare(reader.addPeer(metadata), lists);
  for (const operation of ["read", "write"] as const) {
    const transfer = reader.transfer(operation, table, Uint32Array.of(0, 1), Uint32Array.of(0, 1));
    await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "transfer-out-of-bounds"));
  }
  assert.ok(local.bytes.every((byte) => byte === 9));
});

faultTest("strangers, oversized frames and unknown requests cost the connection", async ({ agent, client }) => {
  const owner = await agent("owner", { tcp: { connectTimeoutMs: 200 } });
  const { host, port } = addressOf(owner.metadata());
  const http = new RawClient(connect({ host, port }));
  http.send(Buffer.from("GET / HTTP/1.1\r\nhost: x\r\n\r\n"));
  await until(() => http.closed, "the stranger is refused");
  const silent = new RawClient(connect({ host, port }));
  await until(() => silent.closed, "who says nothing is refused");
  const stale = await client(owner, { serverIncarnation: 1n });
  assertReason(await stale.nextError(), "transfer-stale");
  for (const frame of [
    Buffer.from([0xff, 0xff, 0xff, 0x7f, 2]),
    Buffer.from([0, 0, 0, 0, 99]),
    Buffer.from([0, 0, 0, 0, 2]),
  ]) {
    const raw = await client(owner);
    assert.equal((await raw.next()).type, RESPONSE.welcome);
    raw.send(frame);
    assertReason(await raw.nextError(), "malformed-frame");
    await until(() => raw.closed, "the connection is closed");
  }
});

faultTest(
  "a peer that asks for more than it takes loses the connection, and the owner's memory does not grow",
  async ({ agent, client }) => {
    const owner = await agent("owner");
    const region = await owner.register({ kind: "host", bytes: Buffer.alloc(8 * 1024 * 1024) });
    const raw = await client(owner);
    assert.equal((await raw.next()).type, RESPONSE.welcome);
    raw.socket.pause();
    const list = DescriptorList.blocks(region, { blockBytes: region.byteLength });
    for (let i = 1; i < 40; i++) raw.send(encodeRead(i, { list, first: 0, inside: 0, byteCount: region.byteLength }));
    await until(() => !region.pinned || raw.closed, "the requests were dropped");
    raw.socket.resume();
    await until(() => raw.closed, "the connection is closed");
    await owner.deregister(region);
  },
);

/** A server that is through the handshake and then answers every request with `answer`. */
function hostileServer(answer: (socket: Socket, id: number) => void): (socket: Socket) => void {
  return (socket) => {
    socket.write(encodeServerHello(newNonce()));
    let isGreeted = false;
    socket.on("data", (chunk: Buffer) => {
      if (!isGreeted) {
        isGreeted = true;
        socket.write(encodeResponse(RESPONSE.welcome, 0));
        return;
      }
      answer(socket, chunk.readUInt32LE(5));
    });
  };
}

faultTest(
  "a server that answers what was not asked fails the transfer and writes nothing",
  async ({ agent, rawPeer }) => {
    const answers: ((socket: Socket, id: number) => void)[] = [
      (socket, id) =>
        socket.write(Buffer.concat([encodeResponse(RESPONSE.data, id, BLOCK + 1), Buffer.alloc(BLOCK + 1)])),
      (socket, id) => socket.write(Buffer.concat([encodeResponse(RESPONSE.data, id + 1, BLOCK), Buffer.alloc(BLOCK)])),
      (socket, id) => socket.write(encodeResponse(RESPONSE.data, id, -1)),
      (socket, id) => socket.write(encodeResponse(RESPONSE.data, id, Number.NaN)),
      (socket, id) => socket.write(encodeResponse(RESPONSE.done, id)),
      (socket, id) => socket.write(encodeResponse(99, id)),
      (socket) => socket.write(Buffer.alloc(1_000, 0xff)),
    ];
    for (const answer of answers) {
      const reader = await agent("reader");
      const { table, local } = await aTable(reader, reader.addPeer(await rawPeer(hostileServer(answer))));
      const transfer = reader.read(table, FIRST, FIRST, { timeoutMs: 10_000 });
      await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "malformed-frame"));
      assert.ok(local.bytes.every((byte) => byte === 9));
      await reader.close();
    }
  },
);

faultTest(
  "a connection that breaks inside a block fails the transfer; what is outside stays",
  async ({ agent, rawPeer }) => {
    const half = hostileServer((socket, id) => {
      socket.end(Buffer.concat([encodeResponse(RESPONSE.data, id, BLOCK), Buffer.alloc(BLOCK / 2, 7)]));
    });
    const reader = await agent("reader");
    const { table, local } = await aTable(reader, reader.addPeer(await rawPeer(half)));
    const transfer = reader.read(table, Uint32Array.of(3), FIRST, { timeoutMs: 10_000 });
    await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "transfer-peer-lost"));
    assert.ok(local.bytes.subarray(0, 3 * BLOCK).every((byte) => byte === 9));
    assert.ok(local.bytes.subarray(4 * BLOCK).every((byte) => byte === 9));
  },
);

faultTest(
  "nobody there: the transfer fails at once; a server that never greets: at the connect timeout",
  async ({ agent, rawPeer }) => {
    const reader = await agent("reader", { tcp: { connectTimeoutMs: 100 } });
    const silent = await aTable(reader, reader.addPeer(await rawPeer(() => undefined)));
    await assert.rejects(reader.read(silent.table, FIRST, FIRST).done, (thrown) =>
      assertReason(thrown, "connect-timeout"),
    );
    const owner = await agent("owner");
    await owner.register({ kind: "host", bytes: Buffer.alloc(BYTES) });
    const metadata = owner.metadata();
    await owner.close();
    const gone = await aTable(reader, reader.addPeer(metadata));
    await assert.rejects(reader.write(gone.table, FIRST, FIRST).done, (thrown) =>
      assertReason(thrown, "transfer-peer-lost"),
    );
  },
);

faultTest("an address that is taken, and options out of range, are told at start", async ({ agent }) => {
  const { port } = addressOf((await agent("first")).metadata());
  await assert.rejects(agent("second", { tcp: { port } }), (thrown) => assertReason(thrown, "address-in-use"));
  await assert.rejects(agent("third", { tcp: { connectionCount: 0 } }), (thrown) =>
    assertReason(thrown, "invalid-config"),
  );
});
