import { resolve } from "node:path";
import { engineClusterTests } from "../helpers/engine-e2e.ts";

engineClusterTests({
  engine: "trtllm",
  title: "TensorRT-LLM",
  fake: resolve(import.meta.dirname, "../../src/engines/trtllm/fixtures/fake-trtllm-main.ts"),
  args: ["--fake-total-blocks=400", "--max_seq_len", "2048"],
  found: /version 1\.3\.0rc27, tokens over \/v1\/completions without detokenization/,
  hasAlternatives: false,
});
