import assert from "node:assert/strict";
import { mkdir, mkdtemp, readFile, readdir, rename, rm, writeFile } from "node:fs/promises";
import { createServer, type Server } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import { silentLogger } from "../../observability/index.ts";
import { ManualClock, systemClock, systemRandom, type Clock } from "../../std/index.ts";
import { BUCKET, startS3Server } from "../../transfer/s3/fixtures/s3-server.ts";
import { S3Client } from "../../transfer/s3/index.ts";
import { FORMAT, NO_LIMIT, aBlock, itsBytes } from "./fixtures/blocks.ts";
import { RecordingMeters } from "./fixtures/memory-tier.ts";
import { BucketStore, FolderStore, type ObjectStore } from "./object-store.ts";
import { ObjectTier } from "./object-tier.ts";
import { packKey } from "./pack-key.ts";

interface Life {
  readonly tier: ObjectTier;
  readonly meters: RecordingMeters;
}

async function aLife(store: ObjectStore, clock: Clock = systemClock, format = FORMAT): Promise<Life> {
  const meters = new RecordingMeters();
  const tier = new ObjectTier({ store, format, clock, logger: silentLogger, meters });
  await tier.open();
  await tier.listed();
  return { tier, meters };
}

/** Blocks `from` to `to` of a chain, in one object. */
async function write({ tier }: Life, from: number, to = from): Promise<boolean> {
  const run = Array.from({ length: to - from + 1 }, (_, i) => aBlock(from + i));
  return tier.write(run, run.map(itsBytes));
}

async function read({ tier }: Life, depth: number, deadlineMs = Infinity): Promise<boolean> {
  const into = new Uint8Array(new SharedArrayBuffer(FORMAT.blockBytes));
  const signal = Number.isFinite(deadlineMs) ? AbortSignal.timeout(50) : NO_LIMIT.signal;
  if (!(await tier.read([aBlock(depth)], [into], { signal, deadlineMs }))[0]) return false;
  assert.deepEqual(into, itsBytes(aBlock(depth)));
  return true;
}

const has = ({ tier }: Life, depth: number): boolean => tier.has(aBlock(depth).lo, aBlock(depth).hi);

async function aFolder(t: TestContext): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-object-tier-"));
  t.after(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

async function keepsBlocks(makeStore: () => ObjectStore): Promise<void> {
  const first = await aLife(makeStore());
  assert(await write(first, 0));
  assert(await write(first, 1));
  assert(await write(first, 1), "a block that is there is as good as written");
  assert(await read(first, 1));
  await first.tier.close();
  const second = await aLife(makeStore());
  assert(has(second, 0) && has(second, 1), "what is there is found again");
  assert(!has(second, 2));
  assert(await read(second, 0));
  await second.tier.close();
  const third = await aLife(makeStore());
  assert(await write(third, 2, 6));
  await third.tier.close();
  const fourth = await aLife(makeStore());
  const run = [3, 4, 5].map((depth) => aBlock(depth));
  assert.equal(fourth.tier.runLength(run), 3, "neighbours in one object are read together");
  assert.equal(fourth.tier.runLength([aBlock(1), aBlock(2)]), 1, "blocks of two objects are not");
  const into = run.map(() => new Uint8Array(new SharedArrayBuffer(FORMAT.blockBytes)));
  assert.deepEqual(await fourth.tier.read(run, into, NO_LIMIT), [true, true, true]);
  assert.deepEqual(into, run.map(itsBytes));
  await fourth.tier.close();
  const other = await aLife(makeStore(), systemClock, { ...FORMAT, fingerprint: [7, 7] });
  assert(!has(other, 0), "another model does not find it");
  await other.tier.close();
}

test("object tier: a bucket keeps blocks over lives and models apart", async () => {
  const server = await startS3Server();
  try {
    await keepsBlocks(
      () => new BucketStore(new S3Client(server.options, { clock: systemClock, random: systemRandom }), BUCKET),
    );
  } finally {
    await server.close();
  }
});

test("object tier: a shared folder keeps blocks over lives and models apart, without leftovers", async (t) => {
  const folder = await aFolder(t);
  await keepsBlocks(() => new FolderStore(folder));
  const [model] = await readdir(folder);
  assert.equal((await readdir(join(folder, model!))).length, 3);
});

test("object tier: damaged, short and foreign objects are refused and counted", async (t) => {
  const folder = await aFolder(t);
  const life = await aLife(new FolderStore(folder));
  for (let depth = 0; depth < 3; depth++) await write(life, depth);
  const model = join(folder, (await readdir(folder))[0]!);
  const pathOf = async (depth: number): Promise<string> => {
    const key = packKey([aBlock(depth)]);
    assert((await readdir(model)).includes(key));
    return join(model, key);
  };
  const flipped = await readFile(await pathOf(0));
  flipped[3_000]! ^= 1;
  await writeFile(await pathOf(0), flipped);
  await writeFile(await pathOf(1), (await readFile(await pathOf(1))).subarray(0, 1_000));
  assert(!(await read(life, 0)));
  assert(!(await read(life, 1)));
  await rename(await pathOf(2), await pathOf(0));
  life.tier.takeStored();
  assert(!(await read(life, 0)), "another block's object");
  assert(!(await read(life, 2)), "an object that was deleted");
  assert.deepEqual(Object.fromEntries(life.meters.failures), {
    "object corrupt": 2,
    "object foreign": 1,
    "object gone": 1,
  });
  assert(!life.meters.degradedTiers.has("object"), "the store itself works");
  await life.tier.close();
});

test("object tier: a damaged block of an object costs that block alone", async (t) => {
  const folder = await aFolder(t);
  const life = await aLife(new FolderStore(folder));
  assert(await write(life, 0, 3));
  const model = join(folder, (await readdir(folder))[0]!);
  const path = join(model, (await readdir(model))[0]!);
  const bytes = await readFile(path);
  bytes[(64 + FORMAT.blockBytes) * 2 + 100]! ^= 1;
  await writeFile(path, bytes.subarray(0, bytes.length - 1));
  const run = [0, 1, 2, 3].map((depth) => aBlock(depth));
  const into = run.map(() => new Uint8Array(FORMAT.blockBytes));
  assert.deepEqual(await life.tier.read(run, into, NO_LIMIT), [true, true, false, false]);
  assert.deepEqual(Object.fromEntries(life.meters.failures), { "object corrupt": 2 });
  assert(has(life, 1) && !has(life, 2) && !has(life, 3));
  await life.tier.close();
});

test("object tier: tells what a listing found, parents first, and what it finds gone; what came and left, neither", async (t) => {
  const folder = await aFolder(t);
  const first = await aLife(new FolderStore(folder));
  await write(first, 4, 6);
  await write(first, 0, 3);
  assert.deepEqual(
    first.tier.takeStored().map(({ depth }) => depth),
    [0, 1, 2, 3, 4, 5, 6],
  );
  assert.deepEqual(first.tier.takeStored(), []);
  await write(first, 7);
  const model = join(folder, (await readdir(folder))[0]!);
  await rm(join(model, packKey([aBlock(7)])));
  assert(!(await read(first, 7)));
  assert.deepEqual([first.tier.takeStored(), first.tier.takeRemoved().length], [[], 0]);
  await first.tier.close();
  const second = new ObjectTier({
    store: new FolderStore(folder),
    format: FORMAT,
    clock: systemClock,
    logger: silentLogger,
    meters: new RecordingMeters(),
  });
  let changes = 0;
  second.onChange = () => changes++;
  await second.open();
  await second.listed();
  assert.equal(changes, 1);
  assert.deepEqual(
    second.takeStored(),
    Array.from({ length: 7 }, (_, depth) => aBlock(depth)),
  );
  await rm(model, { recursive: true });
  const into = new Uint8Array(FORMAT.blockBytes);
  assert.deepEqual(await second.read([aBlock(4)], [into], NO_LIMIT), [false]);
  assert.deepEqual([...second.takeRemoved()], [aBlock(4).lo, aBlock(4).hi]);
  await second.close();
});

test("object tier: a folder that is gone degrades the tier, which recovers by itself", async (t) => {
  const folder = await aFolder(t);
  const clock = new ManualClock();
  const life = await aLife(new FolderStore(folder), clock);
  assert(await write(life, 0));
  await rename(folder, `${folder}.away`);
  assert(!(await write(life, 1)));
  assert(life.meters.degradedTiers.has("object"));
  assert(!life.tier.isWritable() && !has(life, 0));
  await rename(`${folder}.away`, folder);
  clock.advance(1_000);
  assert(await write(life, 1));
  assert(!life.meters.degradedTiers.has("object"));
  assert(await read(life, 0));
  await life.tier.close();
});

const BAD_STORES: Readonly<Record<string, (server: Server) => void>> = {
  forbidden: (server) => server.on("request", (_, response) => response.writeHead(403).end()),
  "not answering": (server) => server.on("request", () => undefined),
  "cutting connections": (server) => server.on("connection", (socket) => socket.destroy()),
};
for (const [what, misbehave] of Object.entries(BAD_STORES)) {
  test(`object tier: a store that is ${what} degrades the tier and holds nobody up`, async () => {
    const server = createServer();
    misbehave(server);
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as { port: number };
    const client = new S3Client(
      { endpoint: `http://127.0.0.1:${port}`, accessKeyId: "a", secretAccessKey: "b", attempts: 1 },
      { clock: systemClock, random: systemRandom },
    );
    const meters = new RecordingMeters();
    const tier = new ObjectTier({
      store: new BucketStore(client, BUCKET),
      format: FORMAT,
      clock: systemClock,
      logger: silentLogger,
      meters,
    });
    try {
      assert(!(await read({ tier, meters }, 0, systemClock.monotonicMs() + 50)));
      assert.equal(meters.failures.get("object read-failed"), 1);
      assert(meters.degradedTiers.has("object"));
      assert(!tier.isWritable());
    } finally {
      await tier.close();
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    }
  });
}

test("object tier: a bucket that vanishes, and a server that goes, degrade the tier; with the next it goes on", async () => {
  const server = await startS3Server();
  const clock = new ManualClock();
  const client = new S3Client({ ...server.options, attempts: 1 }, { clock: systemClock, random: systemRandom });
  const life = await aLife(new BucketStore(client, "not-made-yet"), clock);
  try {
    assert(!(await write(life, 0)));
    assert(life.meters.degradedTiers.has("object"), "no bucket is not the same as no object");
    await client.createBucket("not-made-yet", { signal: AbortSignal.timeout(5_000), deadlineMs: Infinity });
    clock.advance(2_000);
    assert(await write(life, 0, 2));
    assert(await read(life, 1));
    assert(!life.meters.degradedTiers.has("object"));
  } finally {
    await server.close();
  }
  assert(!(await read(life, 1)));
  assert(life.meters.degradedTiers.has("object"));
  assert(!has(life, 1), "nobody is parked for a store that is away");
  await life.tier.close();
});

test("object tier: a folder of the store that nobody made is not made, its model's is", async (t) => {
  const folder = await aFolder(t);
  const life = await aLife(new FolderStore(join(folder, "not-mounted")));
  assert(!(await write(life, 0)));
  await life.tier.close();
  assert.deepEqual(await readdir(folder), []);
  await mkdir(join(folder, "mounted"));
  const other = await aLife(new FolderStore(join(folder, "mounted")));
  assert(await write(other, 0));
  await other.tier.close();
});
