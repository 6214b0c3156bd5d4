import assert from "node:assert/strict";
import { test } from "node:test";
import { silentLogger } from "../observability/index.ts";
import { MockerEngine, mockerConfig } from "../engines/mocker/index.ts";
import { encodeHandoff, GREEDY, type PreprocessedRequest } from "../protocol/index.ts";
import { MemoryNetwork as PlaneNetwork, MemoryRequestPlane } from "../runtime/request-plane/index.ts";
import { systemClock } from "../std/index.ts";
import { TransferAgent } from "../transfer/index.ts";
import { PeerProcess } from "../transfer/fixtures/peer.ts";
import { until } from "../../test/helpers/in-process-cluster.ts";
import { HandoffPuller } from "./handoff-pull.ts";

const ENGINE = mockerConfig({ blockSizeTokens: 16, contextLength: 1_024, totalBlocks: 64, speedupRatio: 0 });
const BLOCK_BYTES = 64;
const PROMPT = Uint32Array.from({ length: 100 }, (_, i) => 32 + (i % 90));
const REQUEST: PreprocessedRequest = {
  requestId: "pulled",
  model: "mock",
  tokenIds: PROMPT,
  sampling: GREEDY,
  stop: { maxTokens: 4, minTokens: 0, stopTokenIds: [], ignoreEos: true },
  output: { topLogprobs: -1, promptLogprobs: false },
  priority: 0,
  cacheNamespace: "",
};

/** A prefill worker whose memory is another process's, which can be frozen; its claims are answered here. */
async function withPeer(
  use: (peer: {
    process: PeerProcess;
    puller: HandoffPuller;
    asked: string[];
    request: (overrides?: object) => PreprocessedRequest;
  }) => Promise<void>,
): Promise<void> {
  const peer = await PeerProcess.start({ agent: { name: "prefill", shm: false }, byteLength: 64 * 1024, fill: 1 });
  const agent = await TransferAgent.start({ name: "decode", shm: false });
  const plane = new MemoryRequestPlane({ network: new PlaneNetwork(), clock: systemClock });
  const engine = new MockerEngine(ENGINE);
  const sink = { onStep: () => undefined, onKvEvents: () => undefined, onFatal: () => undefined };
  await engine.start(sink, new AbortController().signal);
  const asked: string[] = [];
  try {
    const server = await plane.listen();
    server.serve("handoff", (stream, payload) => {
      asked.push(Object.keys(JSON.parse(Buffer.from(payload).toString()) as object)[0]!);
      stream.write(Buffer.from(JSON.stringify({ claimMs: 10_000 })));
      stream.end();
      return { onCancel: () => undefined };
    });
    const puller = new HandoffPuller({
      agent,
      engine,
      client: plane.client,
      clock: systemClock,
      blockSizeTokens: 16,
      blockBytes: BLOCK_BYTES,
      fingerprint: () => "same",
      timeoutMs: 400,
      landingBytes: 1024 * 1024,
      logger: silentLogger,
    });
    const [region] = agent.addPeer(peer.metadata).metadata.regions.values();
    const request = (overrides: object = {}): PreprocessedRequest => {
      const handoff = encodeHandoff({
        id: "0123456789abcdef",
        draftId: "",
        firstBlock: 0,
        address: server.address,
        endpoint: "handoff",
        fingerprint: "same",
        blockBytes: BLOCK_BYTES,
        blockSizeTokens: 16,
        regionId: region!.id,
        runs: Uint32Array.of(0, 6),
        blockCount: 6,
        metadata: peer.metadata,
        ...overrides,
      });
      return { ...REQUEST, handoff: handoff.toString("base64") };
    };
    await use({ process: peer, puller, asked, request });
    assert.equal(puller.landingBytes, 0);
    assert.equal(agent.activeTransferCount, 0);
  } finally {
    await agent.close();
    await plane.close();
    await engine.stop();
    await peer.close();
  }
}

const never = new AbortController().signal;

test("pull: a transfer that stalls ends with its deadline, and the blocks are given back", async () => {
  await withPeer(async ({ process: peer, puller, asked, request }) => {
    process.kill(peer.child.pid!, "SIGSTOP");
    try {
      const result = await puller.pull(request(), never);
      assert.equal(result.outcome, "request-deadline");
      assert.ok(result.milliseconds < 3_000, `${result.milliseconds} ms`);
      assert.equal(result.pulledBlocks, 0);
      await until(() => asked.length === 2, "the release");
      assert.deepEqual(asked, ["claim", "release"]);
    } finally {
      process.kill(peer.child.pid!, "SIGCONT");
    }
  });
});

test("pull: blocks that do not hold what their hashes say are not taken", async () => {
  await withPeer(async ({ puller, request }) => {
    // The peer's memory holds ones, no blocks of that prompt.
    const result = await puller.pull(request(), never);
    assert.deepEqual([result.outcome, result.pulledBlocks, result.backend], ["malformed-frame", 0, "tcp"]);
  });
});

test("pull: another fingerprint, memory that is not there, and bytes that are no handoff are told apart", async () => {
  await withPeer(async ({ puller, asked, request }) => {
    assert.equal((await puller.pull(request({ fingerprint: "other" }), never)).outcome, "handoff-mismatch");
    assert.equal((await puller.pull({ ...REQUEST, handoff: "bm9uZQ==" }, never)).outcome, "malformed-frame");
    assert.deepEqual(asked, []);
    assert.equal((await puller.pull(request({ regionId: 7 }), never)).outcome, "transfer-out-of-bounds");
    const far = { runs: Uint32Array.of(1_020, 6) };
    assert.equal((await puller.pull(request(far), never)).outcome, "transfer-out-of-bounds");
    await until(() => asked.length === 4, "the releases");
    assert.equal(asked.filter((what) => what === "release").length, 2);
  });
});

test("pull: a caller that goes away meanwhile ends it at once", async () => {
  await withPeer(async ({ process: peer, puller, asked, request }) => {
    process.kill(peer.child.pid!, "SIGSTOP");
    const abort = new AbortController();
    try {
      const pulled = puller.pull(request(), abort.signal);
      while (asked.length === 0) await new Promise((resolve) => setImmediate(resolve));
      abort.abort();
      assert.equal((await pulled).outcome, "cancelled");
    } finally {
      process.kill(peer.child.pid!, "SIGCONT");
    }
  });
});
