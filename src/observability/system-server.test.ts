import assert from "node:assert/strict";
import { test } from "node:test";
import { Metrics } from "./metrics.ts";
import { startSystemServer } from "./system-server.ts";

test("system server: a foreign engine's metrics follow ours, and its log can be searched", async () => {
  const asked: [string, number][] = [];
  const metrics = new Metrics();
  metrics.gauge("dynamo_kvindexer_models").labels().set(3);
  const server = await startSystemServer({
    port: 0,
    metrics,
    status: () => ({ state: "engine-down", engine: { state: "down" } }),
    foreignMetrics: () => "# TYPE vllm:x gauge\nvllm:x 1\n",
    searchLog: (text, limit) => {
      asked.push([text, limit]);
      return ["first", "second"];
    },
  });
  const get = async (path: string): Promise<[number, string]> => {
    const answer = await fetch(`http://127.0.0.1:${server.port}${path}`);
    return [answer.status, await answer.text()];
  };
  const [, page] = await get("/metrics");
  assert.match(page, /^dynamo_kvindexer_models 3\n/m);
  assert.ok(page.endsWith("\n# TYPE vllm:x gauge\nvllm:x 1\n"), page);
  assert.deepEqual(await get("/engine/log?search=out%20of%20memory&lines=7"), [200, "first\nsecond\n"]);
  await get("/engine/log");
  await get("/engine/log?lines=nonsense");
  await get("/engine/log?lines=99999");
  assert.deepEqual(asked, [
    ["out of memory", 7],
    ["", 100],
    ["", 100],
    ["", 4_000],
  ]);
  const [status, body] = await get("/health");
  assert.deepEqual([status, (JSON.parse(body) as { status: string }).status], [503, "notready"]);
  await server.close();
});

test("system server: without an engine of that kind there is no log", async () => {
  const server = await startSystemServer({ port: 0, metrics: new Metrics(), status: () => ({ state: "ready" }) });
  assert.equal((await fetch(`http://127.0.0.1:${server.port}/engine/log`)).status, 404);
  await server.close();
});
