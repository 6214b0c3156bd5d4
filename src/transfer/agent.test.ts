import assert from "node:assert/strict";
import { test } from "node:test";
import { Metrics, createLogger } from "../observability/index.ts";
import { DescriptorList, MemoryNetwork, TransferAgent, type Region, type TransferAgentOptions } from "./index.ts";
import type { PairQuestion, TransferBackend } from "./backend.ts";
import type { BackendChoice, BackendName } from "./base.ts";
import { chooseBackend } from "./choose-backend.ts";
import { assertReason } from "./transfer.battery.ts";

const BLOCK = 4_096;
const EMPTY = new Uint8Array(0);
const FIRST = Uint32Array.of(0);

const blocks = (region: { id: number; byteLength: number }): DescriptorList =>
  DescriptorList.blocks(region, { blockBytes: BLOCK });

/** An agent that owns memory, and one that wants some, with `options`. */
async function withPair(
  options: Partial<TransferAgentOptions>,
  ownerOptions: Partial<TransferAgentOptions>,
  run: (agent: TransferAgent, owner: TransferAgent) => Promise<void>,
): Promise<void> {
  const agent = await TransferAgent.start({ name: "agent", ...options });
  const owner = await TransferAgent.start({ name: "owner", ...ownerOptions });
  try {
    await run(agent, owner);
  } finally {
    await agent.close();
    await owner.close();
  }
}

function prepare(agent: TransferAgent, owner: TransferAgent, local: Region, label: string) {
  const peer = agent.addPeer(owner.metadata());
  const remote = [...peer.metadata.regions.values()].find((region) => region.label === label)!;
  return agent.prepare(peer, { local: blocks(local), remote: blocks(remote) });
}

test("transfer agent: the fastest back end that both sides' memory allows is taken, and the reason said", async () => {
  await withPair({}, {}, async (agent, owner) => {
    const local = await agent.register({ kind: "host", bytes: Buffer.alloc(BLOCK) });
    await owner.allocate(BLOCK, { label: "mapped" });
    const table = prepare(agent, owner, local, "mapped");
    assert.equal(table.backend, "shm");
    assert.equal(table.isSlowPath, false);
    assert.match(table.reason, /memory: the peer is in another process/);
    await agent.read(table, FIRST, FIRST).done;
  });
  const memory = new MemoryNetwork();
  await withPair({ memory }, { memory }, async (agent, owner) => {
    const local = await agent.register({ kind: "host", bytes: Buffer.alloc(BLOCK) });
    await owner.allocate(BLOCK, { label: "mapped" });
    assert.equal(prepare(agent, owner, local, "mapped").backend, "memory");
  });
  await withPair({ shm: false }, {}, async (agent, owner) => {
    const local = await agent.register({ kind: "host", bytes: Buffer.alloc(BLOCK) });
    await owner.allocate(BLOCK, { label: "mapped" });
    const table = prepare(agent, owner, local, "mapped");
    assert.equal(table.backend, "tcp");
    assert.equal(table.isSlowPath, false, "only one side has a faster one");
  });
});

test("transfer agent: a slow path is warned about and counted, refused, or allowed in silence, as asked", async () => {
  for (const slowPath of ["warn", "refuse", "allow"] as const) {
    const lines: string[] = [];
    const logger = createLogger({ level: "warn", format: "jsonl", write: (line) => void lines.push(line) });
    const metrics = new Metrics();
    await withPair({ slowPath, logger, metrics }, {}, async (agent, owner) => {
      const local = await agent.register({ kind: "host", bytes: Buffer.alloc(BLOCK) });
      await owner.register({ kind: "host", bytes: Buffer.alloc(BLOCK) }, { label: "plain" });
      if (slowPath === "refuse") {
        assert.throws(
          () => prepare(agent, owner, local, "plain"),
          (thrown) => assertReason(thrown, "transfer-no-path"),
        );
        return;
      }
      const table = prepare(agent, owner, local, "plain");
      assert.equal(table.backend, "tcp");
      assert.equal(table.isSlowPath, true);
      assert.match(table.reason, /shm: the peer's memory is not mapped/);
      assert.equal(lines.length, slowPath === "warn" ? 1 : 0);
      if (slowPath === "warn") assert.match(lines[0]!, /slow path/);
      assert.match(await metrics.render(), /dynamo_transfer_slow_paths_total\{backend="tcp"\} 1/);
      // Each table is counted, and a pair is told of once, or anew when the peer came back.
      prepare(agent, owner, local, "plain");
      assert.match(await metrics.render(), /dynamo_transfer_slow_paths_total\{backend="tcp"\} 2/);
      assert.equal(lines.length, slowPath === "warn" ? 1 : 0);
      agent.removePeer(agent.addPeer(owner.metadata()));
      prepare(agent, owner, local, "plain");
      assert.equal(lines.length, slowPath === "warn" ? 2 : 0);
    });
  }
});

test("transfer agent: no back end in common, or the wanted one cannot: refused with the reasons", async () => {
  await withPair({ tcp: false, shm: false }, { shm: false }, async (agent, owner) => {
    const local = await agent.register({ kind: "host", bytes: Buffer.alloc(BLOCK) });
    await owner.register({ kind: "host", bytes: Buffer.alloc(BLOCK) }, { label: "plain" });
    assert.throws(
      () => prepare(agent, owner, local, "plain"),
      (thrown) => assertReason(thrown, "transfer-no-path"),
    );
    const peer = agent.addPeer(owner.metadata());
    const [remote] = peer.metadata.regions.values();
    const lists = { local: blocks(local), remote: blocks(remote!) };
    assert.throws(
      () => agent.prepare(peer, lists, { backend: "nixl" }),
      (thrown) => {
        assertReason(thrown, "transfer-no-path");
        assert.match((thrown as { diagnostic?: string }).diagnostic!, /nixl: not enabled here/);
        return true;
      },
    );
    const device = await agent.register({ kind: "device", deviceIndex: 0, address: 0n, byteLength: BLOCK });
    assert.throws(
      () => agent.prepare(peer, { ...lists, local: blocks(device) }),
      (thrown) => assertReason(thrown, "transfer-no-path"),
    );
  });
});

test("transfer agent: metrics tell bytes, descriptors, failures by reason and what is registered", async () => {
  const metrics = new Metrics();
  await withPair({ metrics, shm: false }, { shm: false }, async (agent, owner) => {
    const local = await agent.register({ kind: "host", bytes: Buffer.alloc(4 * BLOCK) });
    await owner.register({ kind: "host", bytes: Buffer.alloc(4 * BLOCK) }, { label: "plain" });
    const table = prepare(agent, owner, local, "plain");
    await agent.write(table, Uint32Array.of(0, 1, 2), Uint32Array.of(3, 2, 1)).done;
    const cancelled = agent.read(table, FIRST, FIRST);
    cancelled.cancel();
    await assert.rejects(cancelled.done);
    const text = await metrics.render();
    assert.match(text, /dynamo_transfer_bytes_transferred_total\{backend="tcp",operation="write"\} 12288/);
    assert.match(text, /dynamo_transfer_num_descriptors_total\{backend="tcp",operation="write"\} 3/);
    assert.match(
      text,
      /dynamo_transfer_num_failed_transfers_total\{backend="tcp",operation="read",reason="cancelled"\} 1/,
    );
    assert.match(text, /dynamo_transfer_xfer_time_seconds_count\{backend="tcp",operation="write"\} 1/);
    assert.match(text, /dynamo_transfer_registered_bytes\{kind="host"\} 16384/);
  });
  assert.match(await metrics.render(), /dynamo_transfer_registered_bytes\{kind="host"\} 0/);
});

test("transfer agent: memory, names and access that cannot be are refused at registration", async () => {
  await assert.rejects(TransferAgent.start({ name: "", tcp: false, shm: false }), (thrown) =>
    assertReason(thrown, "invalid-config"),
  );
  const agent = await TransferAgent.start({ name: "agent", tcp: false, shm: false });
  try {
    const refused = async (run: Promise<unknown>): Promise<void> =>
      assert.rejects(run, (thrown) => assertReason(thrown, "transfer-out-of-bounds"));
    await refused(agent.register({ kind: "host", bytes: Buffer.alloc(0) }));
    await refused(agent.register({ kind: "host", bytes: Buffer.alloc(1) }, { label: "x".repeat(129) }));
    const file = { kind: "file", path: "unused", byteLength: 1 } as const;
    await refused(agent.register(file, { remoteAccess: "read" }));
    await refused(agent.register({ kind: "object", bucket: "b", slotBytes: 1.5, slotCount: 2, keyOf: String }));
    const region = await agent.register({ kind: "host", bytes: Buffer.alloc(1) });
    await agent.deregister(region);
    await refused(agent.deregister(region));
  } finally {
    await agent.close();
    await agent.close();
  }
});

test("transfer agent: messages nobody takes are bounded, and their sender is told", async () => {
  const memory = new MemoryNetwork();
  await withPair({ memory, tcp: false, shm: false }, { memory, tcp: false, shm: false }, async (agent, owner) => {
    const peer = agent.addPeer(owner.metadata());
    const message = Buffer.alloc(0);
    for (let i = 0; i < 4_096; i++) await agent.notify(peer, message);
    await assert.rejects(agent.notify(peer, message), (thrown) => assertReason(thrown, "transfer-full"));
    assert.equal(owner.takeNotifications().length, 4_096);
    await agent.notify(peer, message);
  });
});

test("transfer agent: a back end that was wanted here and is not there makes what is taken in its place a slow path", () => {
  const tcp = { name: "tcp", obstacle: () => undefined } as unknown as TransferBackend;
  const choose = (unavailable: ReadonlySet<BackendName>, peerHas: readonly BackendName[]): BackendChoice =>
    chooseBackend({
      backends: new Map([["tcp", tcp]]),
      question: {
        peer: { name: "peer", isSelf: false, metadata: { backends: new Map(peerHas.map((name) => [name, EMPTY])) } },
      } as unknown as PairQuestion,
      isSameHost: true,
      wanted: undefined,
      unavailable,
    });
  assert.equal(choose(new Set(), ["shm", "tcp"]).isSlowPath, false);
  assert.equal(choose(new Set(["shm"]), ["tcp"]).isSlowPath, false);
  const { isSlowPath, reason } = choose(new Set(["shm"]), ["shm", "tcp"]);
  assert.deepEqual([isSlowPath, reason], [true, "shm: not available here, the peer has it"]);
});

test("transfer agent: a pair that is slower than asked for is told once, and telemetry says why its back end was chosen", async () => {
  const lines: string[] = [];
  const logger = createLogger({ level: "warn", format: "jsonl", write: (line) => void lines.push(line) });
  // Nothing is as fast as that, so that each transfer is slow.
  await withPair({ logger, slowGigabytesPerSecond: 1e9, shm: false }, { shm: false }, async (agent, owner) => {
    const byteLength = 512 * BLOCK;
    const local = await agent.register({ kind: "host", bytes: Buffer.alloc(byteLength) });
    await owner.register({ kind: "host", bytes: Buffer.alloc(byteLength) }, { label: "plain" });
    const table = prepare(agent, owner, local, "plain");
    const all = Uint32Array.from({ length: 512 }, (_, i) => i);
    await agent.read(table, FIRST, FIRST).done;
    assert.equal(lines.length, 0, "too small to tell");
    for (let i = 0; i < 3; i++) await agent.read(table, all, all).done;
    assert.equal(lines.length, 1);
    assert.match(lines[0]!, /slower than they should be/);
    assert.deepEqual(
      agent.telemetry().map(({ reason, isSlowPath }) => ({ reason, isSlowPath })),
      [{ reason: table.reason, isSlowPath: false }],
    );
  });
});
