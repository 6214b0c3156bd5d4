import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { systemClock } from "../std/index.ts";
import { DescriptorList, TransferAgent, type FileMemory, type RegisterOptions } from "./index.ts";
import { assertReason, noise, transferBattery, type OpenOptions, type Pair } from "./transfer.battery.ts";

async function open(options: OpenOptions, direct: boolean): Promise<Pair> {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-transfer-"));
  const path = join(folder, "slab");
  const byteLength = options.blockBytes * options.blockCount;
  const agent = await TransferAgent.start({ name: "initiator", clock: options.clock ?? systemClock, tcp: false });
  const local = await agent.allocate(byteLength);
  const register: RegisterOptions = options.remote ?? {};
  const remoteRegion = await agent.register({ kind: "file", path, byteLength, direct }, register);
  return {
    agent,
    owner: agent,
    peer: agent.self,
    local,
    remote: remoteRegion,
    remoteRegion,
    fillRemote: (bytes) => writeFile(path, bytes, { flag: "r+" }),
    readRemote: () => readFile(path),
    close: async () => {
      await agent.close();
      await rm(folder, { recursive: true });
    },
  };
}

transferBattery({
  backend: "file",
  hasPeer: false,
  ownerChecks: true,
  anyRange: true,
  recallsWrites: true,
  open: (options) => open(options, false),
});

test("file: past the page cache with memory of the agent's; unaligned blocks and other memory are refused with the reason", async () => {
  const aligned = await open({ blockBytes: 8_192, blockCount: 8 }, true);
  try {
    const bytes = noise(8 * 8_192, 1);
    aligned.local.bytes.set(bytes);
    const lists = (blockBytes: number): { local: DescriptorList; remote: DescriptorList } => ({
      local: DescriptorList.blocks(aligned.local, { blockBytes }),
      remote: DescriptorList.blocks(aligned.remote, { blockBytes }),
    });
    const table = aligned.agent.prepare(aligned.peer, lists(8_192));
    const order = Uint32Array.of(3, 1, 0, 2, 7, 6, 5, 4);
    await aligned.agent.write(table, order, order).done;
    assert.ok((await aligned.readRemote()).equals(bytes));
    aligned.local.bytes.fill(0);
    await aligned.agent.read(table, order, order).done;
    assert.ok(aligned.local.bytes.equals(bytes));
    const refused = (run: () => unknown, why: RegExp): void =>
      assert.throws(run, (thrown) => {
        assertReason(thrown, "transfer-no-path");
        assert.match((thrown as { diagnostic?: string }).diagnostic!, why);
        return true;
      });
    refused(() => aligned.agent.prepare(aligned.peer, lists(1_000)), /multiples of 4096/);
    const other = await aligned.agent.register({ kind: "host", bytes: Buffer.alloc(8 * 8_192) });
    const foreign = { ...lists(8_192), local: DescriptorList.blocks(other, { blockBytes: 8_192 }) };
    refused(() => aligned.agent.prepare(aligned.peer, foreign), /agent\.allocate/);
  } finally {
    await aligned.close();
  }
});

test("file: a slab that was cut short, a folder that is not there, a file that is none: storage-failed", async () => {
  const pair = await open({ blockBytes: 4_096, blockCount: 4 }, false);
  try {
    const memory = pair.remoteRegion.memory as FileMemory;
    const table = pair.agent.prepare(pair.peer, {
      local: DescriptorList.blocks(pair.local, { blockBytes: 4_096 }),
      remote: DescriptorList.blocks(pair.remote, { blockBytes: 4_096 }),
    });
    await truncate(memory.path, 6_000);
    const read = pair.agent.read(table, Uint32Array.of(0, 1, 2), Uint32Array.of(0, 1, 2));
    await assert.rejects(read.done, (thrown) => assertReason(thrown, "storage-failed"));
    for (const path of [join(memory.path, "below a file"), dirname(memory.path)]) {
      await assert.rejects(pair.agent.register({ kind: "file", path, byteLength: 1 }), (thrown) =>
        assertReason(thrown, "storage-failed"),
      );
    }
  } finally {
    await pair.close();
  }
});

test("file: what an agent wrote, synced, another agent finds after it", async () => {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-transfer-"));
  const memory = { kind: "file", path: join(folder, "slab"), byteLength: 8_192, sync: true } as const;
  const one = Uint32Array.of(1);
  try {
    for (const round of ["write", "read"] as const) {
      const agent = await TransferAgent.start({ name: round, tcp: false, shm: false });
      const local = await agent.register({ kind: "host", bytes: Buffer.alloc(8_192, round === "write" ? 6 : 0) });
      const file = await agent.register(memory);
      const lists = {
        local: DescriptorList.blocks(local, { blockBytes: 4_096 }),
        remote: DescriptorList.blocks(file, { blockBytes: 4_096 }),
      };
      await agent.transfer(round, agent.prepare(agent.self, lists), one, one).done;
      if (round === "read") assert.deepEqual([local.bytes[0], local.bytes[4_096]], [0, 6]);
      await agent.close();
    }
  } finally {
    await rm(folder, { recursive: true });
  }
});
