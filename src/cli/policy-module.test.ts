import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import type { DecisionExplanation } from "../router/index.ts";
import { startProcessCluster } from "../../test/helpers/process-cluster.ts";
import { loadPolicyModule } from "./policy-module.ts";
import { run as runReplay } from "./replay.ts";

const folder = mkdtempSync(join(tmpdir(), "policy-module-"));
after(() => rmSync(folder, { recursive: true }));

function aModule(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
}

const LAST = `
export default {
  name: "last",
  choose: ({ candidates }: { candidates: readonly unknown[] }) => ({ index: candidates.length - 1, reason: "the last" }),
};
`;

describe("--router-policy-module", () => {
  test("mistakes name the module and what is wrong with it", async () => {
    const wrong: readonly [string, RegExp][] = [
      [join(folder, "missing.ts"), /missing\.ts: Cannot find module/],
      [aModule("empty.ts", "export const x = 1;"), /empty\.ts: it has no default export/],
      [aModule("broken.js", "this is no program"), /broken\.js: /],
      [aModule("odd.ts", "export default { name: 'odd' };"), /odd\.ts: choose: expected a function, got undefined/],
      [aModule("kv.ts", LAST.replace('"last"', '"kv"')), /kv\.ts: kv is a policy of the router itself/],
    ];
    for (const [path, message] of wrong) {
      await assert.rejects(loadPolicyModule(path), { reason: "invalid-config", message });
    }
  });

  test("a replay runs by it, and refuses a mode beside it", async () => {
    let stdout = "";
    const module = `--router-policy-module=${aModule("replayed.ts", LAST)}`;
    const made = ["--format=synthetic", "--request-count=20", "--workers=3", "--json"];
    const context = { env: {}, out: (text: string) => void (stdout += text), err: () => undefined };
    assert.equal(await runReplay({ ...context, argv: [...made, module] }), 0);
    assert.match(stdout, /"policy": ?"last"/);
    const both = runReplay({ ...context, argv: [...made, module, "--router-mode=kv"] });
    await assert.rejects(both, { reason: "invalid-config", message: /expected without --router-mode/ });
  });

  test("a cluster routes by it, on each of its frontend's threads", { timeout: 60_000 }, async () => {
    const path = aModule("served.ts", LAST);
    const flags = ["--engine=echo", "--workers=3", "--frontend-threads=2", `--router-policy-module=${path}`];
    const cluster = await startProcessCluster(flags);
    try {
      for (let i = 0; i < 6; i++) {
        const sent = await fetch(`${cluster.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json", "x-request-id": `q${i}`, connection: "close" },
          body: JSON.stringify({ model: "echo", prompt: "where to", max_tokens: 1 }),
        });
        assert.equal(sent.status, 200, await sent.text());
        const explained = await fetch(`${cluster.baseUrl}/v1/route/explain/q${i}`);
        const decision = ((await explained.json()) as { decisions: DecisionExplanation[] }).decisions[0]!;
        assert.deepEqual([decision.policy, decision.reason], ["last", "the last"]);
        assert.equal(decision.worker.instance_id, decision.candidates.at(-1)!.instance_id);
      }
    } finally {
      assert.equal(await cluster.stop(), 0);
    }
  });
});
