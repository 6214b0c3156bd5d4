import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import { DynamoError } from "../errors/index.ts";
import { PeerProcess } from "./fixtures/peer.ts";
import {
  DescriptorList,
  TransferAgent,
  type BackendName,
  type PreparedTable,
  type Region,
  type TransferAgentOptions,
} from "./index.ts";
import { assertReason, noise, openDescriptorCount, until } from "./transfer.battery.ts";

/** What a back end between processes promises when the other one is real: that bytes arrive, and what happens when it dies. */
export interface ProcessWorld {
  readonly backend: BackendName;
  readonly agent: Omit<TransferAgentOptions, "name">;
  /** A frozen peer takes no part in a transfer that its memory allows without it. */
  readonly needsLivePeer: boolean;
}

const BLOCK_BYTES = 33_792;
const BLOCK_COUNT = 1_024;
const BYTES = BLOCK_BYTES * BLOCK_COUNT;
const all = Uint32Array.from({ length: BLOCK_COUNT }, (_, i) => i);
const reversed = all.toReversed();

interface Scene {
  readonly agent: TransferAgent;
  readonly child: PeerProcess;
  readonly local: Region;
  readonly table: PreparedTable;
}

export function processBattery(world: ProcessWorld): void {
  function sceneTest(text: string, run: (scene: Scene) => Promise<void>): void {
    test(`${world.backend} between processes: ${text}`, async () => {
      const order = { agent: { ...world.agent, name: "peer" }, byteLength: BYTES, fill: 7 };
      const child = await PeerProcess.start(order as never);
      const agent = await TransferAgent.start({ ...world.agent, name: "initiator" });
      try {
        const local = await agent.allocate(BYTES);
        const peer = agent.addPeer(child.metadata);
        const remote = [...peer.metadata.regions.values()].find(({ label }) => label === "pool")!;
        const lists = {
          local: DescriptorList.blocks(local, { blockBytes: BLOCK_BYTES }),
          remote: DescriptorList.blocks(remote, { blockBytes: BLOCK_BYTES }),
        };
        await run({ agent, child, local, table: agent.prepare(peer, lists, { backend: world.backend }) });
      } finally {
        await agent.close();
        await child.kill();
      }
    });
  }

  sceneTest(
    "a thousand blocks of 33 kB go there in another order and come back, with messages",
    async ({ agent, child, local, table }) => {
      const bytes = noise(BYTES, 1);
      local.bytes.set(bytes);
      await agent.write(table, all, reversed, { message: Buffer.from("written") }).done;
      await until(() => child.messages.includes("written"), "the message of the write");
      const expected = Buffer.alloc(BYTES);
      for (let i = 0; i < BLOCK_COUNT; i++) {
        bytes.copy(expected, (BLOCK_COUNT - 1 - i) * BLOCK_BYTES, i * BLOCK_BYTES, (i + 1) * BLOCK_BYTES);
      }
      assert.equal(await child.digest(), createHash("sha256").update(expected).digest("hex"));
      local.bytes.fill(0);
      await agent.read(table, all, reversed, { message: Buffer.from("read") }).done;
      assert.ok(local.bytes.equals(bytes));
      await until(() => child.messages.length === 2, "the message of the read");
      assert.deepEqual(child.messages, ["written", "read"]);
    },
  );

  for (const operation of ["read", "write"] as const) {
    sceneTest(
      `a peer killed during a ${operation} fails it at once, and leaves nothing behind`,
      async ({ agent, child, local, table }) => {
        await agent.transfer(operation, table, all.subarray(0, 1), all.subarray(0, 1)).done;
        const transfers = Array.from({ length: 8 }, () =>
          agent.transfer(operation, table, all, reversed, { timeoutMs: 20_000 }),
        );
        const startMs = performance.now();
        await child.kill();
        const outcomes = await Promise.all(
          transfers.map((transfer) => transfer.done.catch((thrown: unknown) => thrown)),
        );
        assert.ok(performance.now() - startMs < 10_000, "before the deadline");
        for (const outcome of outcomes) if (outcome !== undefined) assertReason(outcome, "transfer-peer-lost");
        // Memory that is gone cannot be reached any more, and the agent works on.
        const late = agent.transfer(operation, table, all, all, { timeoutMs: 15_000 });
        await assert.rejects(late.done, (thrown) => thrown instanceof DynamoError);
        assert.equal(agent.activeTransferCount, 0);
        await agent.deregister(local);
      },
    );
  }

  if (world.needsLivePeer) {
    sceneTest("a frozen peer: the transfer ends at its deadline", async ({ agent, child, table }) => {
      await agent.read(table, all.subarray(0, 1), all.subarray(0, 1)).done;
      child.child.kill("SIGSTOP");
      try {
        const startMs = performance.now();
        const transfers = (["read", "write"] as const).map((operation) =>
          agent.transfer(operation, table, all, reversed, { timeoutMs: 300 }),
        );
        for (const transfer of transfers)
          await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "request-deadline"));
        assert.ok(performance.now() - startMs < 5_000);
      } finally {
        child.child.kill("SIGCONT");
      }
    });
  }

  test(`${world.backend} between processes: peers that come and go leave no descriptor and no mapping`, async () => {
    const once = async (): Promise<void> => {
      const child = await PeerProcess.start({
        agent: { ...world.agent, name: "peer" },
        byteLength: BYTES,
        fill: 1,
      } as never);
      const agent = await TransferAgent.start({ ...world.agent, name: "initiator" });
      const local = await agent.allocate(BYTES);
      const peer = agent.addPeer(child.metadata);
      const [remote] = peer.metadata.regions.values();
      const lists = {
        local: DescriptorList.blocks(local, { blockBytes: BLOCK_BYTES }),
        remote: DescriptorList.blocks(remote!, { blockBytes: BLOCK_BYTES }),
      };
      await agent.write(agent.prepare(peer, lists, { backend: world.backend }), all, all).done;
      await child.close();
      await agent.close();
    };
    await once();
    const before = openDescriptorCount();
    for (let i = 0; i < 2; i++) await once();
    await until(() => openDescriptorCount() <= before, `${openDescriptorCount()} descriptors, ${before} before`);
  });
}
