import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type AddressInfo } from "node:net";
import { test } from "node:test";
import { Metrics, createLogger } from "../../observability/index.ts";
import type { Planes } from "../../runtime/component/index.ts";
import { MemoryDiscovery, MemoryStore } from "../../runtime/discovery/index.ts";
import { MemoryEventBus, MemoryEventPlane } from "../../runtime/event-plane/index.ts";
import { MemoryNetwork, MemoryRequestPlane } from "../../runtime/request-plane/index.ts";
import { ManualClock, SeededRandom } from "../../std/index.ts";
import { DEFAULT_LIMITS } from "../config.ts";
import type { RunningFrontend } from "../frontend.ts";
import { startFrontendThreads } from "./host.ts";

const entry = new URL("./crashing-thread.fixture.ts", import.meta.url);

function aHost(behaviour: string, httpPort = 0) {
  const clock = new ManualClock();
  const lines: string[] = [];
  const planes: Planes = {
    discovery: new MemoryDiscovery({ store: new MemoryStore(), clock }),
    request: new MemoryRequestPlane({ network: new MemoryNetwork(), clock }),
    events: new MemoryEventPlane({ bus: new MemoryEventBus(), clock }),
    clock,
    random: new SeededRandom(1),
    logger: createLogger({ level: "info", format: "jsonl", write: (line) => lines.push(line) }),
    metrics: new Metrics(),
  };
  const config = {
    namespace: "dynamo",
    httpHost: "127.0.0.1",
    httpPort,
    routerMode: "kv",
    drainTimeoutMs: 1_000,
    limits: DEFAULT_LIMITS,
  };
  const start = (): Promise<RunningFrontend> =>
    startFrontendThreads(config, planes, new AbortController().signal, {
      threadCount: 2,
      entry,
      workerData: (_seat, index) => ({ behaviour, index }),
    });
  return { start, clock, lines };
}

const LIMIT = { timeout: 20_000 };

/** Passes virtual time until `wanted` settles. */
async function passing(clock: ManualClock, wanted: Promise<unknown>): Promise<void> {
  let settled = false;
  const settle = (): void => void (settled = true);
  wanted.then(settle, settle);
  while (!settled) {
    clock.advance(100);
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

test(
  "frontend threads: one that throws or exits ends the role with an error, and the other leaves",
  LIMIT,
  async () => {
    for (const [behaviour, message] of [
      ["throws", /frontend-1 failed/],
      ["exits", /frontend-1 ended by itself with code 0/],
    ] as const) {
      const { start, clock, lines } = aHost(behaviour);
      // It may fall before the other one is up: then the start fails, with the same error.
      const ended = start().then((role) => role.done);
      await assert.rejects(ended, { reason: "internal", message });
      assert.deepEqual(lines, []);
      assert.equal(clock.pendingTimerCount, 0);
    }
  },
);

test(
  "frontend threads: one that cannot start fails the start with its own reason, and nothing is left",
  LIMIT,
  async () => {
    const { start, clock } = aHost("fails");
    await assert.rejects(start(), { reason: "address-in-use", message: /the address is taken/ });
    assert.equal(clock.pendingTimerCount, 0);
  },
);

test("frontend threads: a port that somebody has is refused although threads could share it", LIMIT, async () => {
  const holder = createServer();
  holder.listen({ port: 0, host: "127.0.0.1", reusePort: true });
  await once(holder, "listening");
  const { start } = aHost("", (holder.address() as AddressInfo).port);
  await assert.rejects(start(), { reason: "address-in-use" });
  holder.close();
  await once(holder, "close");
});

test("frontend threads: a drain and a stop end all, and one that stays is ended by force", LIMIT, async () => {
  const orderly = aHost("");
  const drained = await orderly.start();
  await drained.drain(5_000);
  await drained.done;
  assert.deepEqual(orderly.lines, []);
  assert.equal(orderly.clock.pendingTimerCount, 0);

  const stubborn = aHost("stays");
  const role = await stubborn.start();
  const stopped = role.stop();
  await passing(stubborn.clock, stopped);
  await role.done;
  assert.equal(stubborn.lines.filter((line) => line.includes("did not leave in time")).length, 1);
  assert.equal(stubborn.clock.pendingTimerCount, 0);
});

test("frontend threads: who asks a thread that does not answer is told so in time", LIMIT, async () => {
  const { start, clock } = aHost("asks");
  const role = await start();
  await passing(clock, role.done);
  await assert.rejects(role.done, { reason: "request-deadline", message: /no answer in time/ });
});
