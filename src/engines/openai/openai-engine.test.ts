import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { engineBattery, type EngineUnderTest } from "../engine.battery.ts";
import type { FakeServer } from "../foreign/fixtures/fake-server.ts";
import { FakeLlamaServer } from "../llama-server/fixtures/fake-llama-server.ts";
import { ruleToken } from "../foreign/fixtures/fake-server.ts";
import { FakeVllm } from "../vllm/fixtures/fake-vllm.ts";
import { FakeOpenAi } from "./fixtures/fake-openai.ts";
import { byteConfig } from "./fixtures/openai-config.ts";
import { createOpenAiEngine } from "./openai-engine.ts";

/** The engine battery over each of the three forms: tokens both ways, tokens in and text out, text both ways. */
async function beside(
  fake: Pick<FakeServer, "listen" | "close"> | FakeVllm,
  knows = true,
  reusesPartsOfBlocks = false,
): Promise<EngineUnderTest> {
  const url = await fake.listen();
  const engine = createOpenAiEngine(await byteConfig(url, {}, knows), { clock: systemClock, logger: silentLogger });
  return {
    engine: Object.assign(engine, {
      stop: async () => {
        await Object.getPrototypeOf(engine).stop.call(engine);
        await fake.close();
      },
    }),
    // Printable, so that text and bytes are one.
    promptTokenIds: (length) => Uint32Array.from({ length }, (_, i) => 33 + ((i * 37 + Math.floor(i / 90)) % 90)),
    supportsExport: false,
    resumesExactly: ["greedy"],
    refuses: ["logprobs", "prompt-logprobs", "namespaces", "clearing", "min-tokens"],
    reusesPartsOfBlocks,
  };
}

const letter = (tokens: readonly number[]): number => 97 + ruleToken(tokens, 0, 26);

engineBattery("OpenAI upstream: token ids both ways (fake vLLM)", () =>
  beside(new FakeVllm({ contextLength: 512, blockSize: 16, vocabularySize: 259, maxSequences: 8, totalBlocks: 320, tokenize: (text) => [...Buffer.from(text)] })),
); // prettier-ignore
engineBattery("OpenAI upstream: token ids in, text out (fake llama.cpp server)", () =>
  beside(
    new FakeLlamaServer({
      slots: 8,
      vocabularySize: 259,
      tokenize: (text) => [...Buffer.from(text)],
      pieceOf: (token) => Buffer.of(token),
      nextToken: letter,
    }),
    true,
    true,
  ),
);
engineBattery("OpenAI upstream: text both ways, strict (fake)", () =>
  beside(new FakeOpenAi({ isStrict: true, maxRunning: 64 })),
);
engineBattery("OpenAI upstream: text both ways, odd events, an unknown tokenizer (fake)", () =>
  beside(new FakeOpenAi({ isOdd: true, maxRunning: 64 }), false),
);
