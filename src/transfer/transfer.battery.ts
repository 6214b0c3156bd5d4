import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError, type Reason } from "../errors/index.ts";
import { ManualClock, SeededRandom, systemClock, type Clock } from "../std/index.ts";
import {
  DescriptorList,
  type BackendName,
  type Operation,
  type Peer,
  type Region,
  type RegisterOptions,
  type TransferAgent,
} from "./index.ts";

/**
 * What `base.ts` promises, as tests that every back end passes. A back end hands in a `World` that makes pairs of local and
 * remote memory; storage is remote memory too. What only some can show (a peer's access rights, a restart, messages) is
 * asked for by the world's properties, each a fact about the back end and not a switch for convenience.
 */
export interface World {
  readonly backend: BackendName;
  /** Of several of one back end. */
  readonly variant?: string;
  /** The remote side is an agent of its own: it gets messages, has access rights, can go away. */
  readonly hasPeer: boolean;
  /** The owner of memory decides about each access. NIXL's UCX does not ask it: only the initiator checks there. */
  readonly ownerChecks: boolean;
  /** Any range may be written, not only whole blocks from their start. */
  readonly anyRange: boolean;
  /** A cancelled write changes nothing after its end. An object store may still finish a put that was on its way. */
  readonly recallsWrites: boolean;
  open(options: OpenOptions): Promise<Pair>;
}

export interface OpenOptions {
  readonly blockBytes: number;
  readonly blockCount: number;
  readonly clock?: Clock;
  readonly remote?: RegisterOptions;
}

export interface Pair {
  readonly agent: TransferAgent;
  readonly peer: Peer;
  readonly local: Region;
  /** As the initiator knows it. */
  readonly remote: { readonly id: number; readonly byteLength: number };
  /** The agent that owns the remote memory, which may be `agent`. */
  readonly owner: TransferAgent;
  readonly remoteRegion: Region;
  fillRemote(bytes: Buffer): Promise<void>;
  readRemote(): Promise<Buffer>;
  close(): Promise<void>;
}

const BLOCK_BYTES = 4_096;
const BLOCK_COUNT = 48;
const TIMEOUT_MS = 20_000;

export function noise(byteCount: number, seed: number): Buffer {
  const random = new SeededRandom(seed);
  const bytes = Buffer.alloc(byteCount);
  for (let i = 0; i + 4 <= byteCount; i += 4) bytes.writeUInt32LE(random.nextU32(), i);
  return bytes;
}

export function assertReason(thrown: unknown, reason: Reason): true {
  assert.ok(thrown instanceof DynamoError, `expected a DynamoError, got ${String(thrown)}`);
  assert.equal(thrown.reason, reason, `${thrown.message} (${thrown.diagnostic ?? ""})`);
  return true;
}

/** Waits for a condition by loop turns, not by time. */
export async function until(condition: () => boolean, what: string): Promise<void> {
  const endMs = performance.now() + TIMEOUT_MS;
  while (!condition()) {
    if (performance.now() > endMs) assert.fail(`timed out: ${what}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

export function openDescriptorCount(): number {
  return readdirSync("/proc/self/fd").length;
}

function blocksOf(
  { local, remote }: Pair,
  blockBytes = BLOCK_BYTES,
): { local: DescriptorList; remote: DescriptorList } {
  return { local: DescriptorList.blocks(local, { blockBytes }), remote: DescriptorList.blocks(remote, { blockBytes }) };
}

const all = (count: number): Uint32Array => Uint32Array.from({ length: count }, (_, i) => i);

/** Pieces that do not overlap, cut at random: [offset, length] pairs. */
const somePieces = (byteCount: number) =>
  fc
    .uniqueArray(fc.nat(byteCount), { minLength: 2, maxLength: 24 })
    .map((cuts) => cuts.toSorted((a, b) => a - b))
    .map((cuts) => cuts.slice(1).map((end, i) => ({ offset: cuts[i]!, length: end - cuts[i]! })));

export function transferBattery(world: World): void {
  const title = (text: string): string =>
    `${world.backend}${world.variant === undefined ? "" : ` ${world.variant}`}: ${text}`;

  function pairTest(text: string, run: (pair: Pair) => Promise<void>, options: Partial<OpenOptions> = {}): void {
    test(title(text), async () => {
      const pair = await world.open({ blockBytes: BLOCK_BYTES, blockCount: BLOCK_COUNT, ...options });
      try {
        await run(pair);
        assert.equal(pair.agent.activeTransferCount, 0);
      } finally {
        await pair.close();
      }
    });
  }

  pairTest("blocks in any order come and go as they are, and nothing else is touched", async (pair) => {
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    assert.equal(table.backend, world.backend);
    const somePairs = fc
      .tuple(
        fc.shuffledSubarray([...all(BLOCK_COUNT)], { minLength: 1 }),
        fc.shuffledSubarray([...all(BLOCK_COUNT)], { minLength: 1 }),
      )
      .map(([a, b]) => [a.slice(0, b.length), b.slice(0, a.length)] as const);
    await fc.assert(
      fc.asyncProperty(
        somePairs,
        fc.constantFrom<Operation>("read", "write"),
        fc.nat(),
        async ([here, there], operation, seed) => {
          const localBytes = noise(pair.local.byteLength, seed);
          const remoteBytes = noise(pair.local.byteLength, seed + 1);
          pair.local.bytes.set(localBytes);
          await pair.fillRemote(remoteBytes);
          const transfer = pair.agent.transfer(operation, table, Uint32Array.from(here), Uint32Array.from(there));
          assert.equal(transfer.byteCount, here.length * BLOCK_BYTES);
          await transfer.done;
          assert.equal(transfer.state, "done");
          const [from, to] = operation === "read" ? [remoteBytes, localBytes] : [localBytes, remoteBytes];
          here.forEach((block, i) => {
            const [source, target] = operation === "read" ? [there[i]!, block] : [block, there[i]!];
            from.copy(to, target * BLOCK_BYTES, source * BLOCK_BYTES, (source + 1) * BLOCK_BYTES);
          });
          assert.ok(pair.local.bytes.equals(localBytes), "local memory is as expected");
          assert.ok((await pair.readRemote()).equals(remoteBytes), "remote memory is as expected");
        },
      ),
      { numRuns: 12 },
    );
  });

  if (world.anyRange) {
    pairTest("ranges of any size at any offset come and go, and nothing else is touched", async (pair) => {
      const byteCount = pair.local.byteLength;
      await fc.assert(
        fc.asyncProperty(
          somePieces(byteCount),
          fc.nat(),
          fc.constantFrom<Operation>("read", "write"),
          async (pieces, seed, operation) => {
            // The same pieces, in another order and packed from the start, on the other side.
            const order = pieces.map((_, i) => i);
            new Shuffle(seed).apply(order);
            let packed = 0;
            const remoteOffsets = new Float64Array(pieces.length);
            for (const i of order) {
              remoteOffsets[i] = packed;
              packed += pieces[i]!.length;
            }
            const lengths = Uint32Array.from(pieces, (piece) => piece.length);
            const list = (region: { id: number }, offsets: Float64Array): DescriptorList =>
              new DescriptorList(new Uint32Array(pieces.length).fill(region.id), offsets, lengths);
            const lists = {
              local: list(
                pair.local,
                Float64Array.from(pieces, (piece) => piece.offset),
              ),
              remote: list(pair.remote, remoteOffsets),
            };
            const localBytes = noise(byteCount, seed);
            const remoteBytes = noise(byteCount, seed + 1);
            pair.local.bytes.set(localBytes);
            await pair.fillRemote(remoteBytes);
            const table = pair.agent.prepare(pair.peer, lists, { backend: world.backend });
            await pair.agent.transfer(operation, table, all(pieces.length), all(pieces.length)).done;
            const before = { local: Buffer.from(localBytes), remote: Buffer.from(remoteBytes) };
            pieces.forEach(({ offset, length }, i) => {
              const there = remoteOffsets[i]!;
              if (operation === "read") before.remote.copy(localBytes, offset, there, there + length);
              else before.local.copy(remoteBytes, there, offset, offset + length);
            });
            assert.ok(pair.local.bytes.equals(localBytes), "local memory is as expected");
            assert.ok((await pair.readRemote()).equals(remoteBytes), "remote memory is as expected");
          },
        ),
        { numRuns: 12 },
      );
    });
  }

  pairTest("many transfers in flight at once each move their own block", async (pair) => {
    const bytes = noise(pair.local.byteLength, 3);
    await pair.fillRemote(bytes);
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    const transfers = [];
    for (let i = 0; i < BLOCK_COUNT; i++)
      transfers.push(pair.agent.read(table, Uint32Array.of(BLOCK_COUNT - 1 - i), Uint32Array.of(i)));
    assert.equal(pair.agent.activeTransferCount, BLOCK_COUNT);
    await Promise.all(transfers.map((transfer) => transfer.done));
    for (let i = 0; i < BLOCK_COUNT; i++) {
      const at = (BLOCK_COUNT - 1 - i) * BLOCK_BYTES;
      assert.ok(
        pair.local.bytes.subarray(at, at + BLOCK_BYTES).equals(bytes.subarray(i * BLOCK_BYTES, (i + 1) * BLOCK_BYTES)),
      );
    }
  });

  for (const operation of ["read", "write"] as const) {
    pairTest(
      `a cancelled ${operation} ends once, with cancelled, and its memory is left alone afterwards`,
      async (pair) => {
        await pair.fillRemote(noise(pair.local.byteLength, 5));
        const table = pair.agent.prepare(pair.peer, blocksOf(pair, LARGE_BLOCK), { backend: world.backend });
        // Cancelled at several points of its life, from before the first byte on.
        for (const turns of [0, 1, 3]) {
          const transfer = pair.agent.transfer(operation, table, all(LARGE_COUNT), all(LARGE_COUNT));
          for (let i = 0; i < turns; i++) await new Promise((resolve) => setImmediate(resolve));
          transfer.cancel();
          transfer.cancel();
          const outcome = await transfer.done.catch((thrown: unknown) => thrown);
          if (transfer.state === "failed") assertReason(outcome, "cancelled");
          else assert.ok(turns > 0, "a transfer that was cancelled at once has not been done before");
          const target = operation === "read" ? pair.local.bytes : await pair.readRemote();
          const seen = Buffer.from(target);
          const other = pair.agent.read(table, Uint32Array.of(0), Uint32Array.of(0));
          await other.done;
          const after = operation === "read" ? pair.local.bytes : await pair.readRemote();
          for (let at = LARGE_BLOCK; at < after.length; at += LARGE_BLOCK) {
            const block = after.subarray(at, at + LARGE_BLOCK);
            const isAsSeen = block.equals(seen.subarray(at, at + LARGE_BLOCK));
            const isWhole = block.equals(pair.local.bytes.subarray(at, at + LARGE_BLOCK));
            const mayBeLate = operation === "write" && !world.recallsWrites;
            assert.ok(isAsSeen || (mayBeLate && isWhole), "nothing was written after the end");
          }
        }
      },
      { blockBytes: LARGE_BLOCK, blockCount: LARGE_COUNT },
    );
  }

  test(title("a transfer that is not through by its deadline fails with request-deadline"), async () => {
    const clock = new ManualClock(Date.now());
    const pair = await world.open({ blockBytes: LARGE_BLOCK, blockCount: LARGE_COUNT, clock });
    try {
      await pair.fillRemote(noise(pair.local.byteLength, 5));
      const table = pair.agent.prepare(pair.peer, blocksOf(pair, LARGE_BLOCK), { backend: world.backend });
      const transfer = pair.agent.read(table, all(LARGE_COUNT), all(LARGE_COUNT), { timeoutMs: 100 });
      clock.advance(200);
      await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "request-deadline"));
      await pair.agent.read(table, Uint32Array.of(1), Uint32Array.of(1)).done;
      assert.ok(
        pair.local.bytes
          .subarray(LARGE_BLOCK, 2 * LARGE_BLOCK)
          .equals(noise(pair.local.byteLength, 5).subarray(LARGE_BLOCK, 2 * LARGE_BLOCK)),
      );
    } finally {
      await pair.close();
    }
  });

  pairTest("an aborted signal cancels", async (pair) => {
    await pair.fillRemote(noise(pair.local.byteLength, 6));
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    const abort = new AbortController();
    abort.abort();
    const transfer = pair.agent.read(table, all(2), all(2), { signal: abort.signal });
    await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "cancelled"));
  });

  pairTest("memory that was deregistered is refused as stale, on both sides", async (pair) => {
    await pair.fillRemote(noise(pair.local.byteLength, 7));
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    await pair.owner.deregister(pair.remoteRegion);
    if (world.ownerChecks) {
      const outcome = async (): Promise<void> => pair.agent.read(table, all(1), all(1)).done;
      await assert.rejects(outcome, (thrown) => assertReason(thrown, "transfer-stale"));
    }
    await pair.agent.deregister(pair.local);
    assert.throws(
      () => pair.agent.read(table, all(1), all(1)),
      (thrown) => assertReason(thrown, "transfer-stale"),
    );
    assert.throws(
      () => pair.agent.prepare(pair.peer, blocksOf(pair)),
      (thrown) => assertReason(thrown, "transfer-out-of-bounds"),
    );
  });

  pairTest("deregistering waits until a running transfer has let go", async (pair) => {
    await pair.fillRemote(noise(pair.local.byteLength, 8));
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    const transfer = pair.agent.read(table, all(BLOCK_COUNT), all(BLOCK_COUNT));
    await pair.agent.deregister(pair.local);
    assert.notEqual(transfer.state, "in-progress");
  });

  pairTest("lists and indices that reach outside are refused before anything moves", (pair) => {
    const refused = (run: () => unknown): void =>
      assert.throws(run, (thrown) => assertReason(thrown, "transfer-out-of-bounds"));
    const lists = blocksOf(pair);
    const table = pair.agent.prepare(pair.peer, lists, { backend: world.backend });
    const tooFar = DescriptorList.blocks(pair.remote, {
      blockBytes: BLOCK_BYTES,
      blockCount: 1,
      offset: pair.remote.byteLength - 1,
    });
    refused(() => pair.agent.prepare(pair.peer, { local: lists.local, remote: tooFar }));
    const unknown = DescriptorList.blocks(
      { id: 0xdead_beef, byteLength: 1e9 },
      { blockBytes: BLOCK_BYTES, blockCount: 1 },
    );
    refused(() => pair.agent.prepare(pair.peer, { local: lists.local, remote: unknown }));
    refused(() => pair.agent.prepare(pair.peer, { local: unknown, remote: lists.remote }));
    refused(() => pair.agent.read(table, Uint32Array.of(BLOCK_COUNT), Uint32Array.of(0)));
    refused(() => pair.agent.read(table, all(2), all(1)));
    refused(() => pair.agent.read(table, new Uint32Array(0), new Uint32Array(0)));
    refused(() => pair.agent.read(table, all(1), all(1), { message: Buffer.alloc(65_537) }));
    return Promise.resolve();
  });

  pairTest("telemetry and metrics count what was moved, and the cost is learnt from it", async (pair) => {
    await pair.fillRemote(noise(pair.local.byteLength, 9));
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    assert.equal(pair.agent.estimate(table, "read", 1, 1).sampleCount, 0);
    for (let i = 0; i < 4; i++) await pair.agent.read(table, all(BLOCK_COUNT), all(BLOCK_COUNT)).done;
    const cancelled = pair.agent.read(table, all(1), all(1));
    cancelled.cancel();
    await assert.rejects(cancelled.done);
    const [entry, ...others] = pair.agent.telemetry();
    assert.equal(others.length, 0);
    assert.deepEqual(
      { ...entry, seconds: 0, lastGigabytesPerSecond: 0, meanGigabytesPerSecond: 0 },
      {
        peer: pair.peer.name,
        backend: world.backend,
        operation: "read",
        reason: table.reason,
        isSlowPath: table.isSlowPath,
        isSlow: false,
        transferCount: 4,
        byteCount: 4 * BLOCK_COUNT * BLOCK_BYTES,
        descriptorCount: 4 * BLOCK_COUNT,
        seconds: 0,
        errorCount: 1,
        lastGigabytesPerSecond: 0,
        meanGigabytesPerSecond: 0,
      },
    );
    assert.ok(entry!.seconds > 0 && entry!.meanGigabytesPerSecond > 0);
    const estimate = pair.agent.estimate(table, "read", BLOCK_COUNT, BLOCK_COUNT * BLOCK_BYTES);
    assert.equal(estimate.sampleCount, 4);
    assert.ok(estimate.totalMs > 0 && Number.isFinite(estimate.totalMs));
  });

  pairTest("a transfer's message arrives once, after the bytes, and only if it completed", async (pair) => {
    await pair.fillRemote(noise(pair.local.byteLength, 10));
    const bytes = noise(pair.local.byteLength, 11);
    pair.local.bytes.set(bytes);
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    const got: string[] = [];
    pair.owner.onNotification(({ from, message }) => {
      assert.equal(from, pair.agent.name);
      if (world.hasPeer && message.toString() === "write")
        assert.ok(pair.remoteRegion.bytes.equals(bytes), "the bytes came first");
      got.push(Buffer.from(message).toString());
    });
    await pair.agent.write(table, all(BLOCK_COUNT), all(BLOCK_COUNT), { message: Buffer.from("write") }).done;
    await pair.agent.read(table, all(BLOCK_COUNT), all(BLOCK_COUNT), { message: Buffer.from("read") }).done;
    await pair.agent.write(table, all(1), all(1), { message: Buffer.alloc(0) }).done;
    const cancelled = pair.agent.write(table, all(1), all(1), { message: Buffer.from("cancelled") });
    cancelled.cancel();
    await assert.rejects(cancelled.done);
    await pair.agent.read(table, all(1), all(1), { message: Buffer.from("last") }).done;
    await until(() => got.includes("last"), "the last message");
    assert.deepEqual(got, ["write", "read", "", "last"]);
  });

  test(title("closing the agent ends what runs with draining"), async () => {
    const pair = await world.open({ blockBytes: BLOCK_BYTES, blockCount: BLOCK_COUNT });
    try {
      await pair.fillRemote(noise(pair.local.byteLength, 12));
      const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
      const transfer = pair.agent.read(table, all(BLOCK_COUNT), all(BLOCK_COUNT));
      await pair.agent.close();
      await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "draining"));
      assert.throws(
        () => pair.agent.read(table, all(1), all(1)),
        (thrown) => assertReason(thrown, "draining"),
      );
    } finally {
      await pair.close();
    }
  });

  if (world.hasPeer) peerTests(world, pairTest, title);

  test(title("pairs that come and go leave no descriptor, mapping or connection behind"), async () => {
    const once = async (): Promise<void> => {
      const pair = await world.open({ blockBytes: BLOCK_BYTES, blockCount: BLOCK_COUNT });
      await pair.fillRemote(noise(pair.local.byteLength, 13));
      const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
      await pair.agent.write(table, all(BLOCK_COUNT), all(BLOCK_COUNT)).done;
      await pair.close();
    };
    await once();
    const before = openDescriptorCount();
    for (let i = 0; i < 5; i++) await once();
    // A closed socket's descriptor goes with the loop's next turns.
    await until(() => openDescriptorCount() <= before, `${openDescriptorCount()} descriptors, ${before} before`);
  });
}

const LARGE_BLOCK = 256 * 1024;
const LARGE_COUNT = 16;

type PairTest = (text: string, run: (pair: Pair) => Promise<void>, options?: Partial<OpenOptions>) => void;

function peerTests(world: World, pairTest: PairTest, title: (text: string) => string): void {
  for (const [remoteAccess, allowed, refused] of [
    ["read", "read", "write"],
    ["write", "write", "read"],
  ] as const) {
    pairTest(
      `memory registered for remote ${allowed} refuses a ${refused}`,
      async (pair) => {
        const bytes = noise(pair.local.byteLength, 14);
        pair.remoteRegion.bytes.set(bytes);
        pair.local.bytes.fill(1);
        const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
        const wrong = pair.agent.transfer(refused, table, all(2), all(2));
        await assert.rejects(wrong.done, (thrown) => assertReason(thrown, "transfer-out-of-bounds"));
        assert.ok(pair.remoteRegion.bytes.equals(bytes), "the remote memory was not written");
        assert.ok(
          pair.local.bytes.every((byte) => byte === 1),
          "the local memory was not written",
        );
        await pair.agent.transfer(allowed, table, all(2), all(2)).done;
      },
      { remote: { remoteAccess } },
    );
  }

  pairTest("messages without a transfer wait for whoever polls, in order, each once", async (pair) => {
    for (let i = 0; i < 100; i++) await pair.agent.notify(pair.peer, Buffer.from(String(i)));
    const got: string[] = [];
    await until(() => {
      got.push(...pair.owner.takeNotifications().map(({ message }) => Buffer.from(message).toString()));
      return got.length >= 100;
    }, "a hundred messages");
    assert.deepEqual(
      got,
      Array.from({ length: 100 }, (_, i) => String(i)),
    );
    assert.deepEqual(pair.owner.takeNotifications(), []);
  });

  test(title("a peer whose agent is closed fails a transfer with transfer-peer-lost, soon"), async () => {
    const pair = await world.open({ blockBytes: BLOCK_BYTES, blockCount: BLOCK_COUNT });
    try {
      const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
      await pair.agent.read(table, all(1), all(1)).done;
      await pair.owner.close();
      const transfer = pair.agent.read(table, all(BLOCK_COUNT), all(BLOCK_COUNT), { timeoutMs: 10_000 });
      await assert.rejects(transfer.done, (thrown) => {
        assert.ok(thrown instanceof DynamoError);
        assert.ok(["transfer-peer-lost", "transfer-stale"].includes(thrown.reason), thrown.reason);
        return true;
      });
    } finally {
      await pair.close();
    }
  });

  pairTest("removing the peer ends its transfers with transfer-peer-lost, and it can be added again", async (pair) => {
    const table = pair.agent.prepare(pair.peer, blocksOf(pair), { backend: world.backend });
    const transfer = pair.agent.read(table, all(BLOCK_COUNT), all(BLOCK_COUNT));
    pair.agent.removePeer(pair.peer);
    await assert.rejects(transfer.done, (thrown) => assertReason(thrown, "transfer-peer-lost"));
    const again = pair.agent.addPeer(pair.owner.metadata());
    const table2 = pair.agent.prepare(again, blocksOf(pair), { backend: world.backend });
    await pair.agent.read(table2, all(1), all(1)).done;
  });
}

class Shuffle {
  readonly #random: SeededRandom;
  constructor(seed: number) {
    this.#random = new SeededRandom(seed);
  }
  apply(values: number[]): void {
    for (let i = values.length - 1; i > 0; i--) {
      const j = this.#random.nextU32() % (i + 1);
      [values[i], values[j]] = [values[j]!, values[i]!];
    }
  }
}

/** Two agents of this process: the world of every back end between agents. */
export async function openPeers(
  options: OpenOptions,
  make: (name: string, clock: Clock) => Promise<TransferAgent>,
  isAllocated: boolean,
): Promise<Pair> {
  const clock = options.clock ?? systemClock;
  const byteCount = options.blockBytes * options.blockCount;
  const agent = await make("initiator", clock);
  const owner = await make("owner", clock);
  const region = async (of: TransferAgent, register: RegisterOptions): Promise<Region> =>
    isAllocated
      ? of.allocate(byteCount, register)
      : of.register({ kind: "host", bytes: Buffer.alloc(byteCount) }, register);
  const local = await region(agent, {});
  const remoteRegion = await region(owner, { label: "pool", ...options.remote });
  const peer = agent.addPeer(owner.metadata());
  const remote = [...peer.metadata.regions.values()].find(({ label }) => label === "pool")!;
  return {
    agent,
    owner,
    peer,
    local,
    remote,
    remoteRegion,
    fillRemote: (bytes) => {
      remoteRegion.bytes.set(bytes);
      return Promise.resolve();
    },
    readRemote: () => Promise.resolve(Buffer.from(remoteRegion.bytes)),
    close: async () => {
      await agent.close();
      await owner.close();
    },
  };
}
