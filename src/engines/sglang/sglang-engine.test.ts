import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { engineBattery, type EngineUnderTest } from "../engine.battery.ts";
import { claimFreePorts } from "../foreign/index.ts";
import { FakeSglang, type FakeSglangOptions } from "./fixtures/fake-sglang.ts";
import { createSglangEngine } from "./sglang-engine.ts";

/** The engine battery over the fake server, in the forms that versions of SGLang have had. No real one has been run. */
const FAKE: FakeSglangOptions = { contextLength: 512, blockSize: 16, totalBlocks: 320, maxSequences: 8 };

async function attached(options: FakeSglangOptions): Promise<EngineUnderTest> {
  const ports = await claimFreePorts("127.0.0.1", 2, Math.random);
  const kvEvents = {
    publisher: "zmq",
    endpoint: `tcp://*:${ports.port}`,
    replay_endpoint: `tcp://127.0.0.1:${ports.port + 1}`,
    topic: "kv@test",
  };
  const fake = new FakeSglang({ ...FAKE, ...options, kvEvents });
  const url = await fake.listen();
  const engine = await createSglangEngine(
    {
      kind: "sglang",
      url,
      vocabularySize: 4_096,
      startTimeoutMs: 10_000,
      kvEvents: true,
      kvEventsConfig: JSON.stringify(kvEvents),
      maxSequences: 8,
      maxBatchedTokens: 512,
      contextLength: 0,
      blockSizeTokens: 0,
      metricsIntervalMs: 50,
    },
    { clock: systemClock, logger: silentLogger },
  );
  return {
    // The fake goes with its engine.
    engine: Object.assign(engine, {
      stop: async () => {
        await Object.getPrototypeOf(engine).stop.call(engine);
        await fake.close();
        ports.release();
      },
    }),
    promptTokenIds: (length) => Uint32Array.from({ length }, (_, i) => 100 + ((i * 37) % 3_000)),
    supportsExport: false,
    resumesExactly: ["greedy"],
  };
}

engineBattery("SGLang 0.5.23 (fake)", () => attached({}));
engineBattery("SGLang 0.5.23, pieces with new tokens only (fake)", () => attached({ incremental: true }));
engineBattery("SGLang 0.5.16: events as arrays (fake)", () => attached({ version: "0.5.16" }));
engineBattery("SGLang 0.5.10: older routes, no priorities (fake)", () =>
  attached({ version: "0.5.10", priorityScheduling: false }),
);
