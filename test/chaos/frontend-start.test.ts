import assert from "node:assert/strict";
import { test } from "node:test";
import { startInProcessCluster } from "../helpers/in-process-cluster.ts";
import type { JsonValue } from "../../src/runtime/discovery/index.ts";

test("a frontend that starts beside others serves from its first answer on, also when the first worker it asks is dead", async () => {
  const cluster = await startInProcessCluster({ workers: 2 });
  try {
    // A worker that is gone without discovery having noticed; listed before the others.
    const { discovery } = cluster.planes();
    const lease = await discovery.openLease();
    for (const kind of ["v1/instances/", "v1/mdc/"]) {
      const [entry] = await discovery.list(kind);
      const real = entry!.key.slice(entry!.key.lastIndexOf("/") + 1);
      const dead = "0000000000000001";
      const value = JSON.parse(JSON.stringify(entry!.value).replaceAll(real, dead)) as Record<string, JsonValue>;
      if (kind === "v1/instances/") value["address"] = "memory://12345";
      await lease.put(entry!.key.replace(real, dead), value);
    }
    const { baseUrl } = await cluster.addFrontend();
    const answer = await fetch(`${baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: 2 }),
    });
    assert.equal(answer.status, 200, await answer.text());
    await lease.close();
  } finally {
    await cluster.stop();
  }
});
