import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { engineBattery, type EngineUnderTest } from "../engine.battery.ts";
import { FakeLlamaServer, type FakeLlamaServerOptions } from "./fixtures/fake-llama-server.ts";
import { fakeLlamaConfig } from "./fixtures/fake-llama-config.ts";
import { createLlamaServerEngine } from "./llama-server-engine.ts";

/** The engine battery over the fake server; over a real one: `llama-server.real.test.ts`. */
async function attached(options: FakeLlamaServerOptions): Promise<EngineUnderTest> {
  const fake = new FakeLlamaServer({ contextLength: 512, slots: 8, vocabularySize: 4_096, ...options });
  const url = await fake.listen();
  const engine = await createLlamaServerEngine(fakeLlamaConfig(url), { clock: systemClock, logger: silentLogger });
  return {
    // The fake goes with its engine.
    engine: Object.assign(engine, {
      stop: async () => {
        await Object.getPrototypeOf(engine).stop.call(engine);
        await fake.close();
      },
    }),
    promptTokenIds: (length) => Uint32Array.from({ length }, (_, i) => 100 + ((i * 37) % 3_000)),
    supportsExport: false,
    resumesExactly: ["greedy"],
    refuses: ["min-tokens", "prompt-logprobs", "namespaces", ...(options.slotSavePath === true ? [] : (["clearing"] as const))],
    reusesPartsOfBlocks: true,
  };
} // prettier-ignore

engineBattery("llama.cpp's server (fake)", () => attached({ slotSavePath: true }));
engineBattery("llama.cpp's server without metrics, whose slots cannot be erased (fake)", () =>
  attached({ metrics: false }),
);
