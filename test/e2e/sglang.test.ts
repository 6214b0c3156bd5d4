import { resolve } from "node:path";
import { engineClusterTests } from "../helpers/engine-e2e.ts";

engineClusterTests({
  engine: "sglang",
  title: "SGLang",
  fake: resolve(import.meta.dirname, "../../src/engines/sglang/fixtures/fake-sglang-main.ts"),
  args: ["--fake-total-blocks=400", "--context-length", "2048"],
  found: /version 0\.5\.23, tokens over \/generate/,
  hasAlternatives: true,
});
