import assert from "node:assert/strict";
import { test } from "node:test";
import { Metrics, silentLogger } from "../observability/index.ts";
import { watchCards, type Planes } from "../runtime/component/index.ts";
import { MemoryDiscovery, MemoryStore } from "../runtime/discovery/index.ts";
import { MemoryEventBus, MemoryEventPlane } from "../runtime/event-plane/index.ts";
import { MemoryNetwork, MemoryRequestPlane } from "../runtime/request-plane/index.ts";
import { SeededRandom, systemClock } from "../std/index.ts";
import { loadServedTokenizer, startWorker, type WorkerConfig } from "./index.ts";

const ENGINE = { kind: "echo", contextLength: 512, maxSequences: 4, blockSizeTokens: 16, stepMs: 0 } as const;

test("a worker that is given a tokenizer announces that one and does not read its model's", async () => {
  const tokenizer = await loadServedTokenizer({ engine: ENGINE }, silentLogger);
  const clock = systemClock;
  const planes: Planes = {
    clock,
    logger: silentLogger,
    metrics: new Metrics(),
    random: new SeededRandom(1),
    discovery: new MemoryDiscovery({ store: new MemoryStore(), clock }),
    events: new MemoryEventPlane({ bus: new MemoryEventBus(), clock }),
    request: new MemoryRequestPlane({ network: new MemoryNetwork(), clock }),
  };
  const config: WorkerConfig = {
    namespace: "dynamo",
    component: "backend",
    engine: { ...ENGINE, modelPath: "/nowhere" },
    modelName: "echo",
    maxQueuedRequests: 8,
    drainTimeoutMs: 1_000,
    systemPort: undefined,
  };
  const never = new AbortController().signal;
  await assert.rejects(startWorker(config, planes, never), /nowhere/);
  const worker = await startWorker(config, planes, never, { tokenizer });
  const cards: unknown[] = [];
  const watch = await watchCards(planes.discovery, { namespace: "dynamo" }, (change) => {
    if (change.type === "put") cards.push(change.card);
  });
  const [card] = cards as { tokenizerSha256: string; tokenizerBytes: number; vocabularySize: number }[];
  assert.equal(cards.length, 1);
  assert.equal(card!.tokenizerSha256, tokenizer.sha256);
  assert.equal(card!.tokenizerBytes, tokenizer.bytes.length);
  assert.equal(card!.vocabularySize, tokenizer.vocabularySize);
  await watch.close();
  await worker.stop();
  await Promise.all([planes.request.close(), planes.events.close(), planes.discovery.close()]);
});
