import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import type { VllmEngineConfig } from "../config.ts";
import { engineBattery, type EngineUnderTest } from "../engine.battery.ts";
import { claimFreePorts } from "../foreign/index.ts";
import { FakeVllm, type FakeVllmOptions } from "./fixtures/fake-vllm.ts";
import { createVllmEngine } from "./vllm-engine.ts";

/** The engine battery over the fake server, in the forms that versions of vLLM have had; the real one: `vllm.real.test.ts`. */
const FAKE: FakeVllmOptions = { contextLength: 512, blockSize: 16, totalBlocks: 320, maxSequences: 8 };

async function attached(options: FakeVllmOptions): Promise<EngineUnderTest> {
  const ports = await claimFreePorts("127.0.0.1", 2, Math.random);
  const kvEvents = {
    endpoint: `tcp://*:${ports.port}`,
    replay_endpoint: `tcp://127.0.0.1:${ports.port + 1}`,
    topic: "kv@test",
  };
  const fake = new FakeVllm({ ...FAKE, ...options, kvEvents });
  const url = await fake.listen();
  const engine = await createVllmEngine(
    {
      kind: "vllm",
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
    } satisfies VllmEngineConfig,
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

engineBattery("vLLM 0.29 (fake)", () => attached({}));
engineBattery("vLLM 0.22: events as arrays, replays without a topic (fake)", () => attached({ version: "0.22.1" }));
engineBattery("vLLM 0.18: tokens over /v1/completions (fake)", () => attached({ version: "0.18.0" }));
engineBattery("vLLM 0.29 without priorities (fake)", () => attached({ priorityScheduling: false }));
