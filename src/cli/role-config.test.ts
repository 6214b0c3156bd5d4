import assert from "node:assert/strict";
import { test } from "node:test";
import { DEFAULT_ROUTER_CONFIG } from "../router/index.ts";
import { resolveOptions } from "./resolve-options.ts";
import { frontendConfig } from "./role-config.ts";

async function configOf(argv: readonly string[], env: Record<string, string> = {}) {
  const { values } = await resolveOptions({ command: "frontend", argv: [...argv], env });
  return frontendConfig(values);
}

test("frontend configuration: without options the router has its own defaults", async () => {
  const { router, adminKey, routerMode } = await configOf([]);
  assert.deepEqual({ ...DEFAULT_ROUTER_CONFIG, ...router }, DEFAULT_ROUTER_CONFIG);
  assert.equal(adminKey, undefined);
  assert.equal(routerMode, "round-robin");
});

test("frontend configuration: Dynamo's router options arrive in the router's terms, seconds as milliseconds", async () => {
  const { router, adminKey, routerMode } = await configOf(
    [
      "--router-mode=kv",
      "--router-kv-overlap-score-credit=0.5",
      "--router-temperature=0.3",
      "--no-router-kv-events",
      "--router-ttl-secs=60",
      "--router-predicted-ttl-secs=5",
      "--no-router-assume-kv-reuse",
      "--router-track-output-blocks",
      "--router-queue-threshold=1.5",
      "--router-queue-policy=wspt",
      "--router-session-affinity-ttl-secs=300",
      "--active-decode-blocks-threshold=0.85",
      "--active-prefill-tokens-threshold-frac=2",
    ],
    { DYN_ADMIN_KEY: "secret" },
  );
  assert.equal(routerMode, "kv");
  assert.equal(adminKey, "secret");
  assert.deepEqual(router, {
    ...router,
    overlapScoreCredit: 0.5,
    temperature: 0.3,
    kvEvents: false,
    ttlMs: 60_000,
    predictedTtlMs: 5_000,
    assumeKvReuse: false,
    trackOutputBlocks: true,
    queueThreshold: 1.5,
    queuePolicy: "wspt",
    sessionAffinityTtlMs: 300_000,
    busyThresholds: { activeDecodeBlocks: 0.85, activePrefillTokensFrac: 2 },
  });
});
