import type { Logger } from "../observability/index.ts";
import type { Clock } from "../std/index.ts";
import type { Engine } from "./base.ts";
import type { EngineConfig } from "./config.ts";

/** What every engine gets from its worker. */
export interface EngineOptions {
  readonly logger: Logger;
  readonly clock: Clock;
}

/**
 * Makes the engine that the configuration names; `start` still has to be called. Each engine is imported only here and
 * only when asked for, so that its native library is needed by nobody else.
 */
export async function loadEngine(config: EngineConfig, options: EngineOptions): Promise<Engine> {
  switch (config.kind) {
    case "llama": {
      const { LlamaEngine } = await import("./llama/llama-engine.ts");
      return new LlamaEngine(config, options);
    }
    case "echo": {
      const { EchoEngine } = await import("./echo/echo-engine.ts");
      return new EchoEngine(config, options);
    }
    case "mocker": {
      const { MockerEngine } = await import("./mocker/index.ts");
      return new MockerEngine(config, options);
    }
    case "sglang": {
      const { createSglangEngine } = await import("./sglang/index.ts");
      return createSglangEngine(config, options);
    }
    case "trtllm": {
      const { createTrtllmEngine } = await import("./trtllm/index.ts");
      return createTrtllmEngine(config, options);
    }
    case "vllm": {
      const { createVllmEngine } = await import("./vllm/index.ts");
      return createVllmEngine(config, options);
    }
    case "llama-server": {
      const { createLlamaServerEngine } = await import("./llama-server/index.ts");
      return createLlamaServerEngine(config, options);
    }
    case "openai": {
      const { createOpenAiEngine } = await import("./openai/index.ts");
      return createOpenAiEngine(config, options);
    }
  }
}
