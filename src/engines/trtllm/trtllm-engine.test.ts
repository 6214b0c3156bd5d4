import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { engineBattery, type EngineUnderTest } from "../engine.battery.ts";
import { claimFreePorts } from "../foreign/index.ts";
import { FakeTrtllm, type FakeTrtllmOptions } from "./fixtures/fake-trtllm.ts";
import { createTrtllmEngine } from "./trtllm-engine.ts";

/** The engine battery over the fake server, in the forms that versions of TensorRT-LLM have had. No real one has been run. */
const FAKE: FakeTrtllmOptions = { contextLength: 512, blockSize: 16, totalBlocks: 320, maxSequences: 8 };

async function attached(options: FakeTrtllmOptions): Promise<EngineUnderTest> {
  const ports = await claimFreePorts("127.0.0.1", 2, Math.random);
  const kvEvents = { endpoint: `tcp://*:${ports.port}`, replay_endpoint: `tcp://127.0.0.1:${ports.port + 1}`, topic: "kv" };
  const pushed = options.pushes === true ? { kvEvents } : {};
  const fake = new FakeTrtllm({ ...FAKE, ...options, ...pushed });
  const url = await fake.listen();
  const engine = await createTrtllmEngine(
    {
      kind: "trtllm",
      url,
      vocabularySize: 4_096,
      startTimeoutMs: 10_000,
      kvEvents: true,
      ...(options.pushes === true ? { kvEventsConfig: JSON.stringify(kvEvents) } : {}),
      maxSequences: 8,
      maxBatchedTokens: 512,
      contextLength: 512,
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
    refuses: ["namespaces", "alternatives", "prompt-logprobs", "clearing"],
  };
} // prettier-ignore

engineBattery("TensorRT-LLM 1.3 (fake)", () => attached({}));
engineBattery("TensorRT-LLM 1.3, events pushed (fake)", () => attached({ pushes: true }));
engineBattery("TensorRT-LLM 1.2, no Prometheus page (fake)", () => attached({ version: "1.2.1", prometheus: false }));
