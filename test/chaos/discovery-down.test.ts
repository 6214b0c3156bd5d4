import assert from "node:assert/strict";
import { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { generateLoad } from "../../src/bench/index.ts";
import { until } from "../helpers/in-process-cluster.ts";
import { alive, startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

/** Longer than the TTL of a lease (10 s), so that every lease of the cluster is lost meanwhile. */
const OUTAGE_MS = 13_000;

test("discovery down for longer than a lease: every request is answered, it shows, and all comes back without a restart", async () => {
  const parent = mkdtempSync(join(tmpdir(), "dynamo-discovery-down-"));
  const root = join(parent, "discovery");
  const cluster = await startProcessCluster(["--engine=echo", "--workers=2", "--router-mode=kv"], {
    DYN_FILE_KV: root,
  });
  try {
    await until(async () => (await serving(cluster)) === 2, "both workers");
    const before = [...cluster.pids(" worker "), ...cluster.pids(" frontend ")];
    assert.equal(before.length, 3);

    renameSync(root, `${root}.aside`);
    writeFileSync(root, "in the way");
    const load = generateLoad({
      host: "127.0.0.1",
      port: cluster.port,
      path: "/v1/completions",
      body: (index) => JSON.stringify({ model: "echo", prompt: `request ${index}`, max_tokens: 8 }),
      concurrency: 4,
      durationMs: OUTAGE_MS,
    });
    await until(async () => (await health(cluster)).discovery.startsWith("degraded"), "health to say so");
    assert.match(await metrics(cluster), /^dynamo_plane_degraded\{plane="discovery"\} 1$/m);
    // The router looks at most each quarter second.
    await delay(300);
    const explained = await explain(cluster);
    assert.ok(
      explained.some((text) => text.startsWith("discovery: unreadable")),
      explained.join("; "),
    );
    const report = await load;
    assert.equal(report.failedCount, 0, JSON.stringify(report.errors));
    assert.ok(report.okCount > 100);
    assert.equal(await serving(cluster), 2, "the last known set");

    rmSync(root);
    renameSync(`${root}.aside`, root);
    await until(async () => (await health(cluster)).discovery === "ok", "health to be well");
    assert.match(await metrics(cluster), /^dynamo_plane_degraded\{plane="discovery"\} 0$/m);
    await until(() => count(cluster.output(), "registered in discovery again") >= 2, "the workers' new leases");
    // What the old leases left is given up after 7.5 s; by then the new ones hold the keys.
    await delay(8_000);
    assert.equal(await serving(cluster), 2);
    assert.ok(before.every(alive), "nothing was restarted");
    assert.deepEqual([...cluster.pids(" worker "), ...cluster.pids(" frontend ")], before);
    assert.deepEqual(
      (await explain(cluster)).filter((text) => !text.startsWith("kv:")),
      [],
    );
    assert.equal(count(cluster.output(), "keeping the last known set"), 1, "one line per outage and watcher");
  } finally {
    await cluster.stop();
    rmSync(parent, { recursive: true });
  }
});

function count(text: string, part: string): number {
  return text.split(part).length - 1;
}

interface Health {
  readonly discovery: string;
  readonly events: string;
  readonly instances: readonly { readonly problem?: string }[];
}

async function health({ baseUrl }: ProcessCluster): Promise<Health> {
  return (await (await fetch(`${baseUrl}/health`)).json()) as Health;
}

async function serving(cluster: ProcessCluster): Promise<number> {
  return (await health(cluster)).instances.filter(({ problem }) => problem === undefined).length;
}

async function metrics({ baseUrl }: ProcessCluster): Promise<string> {
  return (await fetch(`${baseUrl}/metrics`)).text();
}

/** What the explanation of a fresh decision says was missing. */
async function explain({ baseUrl }: ProcessCluster): Promise<readonly string[]> {
  const answer = await fetch(`${baseUrl}/v1/route`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: "echo", prompt: "where to?", max_tokens: 1 }),
  });
  const text = await answer.text();
  const found = /"degradations":(\[[^\]]*\])/.exec(text.replaceAll(/\s*\n\s*/g, ""));
  assert.ok(found, `${answer.status} ${text}`);
  return JSON.parse(found[1]!) as string[];
}
