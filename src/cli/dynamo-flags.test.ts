import assert from "node:assert/strict";
import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { until } from "../../test/helpers/in-process-cluster.ts";
import { DynamoError } from "../errors/index.ts";
import type { DecisionExplanation } from "../router/index.ts";
import { DYNAMO_FLAGS } from "./dynamo-flags.ts";
import { OPTIONS } from "./options.ts";
import { resolveOptions } from "./resolve-options.ts";

/** As `dynamo.frontend`, `dynamo.router` and `dynamo.mocker` 1.4 and 1.5 take them, with a value where they have one. */
const ROUTER = `
  --router-mode kv | --router-kv-overlap-score-credit 1.0 | --kv-overlap-score-weight 1.0 | --router-temperature 0.0
  --router-kv-events | --no-router-kv-events | --no-kv-events | --router-ttl-secs 120 | --router-predicted-ttl-secs 5
  --router-replica-sync | --no-router-replica-sync | --router-snapshot-threshold 1000000 | --router-reset-states
  --router-track-active-blocks | --no-router-track-active-blocks | --router-track-output-blocks
  --router-track-prefill-tokens | --no-router-track-prefill-tokens | --router-assume-kv-reuse
  --no-router-assume-kv-reuse | --router-prefill-load-scale 1.0 | --router-decode-active-request-weight 0
  --router-kv-overlap-score-credit-decay 0 | --router-host-cache-hit-weight 0.75 | --router-disk-cache-hit-weight 0.25
  --shared-cache-multiplier 0.5 | --shared-cache-type none | --router-event-threads 4 | --router-queue-threshold 16
  --router-queue-policy wspt | --router-policy-config classes.yaml | --router-session-affinity-ttl-secs 60
  --router-session-affinity-mode soft | --router-min-initial-workers 0 | --decode-fallback | --load-aware
  --router-conditional-disagg | --use-remote-indexer | --serve-indexer | --router-prefill-policy kv
  --router-decode-policy kv | --router-prefill-load-model aic | --aic-system h200_sxm | --aic-backend vllm`;
const PLANES = `
  --namespace dynamo | --discovery-backend file | --store-kv file | --request-plane tcp | --event-plane zmq`;
const FLAGS = {
  frontend: `${ROUTER} ${PLANES}
  --http-host 0.0.0.0 | --http-port 8000 | --tls-cert-path a.pem | --tls-key-path b.pem | --namespace-prefix a
  --model-name m | --model-path p | --kv-cache-block-size 16 | --migration-limit 3 | --migration-max-seq-len 1000
  --active-decode-blocks-threshold 0.9 | --active-prefill-tokens-threshold 1000
  --active-prefill-tokens-threshold-frac 2 | --admission-control token-capacity
  --rejection-frontend-request-concurrency-limit 10 | --rejection-frontend-runtime-task-limit 10
  --rejection-frontend-request-plane-connection-limit 10 | --kserve-grpc-server | --grpc-metrics-port 8788
  --metrics-prefix dynamo_frontend | --dump-config-to x.json | --dyn-chat-processor vllm | --dyn-preprocess-workers 2
  --dyn-debug-perf | --tokenizer fastokens | --tokenizer-fallback | --trust-remote-code | --enable-anthropic-api
  --strip-anthropic-preamble | --enable-streaming-tool-dispatch | --enable-streaming-reasoning-dispatch
  --exclude-tools-when-tool-choice-none | --no-exclude-tools-when-tool-choice-none | --frontend-route-extension a:b
  --interactive | -i`,
  router: `${ROUTER} ${PLANES} --endpoint dyn://a.b.c`,
  mocker: `${PLANES}
  --model-path p | --model-name m | --endpoint dyn://a.b.generate | --endpoint-types chat,completions
  --num-gpu-blocks-override 16384 | --block-size 64 | --max-num-seqs 256 | --max-num-batched-tokens 8192
  --enable-prefix-caching | --no-enable-prefix-caching | --enable-chunked-prefill | --no-enable-chunked-prefill
  --preemption-mode fifo | --speedup-ratio 1.0 | --decode-speedup-ratio 1.0 | --startup-time 1 | --data-parallel-size 2
  --num-workers 4 | --stagger-delay 0.1 | --kv-transfer-bandwidth 64 | --disaggregation-mode agg
  --is-prefill-worker | --is-decode-worker | --bootstrap-ports 1,2 | --engine-type sglang | --reasoning {}
  --planner-profile-data x.json | --zmq-kv-events-ports 1,2 | --zmq-replay-ports 1,2 | --extra-engine-args a.json
  --durable-kv-events | --connector none | --dyn-tool-call-parser hermes | --dyn-reasoning-parser basic
  --custom-jinja-template t | --engine-request-limit 16 | --health-check-payload {} | --dump-config-to x
  --output-modalities text | --kv-bytes-per-token 100`,
} as const;

test("every flag of Dynamo's frontend, router and mocker is taken, or answered with the reason", async () => {
  for (const [command, flags] of Object.entries(FLAGS) as [keyof typeof FLAGS, string][]) {
    const answers = { taken: 0, ignored: 0, refused: 0 };
    for (const flag of flags.split(/\||\n/).flatMap((text) => text.trim().match(/-{1,2}[a-z][^]*/)?.[0] ?? [])) {
      const argv = flag.trim().split(/\s+/);
      try {
        const { warnings } = await resolveOptions({ command, argv, env: {} });
        if (warnings.some((line) => line.includes("is ignored: "))) answers.ignored++;
        else answers.taken++;
      } catch (thrown) {
        assert.ok(thrown instanceof DynamoError, String(thrown));
        const lines = thrown.publicMessage.split("\n");
        assert.equal(lines.length, 1, thrown.publicMessage);
        assert.doesNotMatch(lines[0]!, /no such option/);
        assert.match(lines[0]!, /an option of Dynamo that is none here: .{10}|it belongs to dynamo|expected agg/);
        answers.refused++;
      }
    }
    assert.ok(answers.taken > 15, `${command}: ${JSON.stringify(answers)}`);
  }
});

test("no option of ours stands among Dynamo's flags that are none", () => {
  assert.deepEqual(
    Object.keys(DYNAMO_FLAGS).filter((flag) => Object.hasOwn(OPTIONS, flag)),
    [],
  );
});

test(
  "dynamo frontend and dynamo mocker run together with Dynamo's own flags, routed by kv",
  { timeout: 60_000 },
  async () => {
    const folder = await mkdtemp(join(tmpdir(), "dynamo-flags-"));
    const children: ChildProcess[] = [];
    const start = async (line: string): Promise<Record<string, unknown>> => {
      const command = join(import.meta.dirname, "..", "..", "bin", "dynamo.mjs");
      const child = spawn(process.execPath, [command, ...line.trim().split(/\s+/)], {
        stdio: ["ignore", "ignore", "inherit", "ipc"],
        env: { ...process.env, DYN_LOG: "error", DYN_FILE_KV: folder },
      });
      children.push(child);
      const [ready] = (await once(child, "message", { signal: AbortSignal.timeout(30_000) })) as [{ facts: object }];
      return ready.facts as Record<string, unknown>;
    };
    try {
      const planes = "--discovery-backend file --request-plane tcp --event-plane zmq";
      const facts = await start(`frontend --router-mode kv --http-port 0 ${planes} --router-kv-overlap-score-credit 1.0
      --router-temperature 0.0 --router-kv-events --router-event-threads 4 --router-track-active-blocks`);
      await start(`mocker --num-workers 4 ${planes} --model-name mocked --block-size 64 --num-gpu-blocks-override 16384
      --max-num-seqs 256 --max-num-batched-tokens 8192 --enable-prefix-caching --speedup-ratio 10 --engine-type vllm`);
      const url = `http://127.0.0.1:${String(facts["port"])}`;
      const health = async () => (await (await fetch(`${url}/health`)).json()) as { instances: { problem?: string }[] };
      await until(
        async () => (await health()).instances.filter((one) => one.problem === undefined).length === 4,
        "four workers",
      );
      const ask = async (id: string): Promise<DecisionExplanation> => {
        const answer = await fetch(`${url}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json", "x-request-id": id },
          body: JSON.stringify({
            model: "mocked",
            prompt: "the same words again and again; ".repeat(12),
            max_tokens: 4,
          }),
        });
        assert.equal(answer.status, 200, await answer.text());
        const explained = await fetch(`${url}/v1/route/explain/${id}`);
        return ((await explained.json()) as { decisions: DecisionExplanation[] }).decisions[0]!;
      };
      const cold = await ask("cold");
      const warm = await ask("warm");
      assert.deepEqual([cold.policy, cold.candidates.length, cold.predicted.cached_tokens], ["kv", 4, 0]);
      assert.equal(warm.worker.instance_id, cold.worker.instance_id);
      assert.deepEqual([warm.predicted.cached_tokens, warm.actual!.cached_tokens], [320, 320]);
    } finally {
      const exits = children.filter((child) => child.exitCode === null).map((child) => once(child, "exit"));
      for (const child of children) child.kill("SIGKILL");
      await Promise.all(exits);
      await rm(folder, { recursive: true });
    }
  },
);
