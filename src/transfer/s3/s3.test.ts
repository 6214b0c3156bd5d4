import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type Server, type ServerResponse } from "node:http";
import { after, before, test } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { SeededRandom, systemClock } from "../../std/index.ts";
import { DescriptorList, TransferAgent, type ObjectMemory } from "../index.ts";
import { assertReason, noise, transferBattery, until, type OpenOptions, type Pair } from "../transfer.battery.ts";
import { BUCKET, startS3Server, type S3Server } from "./fixtures/s3-server.ts";
import { S3Client, s3OptionsFromEnvironment, type S3Options } from "./s3-client.ts";

let server: S3Server;
before(async () => {
  server = await startS3Server();
});
after(() => server.close());

let pairCount = 0;

async function open(options: OpenOptions, objects: Partial<ObjectMemory> = {}): Promise<Pair> {
  const prefix = `pair ${++pairCount}/`;
  const byteLength = options.blockBytes * options.blockCount;
  const agent = await TransferAgent.start({
    name: "initiator",
    clock: options.clock ?? systemClock,
    tcp: false,
    shm: false,
    s3: server.options,
  });
  const client = aClient();
  const keyOf = (slot: number): string => `${prefix}${slot}/ü&+(1).kv`;
  const memory: ObjectMemory = {
    kind: "object",
    bucket: BUCKET,
    slotBytes: options.blockBytes,
    slotCount: options.blockCount,
    keyOf,
    onExists: "replace",
    ...objects,
  };
  const local = await agent.register({ kind: "host", bytes: Buffer.alloc(byteLength) });
  const remoteRegion = await agent.register(memory);
  const slots = Array.from({ length: options.blockCount }, (_, slot) => slot);
  const within = (bytes: Buffer, slot: number): Buffer =>
    bytes.subarray(slot * options.blockBytes, (slot + 1) * options.blockBytes);
  return {
    agent,
    owner: agent,
    peer: agent.self,
    local,
    remote: remoteRegion,
    remoteRegion,
    fillRemote: async (bytes) => {
      const put = { ...anyTime(), ifAbsent: false };
      await Promise.all(
        slots.map((slot) => client.put({ bucket: BUCKET, key: keyOf(slot) }, [within(bytes, slot)], put)),
      );
    },
    readRemote: async () => {
      const bytes = Buffer.alloc(byteLength);
      await Promise.all(
        slots.map(async (slot) => {
          const at = { bucket: BUCKET, key: keyOf(slot) };
          const limits = anyTime();
          // s3rver keeps what came of an upload that was cut off, and may put it in place between the two questions.
          for (let isRead = false; !isRead && !limits.signal.aborted;) {
            const byteCount = await client.head(at, limits);
            const into = within(bytes, slot).subarray(0, byteCount);
            isRead = byteCount === 0 || (await client.get(at, 0, [into], limits).then(() => true, isNotCut));
          }
        }),
      );
      return bytes;
    },
    close: async () => {
      await agent.close();
      await client.close();
    },
  };
}

/** False for an object that was shorter than it had been a moment before. */
function isNotCut(thrown: unknown): false {
  if (thrown instanceof DynamoError && thrown.diagnostic?.startsWith("an object ends ") === true) return false;
  throw thrown;
}

function anyTime(): { signal: AbortSignal; deadlineMs: number } {
  return { signal: AbortSignal.timeout(20_000), deadlineMs: Number.POSITIVE_INFINITY };
}

function aClient(options: Partial<S3Options> = {}): S3Client {
  return new S3Client({ ...server.options, ...options }, { clock: systemClock, random: new SeededRandom(1) });
}

transferBattery({
  backend: "s3",
  hasPeer: false,
  ownerChecks: true,
  anyRange: false,
  recallsWrites: false,
  open: (options) => open(options),
});

test("s3: part of an object is read by range, a write that leaves a hole is refused", async () => {
  const pair = await open({ blockBytes: 8_192, blockCount: 4 });
  try {
    const bytes = noise(4 * 8_192, 1);
    await pair.fillRemote(bytes);
    const pieces = (region: { id: number; byteLength: number }, offset: number): DescriptorList =>
      DescriptorList.blocks(region, { blockBytes: 1_000, blockCount: 3, offset, strideBytes: 8_192 });
    const table = pair.agent.prepare(pair.peer, { local: pieces(pair.local, 0), remote: pieces(pair.remote, 777) });
    await pair.agent.read(table, Uint32Array.of(0, 1, 2), Uint32Array.of(0, 1, 2)).done;
    for (let i = 0; i < 3; i++) {
      const at = i * 8_192;
      assert.ok(pair.local.bytes.subarray(at, at + 1_000).equals(bytes.subarray(at + 777, at + 1_777)));
    }
    const write = pair.agent.write(table, Uint32Array.of(0), Uint32Array.of(0));
    await assert.rejects(write.done, (thrown) => assertReason(thrown, "transfer-out-of-bounds"));
    assert.ok((await pair.readRemote()).equals(bytes));
  } finally {
    await pair.close();
  }
});

test("s3: an object that is not there is object-not-found, a bucket that is not there is storage-failed", async () => {
  const client = aClient();
  const into = [Buffer.alloc(10)];
  try {
    const missing = client.get({ bucket: BUCKET, key: "nobody" }, 0, into, anyTime());
    await assert.rejects(missing, (thrown) => assertReason(thrown, "object-not-found"));
    const nowhere = client.get({ bucket: "no-such-bucket", key: "nobody" }, 0, into, anyTime());
    await assert.rejects(nowhere, (thrown) => assertReason(thrown, "storage-failed"));
    assert.equal(await client.head({ bucket: BUCKET, key: "nobody" }, anyTime()), undefined);
  } finally {
    await client.close();
  }
});

test("s3: a large object goes up in parts from several pieces and comes back whole", async () => {
  const client = aClient({ partBytes: 5 * 1024 * 1024 });
  try {
    const bytes = noise(12 * 1024 * 1024, 2);
    const pieces = [bytes.subarray(0, 7_000_000), bytes.subarray(7_000_000)];
    const at = { bucket: BUCKET, key: "large/one" };
    assert.equal(await client.put(at, pieces, { ...anyTime(), ifAbsent: true }), true);
    assert.equal(await client.head(at, anyTime()), bytes.length);
    const back = Buffer.alloc(bytes.length);
    await client.get(at, 0, [back.subarray(0, 100), back.subarray(100)], anyTime());
    assert.ok(back.equals(bytes));
    assert.deepEqual(await client.list(BUCKET, "large/", "", anyTime()), [
      { key: "large/one", byteCount: bytes.length },
    ]);
    assert.equal(await client.put(at, pieces, { ...anyTime(), ifAbsent: true }), false);
    await client.remove(at, anyTime());
    await client.remove(at, anyTime());
    assert.equal(await client.head(at, anyTime()), undefined);
  } finally {
    await client.close();
  }
});

/** Answers each request by the next of `answers`; the last one stays. */
async function scriptedServer(answers: readonly ((response: ServerResponse) => void)[]): Promise<{
  client: S3Client;
  requests: () => number;
  close: () => Promise<void>;
}> {
  let count = 0;
  const http: Server = createServer((request, response) => {
    request.resume();
    answers[Math.min(count++, answers.length - 1)]!(response);
  });
  http.listen(0, "127.0.0.1");
  await once(http, "listening");
  const client = aClient({ endpoint: `http://127.0.0.1:${(http.address() as { port: number }).port}` });
  return {
    client,
    requests: () => count,
    close: async () => {
      await client.close();
      http.closeAllConnections();
      http.close();
      await once(http, "close");
    },
  };
}

test("s3: throttling, server errors and broken connections are tried again, up to the limit of tries", async () => {
  const slowDown = (response: ServerResponse): void =>
    void response.writeHead(503).end("<Error><Code>SlowDown</Code></Error>");
  const reset = (response: ServerResponse): void => void response.socket?.destroy();
  const half = (response: ServerResponse): void => {
    response.writeHead(206, { "content-length": "4" }).write("ab", () => response.socket?.destroy());
  };
  const whole = (response: ServerResponse): void => void response.writeHead(206, { "content-length": "4" }).end("abcd");
  const good = await scriptedServer([slowDown, reset, half, whole]);
  try {
    const into = Buffer.alloc(4);
    await good.client.get({ bucket: BUCKET, key: "x" }, 0, [into], anyTime());
    assert.equal(into.toString(), "abcd");
    assert.equal(good.requests(), 4);
  } finally {
    await good.close();
  }
  const bad = await scriptedServer([slowDown]);
  try {
    const call = bad.client.head({ bucket: BUCKET, key: "x" }, anyTime());
    await assert.rejects(call, (thrown) => assertReason(thrown, "storage-failed"));
    assert.equal(bad.requests(), 4);
  } finally {
    await bad.close();
  }
});

test("s3: a server that never answers is left at the deadline", async () => {
  const silent = await scriptedServer([() => undefined]);
  const agent = await TransferAgent.start({
    name: "initiator",
    tcp: false,
    shm: false,
    s3: { ...server.options, endpoint: silent.client.endpoint },
  });
  try {
    const local = await agent.register({ kind: "host", bytes: Buffer.alloc(100) });
    const objects = await agent.register({
      kind: "object",
      bucket: BUCKET,
      slotBytes: 100,
      slotCount: 1,
      keyOf: () => "x",
    });
    const list = (region: { id: number; byteLength: number }): DescriptorList =>
      DescriptorList.blocks(region, { blockBytes: 100 });
    const table = agent.prepare(agent.self, { local: list(local), remote: list(objects) });
    const transfer = agent.read(table, Uint32Array.of(0), Uint32Array.of(0), { timeoutMs: 100 });
    await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "request-deadline"));
    await until(() => silent.requests() === 1, "the request came");
  } finally {
    await agent.close();
    await silent.close();
  }
});

test("s3: credentials and endpoint come from the variables of the AWS tools", () => {
  assert.throws(
    () => s3OptionsFromEnvironment({}),
    (thrown) => assertReason(thrown, "invalid-config"),
  );
  const keys = { AWS_ACCESS_KEY_ID: "id", AWS_SECRET_ACCESS_KEY: "secret" };
  assert.equal(
    s3OptionsFromEnvironment({ ...keys, AWS_REGION: "eu-central-1" }).endpoint,
    "https://s3.eu-central-1.amazonaws.com",
  );
  assert.equal(
    s3OptionsFromEnvironment({ ...keys, AWS_ENDPOINT_URL_S3: "http://127.0.0.1:9000" }).endpoint,
    "http://127.0.0.1:9000",
  );
  assert.throws(
    () => aClient({ endpoint: "ftp://x" }),
    (thrown) => assertReason(thrown, "invalid-config"),
  );
});
