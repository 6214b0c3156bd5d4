import assert from "node:assert/strict";
import { mkdir, mkdtemp, open, readdir, rename, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test, type TestContext } from "node:test";
import fc from "fast-check";
import { silentLogger } from "../../observability/index.ts";
import { ManualClock } from "../../std/index.ts";
import { DiskTier, type DiskTierOptions } from "./disk-tier.ts";
import { HEADER_BYTES } from "./entry.ts";
import { FORMAT, aBlock, itsBytes } from "./fixtures/blocks.ts";
import { RecordingMeters } from "./fixtures/memory-tier.ts";
import { systemFiles, type TierFiles } from "./tier-files.ts";

const STRIDE = 8_192;

class Rig {
  readonly folder: string;
  readonly clock = new ManualClock();
  meters = new RecordingMeters();
  tier!: DiskTier;

  constructor(folder: string) {
    this.folder = folder;
  }

  /** A life of the tier. */
  async start(overrides: Partial<DiskTierOptions> = {}): Promise<DiskTier> {
    this.meters = new RecordingMeters();
    this.tier = new DiskTier({
      folder: this.folder,
      bytes: 8 * STRIDE,
      format: FORMAT,
      clock: this.clock,
      logger: silentLogger,
      meters: this.meters,
      ...overrides,
    });
    await this.tier.open();
    return this.tier;
  }

  async write(depth: number, chain = 0): Promise<boolean> {
    const block = aBlock(depth, chain);
    return this.tier.write([block], [itsBytes(block)]);
  }

  /** True when the block comes back; if it does, it is right. */
  async read(depth: number, chain = 0): Promise<boolean> {
    const block = aBlock(depth, chain);
    const into = new Uint8Array(FORMAT.blockBytes);
    if (!(await this.tier.read([block], [into]))[0]) return false;
    assert.deepEqual(into, new Uint8Array(itsBytes(block)));
    return true;
  }

  /** Changes bytes of the file behind the tier's back. */
  async damage(position: number, bytes: Uint8Array): Promise<void> {
    const file = await open(this.tier.path, "r+");
    await file.write(bytes, 0, bytes.length, position);
    await file.close();
  }
}

async function aRig(t: TestContext): Promise<Rig> {
  const rig = new Rig(await mkdtemp(join(tmpdir(), "dynamo-disk-tier-")));
  t.after(async () => {
    await rig.tier?.close();
    await rm(rig.folder, { recursive: true, force: true });
  });
  return rig;
}

test("disk tier: what was written comes back, also in the next life, and is told parents first", async (t) => {
  const rig = await aRig(t);
  await rig.start();
  for (let depth = 0; depth < 4; depth++) assert(await rig.write(depth));
  assert(await rig.write(0, 1));
  assert(await rig.read(2));
  await rig.tier.close();
  const tier = await rig.start();
  assert.equal((await readdir(rig.folder)).length, 1, "the file was taken over");
  assert.equal(tier.usedBytes, 5 * FORMAT.blockBytes);
  const told = tier.takeStored();
  assert.equal(told.length, 5);
  const seen = new Set(["0:0"]);
  for (const { lo, hi, parentLo, parentHi } of told) {
    assert(seen.has(`${parentLo}:${parentHi}`), "a parent is told before its children");
    seen.add(`${lo}:${hi}`);
  }
  for (let depth = 0; depth < 4; depth++) assert(await rig.read(depth));
  assert(await rig.read(0, 1));
});

test("disk tier: two at once in one folder have a file each", async (t) => {
  const rig = await aRig(t);
  const first = await rig.start();
  await rig.write(0);
  const second = await rig.start();
  assert.notEqual(first.path, second.path);
  assert.equal(second.usedBytes, 0);
  await first.close();
});

test("disk tier: it holds what its budget says and forgets leaves first", async (t) => {
  const rig = await aRig(t);
  const tier = await rig.start();
  for (let depth = 0; depth < 12; depth++) assert(await rig.write(depth));
  assert.equal(tier.usedBytes, 8 * FORMAT.blockBytes);
  assert.equal(tier.takeRemoved().length, 2 * 4);
  assert(await rig.read(0), "the beginning of the chain is still there");
  assert.equal(await tier.clear(), 8);
  assert.equal(tier.usedBytes, 0);
  await tier.close();
  assert.equal((await rig.start()).usedBytes, 0, "nothing comes back after clear");
});

test("disk tier: a flipped bit anywhere is found, counted, and the block forgotten", async (t) => {
  const rig = await aRig(t);
  await rig.start();
  await fc.assert(
    fc.asyncProperty(
      fc.integer({ min: 0, max: HEADER_BYTES + FORMAT.blockBytes - 1 }),
      fc.integer({ min: 0, max: 7 }),
      async (at, bit) => {
        await rig.tier.clear();
        assert(await rig.write(0));
        const file = await open(rig.tier.path, "r+");
        // The only entry ends where the file does.
        const start = (await file.stat()).size - HEADER_BYTES - FORMAT.blockBytes;
        const byte = Buffer.alloc(1);
        await file.read(byte, 0, 1, start + at);
        byte[0]! ^= 1 << bit;
        await file.write(byte, 0, 1, start + at);
        await file.close();
        assert(!(await rig.read(0)));
        const { lo, hi } = aBlock(0);
        assert(!rig.tier.has(lo, hi));
        assert.equal(rig.tier.usedBytes, 0);
      },
    ),
    { numRuns: 60 },
  );
  assert.equal(rig.meters.failures.get("disk corrupt"), 60);
});

test("disk tier: a torn write is not found in the next life, or found out when it is read", async (t) => {
  const rig = await aRig(t);
  await rig.start();
  for (let depth = 0; depth < 3; depth++) await rig.write(depth);
  // The old bytes with the new header, the new bytes with half a header, and a file that ends early.
  await rig.damage(STRIDE + HEADER_BYTES + 3_000, new Uint8Array(2_000));
  await rig.damage(0, new Uint8Array(30));
  const file = await open(rig.tier.path, "r+");
  await file.truncate(2 * STRIDE + 100);
  await file.close();
  await rig.tier.close();
  await rig.start();
  for (let depth = 0; depth < 3; depth++) assert(!(await rig.read(depth)));
  assert.equal(rig.tier.usedBytes, 0);
});

test("disk tier: entries of another model or layout are not found, and never taken for ours", async (t) => {
  const rig = await aRig(t);
  await rig.start();
  await rig.write(0);
  const { path } = rig.tier;
  await rig.tier.close();
  for (const format of [
    { ...FORMAT, fingerprint: [1, 2] as const },
    { ...FORMAT, blockBytes: 4_000 },
  ]) {
    const other = await rig.start({ format });
    assert.equal(other.usedBytes, 0);
    assert.notEqual(other.path, path);
    await other.close();
  }
  // Even when somebody gives the file another's name.
  const other = await rig.start({ format: { ...FORMAT, fingerprint: [1, 2] } });
  const otherPath = other.path;
  await other.close();
  await rename(path, otherPath);
  const misled = await rig.start({ format: { ...FORMAT, fingerprint: [1, 2] } });
  assert.equal(misled.usedBytes, 0);
  assert.equal(rig.meters.failures.get("disk foreign"), 1);
});

test("disk tier: the file is as long as what was written, also in the next life", async (t) => {
  const rig = await aRig(t);
  for (const blocks of [1, 3]) {
    const tier = await rig.start();
    for (let depth = 0; depth < blocks; depth++)
      if (!tier.has(aBlock(depth).lo, aBlock(depth).hi)) await rig.write(depth);
    const { size } = await stat(tier.path);
    assert.equal(Math.ceil(size / STRIDE), blocks);
    await tier.close();
  }
});

test("disk tier: what is evicted before it was told is told as gone only", async (t) => {
  const rig = await aRig(t);
  await rig.start();
  for (let depth = 0; depth < 8; depth++) assert(await rig.write(depth));
  await rig.tier.close();
  // The next life finds eight blocks, and has to make room before anybody asked what it has.
  const tier = await rig.start();
  assert(await rig.write(0, 1));
  const gone = tier.takeRemoved();
  assert.equal(gone.length, 2, "one block made room");
  const came = tier.takeStored().map(({ lo, hi }) => `${lo}:${hi}`);
  assert.equal(came.length, 8);
  assert(!came.includes(`${gone[0]}:${gone[1]}`));
});

test("disk tier: full or read-only it is degraded, reads on, and recovers by itself", async (t) => {
  const rig = await aRig(t);
  let code = "";
  const files: TierFiles = {
    ...systemFiles,
    open: async (path, flags) => {
      if (code === "EROFS") throw Object.assign(new Error(code), { code });
      const file = await systemFiles.open(path, flags);
      const writev = file.writev.bind(file);
      file.writev = async (pieces, position) => {
        if (code !== "") throw Object.assign(new Error(code), { code });
        return writev(pieces, position);
      };
      return file;
    },
  };
  const tier = await rig.start({ files });
  assert(await rig.write(0));
  code = "ENOSPC";
  assert(!(await rig.write(1)));
  assert(rig.meters.degradedTiers.has("disk"));
  assert(!tier.isWritable());
  assert(await rig.read(0));
  code = "";
  rig.clock.advance(1_000);
  assert(tier.isWritable());
  assert(await rig.write(1));
  assert(!rig.meters.degradedTiers.has("disk"));
  assert.equal(tier.usedBytes, 2 * FORMAT.blockBytes);
  await tier.close();
  code = "EROFS";
  await rig.start({ files });
  assert(rig.meters.degradedTiers.has("disk"), "a worker starts without its disk");
  assert(!(await rig.write(2)));
  code = "";
  rig.clock.advance(1_000);
  assert(await rig.write(2));
  assert(await rig.read(0), "what the last life left is there again");
});

test("disk tier: a folder that vanishes takes its blocks along; with the next it goes on", async (t) => {
  const rig = await aRig(t);
  const tier = await rig.start();
  await rig.write(0);
  tier.takeStored();
  await rm(rig.folder, { recursive: true });
  rig.clock.advance(1_000);
  assert(!(await rig.write(1)));
  assert.equal(tier.takeRemoved().length, 2);
  assert.equal(tier.usedBytes, 0);
  assert(rig.meters.degradedTiers.has("disk"));
  await mkdir(rig.folder);
  rig.clock.advance(1_000);
  assert(await rig.write(1));
  assert(await rig.read(1));
  assert.equal((await readdir(rig.folder)).length, 1);
});

test("disk tier: random lives with damage between them: a block comes back right or not at all", async (t) => {
  const rig = await aRig(t);
  const aStep = fc.record({
    depth: fc.nat(15),
    chain: fc.nat(2),
    kind: fc.constantFrom("write", "write", "read", "restart", "damage"),
    at: fc.nat(8 * STRIDE),
  });
  await fc.assert(
    fc.asyncProperty(fc.array(aStep, { maxLength: 40 }), async (steps) => {
      await rig.tier?.close();
      await rig.start();
      await rig.tier.clear();
      for (const { kind, depth, chain, at } of steps) {
        if (kind === "write") assert(await rig.write(depth, chain));
        else if (kind === "read") await rig.read(depth, chain);
        else if (kind === "damage") await rig.damage(at, Uint8Array.of(1, 2, 3));
        else {
          await rig.tier.close();
          await rig.start();
        }
        assert(rig.tier.usedBytes <= rig.tier.capacityBytes);
      }
    }),
    { numRuns: 40 },
  );
});
