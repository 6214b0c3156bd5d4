import assert from "node:assert/strict";
import { mkdir, mkdtemp, open, readdir, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { ByteReader, ByteWriter } from "../../std/index.ts";
import { PeerProcess } from "../fixtures/peer.ts";
import { DescriptorList, TransferAgent } from "../index.ts";
import { decodeMetadata, encodeMetadata } from "../metadata.ts";
import { assertReason } from "../transfer.battery.ts";
import { HEADER_BYTES } from "./mapped-memory.ts";

/** What can go wrong with files that several processes map. Each test has a folder of its own. */
const BYTES = 64 * 1024;
const FIRST = Uint32Array.of(0);

function folderTest(
  text: string,
  run: (folder: string, start: (name: string) => Promise<TransferAgent>) => Promise<void>,
): void {
  test(`shm: ${text}`, async () => {
    const folder = await mkdtemp(join("/dev/shm", "dynamo-test-"));
    const agents: TransferAgent[] = [];
    try {
      await run(folder, async (name) => {
        agents.push(await TransferAgent.start({ name, tcp: false, shm: { folder } }));
        return agents.at(-1)!;
      });
    } finally {
      for (const agent of agents) await agent.close();
      assert.deepEqual(await readdir(folder), [], "no file is left");
      await rm(folder, { recursive: true });
    }
  });
}

folderTest("files of a process that was killed are removed by the next agent", async (folder, start) => {
  const child = await PeerProcess.start({
    agent: { name: "killed", tcp: false, shm: { folder } },
    byteLength: BYTES,
    fill: 1,
  });
  assert.equal((await readdir(folder)).length, 2);
  const neighbour = await start("neighbour");
  await neighbour.allocate(BYTES);
  assert.equal((await readdir(folder)).length, 4, "what is alive stays");
  await child.kill();
  await start("next");
  assert.equal((await readdir(folder)).length, 3);
});

folderTest("metadata that name other files, other sizes or another owner map nothing", async (folder, start) => {
  const owner = await start("owner");
  const region = await owner.allocate(BYTES);
  const agent = await start("agent");
  const local = await agent.allocate(BYTES);
  const honest = decodeMetadata(owner.metadata());
  const part = new ByteReader(honest.backends.get("shm")!);
  const folderId = part.text(128);
  const hexOf = (incarnation: bigint): string => incarnation.toString(16).padStart(16, "0");
  // A file of the right size that no agent made, a link to one, and the real one under a false identity.
  await writeFile(join(folder, `${hexOf(1n)}-1.mem`), Buffer.alloc(HEADER_BYTES + BYTES));
  await symlink(join(folder, `${hexOf(owner.incarnation)}-1.mem`), join(folder, `${hexOf(2n)}-1.mem`));
  const cases = [
    { incarnation: 1n, id: region.id, number: 1, byteLength: BYTES },
    { incarnation: 2n, id: region.id, number: 1, byteLength: BYTES },
    { incarnation: owner.incarnation, id: region.id, number: 2, byteLength: BYTES },
    { incarnation: owner.incarnation, id: region.id, number: 1, byteLength: 2 * BYTES },
    { incarnation: owner.incarnation, id: region.id + 1, number: 1, byteLength: BYTES },
  ];
  for (const { incarnation, id, number, byteLength } of cases) {
    const claim = new ByteWriter();
    claim.text(folderId);
    claim.u16(1);
    claim.u32(id);
    claim.u32(number);
    const claimed = { id, kind: "host", byteLength, remoteAccess: "read-write", label: "" };
    const identity = { name: "claimed", incarnation, hostId: honest.hostId };
    const peer = agent.addPeer(encodeMetadata(identity, new Map([["shm", claim.copy()]]), [claimed as never]));
    const remote = DescriptorList.blocks({ id, byteLength }, { blockBytes: 4_096 });
    const table = agent.prepare(peer, { local: DescriptorList.blocks(local, { blockBytes: 4_096 }), remote });
    await assert.rejects(agent.write(table, FIRST, FIRST).done, (thrown) => assertReason(thrown, "transfer-stale"));
    agent.removePeer(peer);
  }
  assert.ok(region.bytes.every((byte) => byte === 0));
  await rm(join(folder, `${hexOf(1n)}-1.mem`));
  await rm(join(folder, `${hexOf(2n)}-1.mem`));
});

folderTest(
  "more than its tmpfs has is an error, not a crash; after deregistering the bytes are gone",
  async (_folder, start) => {
    const agent = await start("agent");
    await assert.rejects(agent.allocate(2 ** 45), (thrown) => assertReason(thrown, "transfer-full"));
    const region = await agent.allocate(BYTES);
    const view = region.bytes.subarray(100, 200);
    view.fill(1);
    await agent.deregister(region);
    assert.equal(region.bytes.length, 0);
    assert.equal(view[0], undefined);
  },
);

test("shm: a folder that others may enter, or that is a link, is refused", async () => {
  const base = await mkdtemp(join(tmpdir(), "dynamo-test-"));
  try {
    const shared = join(base, "shared");
    await mkdir(shared);
    const handle = await open(shared);
    await handle.chmod(0o755);
    await handle.close();
    await symlink(base, join(base, "link"));
    for (const folder of [shared, join(base, "link")]) {
      const started = TransferAgent.start({ name: "agent", tcp: false, shm: { folder } });
      await assert.rejects(started, (thrown) => assertReason(thrown, "invalid-config"));
    }
  } finally {
    await rm(base, { recursive: true });
  }
});
