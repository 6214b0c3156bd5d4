import { DynamoError } from "../errors/index.ts";
import { ROLE_ENDPOINT, WORKER_ROLES } from "../protocol/index.ts";
import type { PoolOutlook, Router, SplitChoice, SplitCost } from "../router/index.ts";
import { formatEndpoint, type Planes } from "../runtime/component/index.ts";
import { ask } from "../runtime/request-plane/index.ts";
import type { Exchange, Route } from "./http/index.ts";
import type { ModelRegistry, ServedModel } from "./model-registry.ts";
import { invalidField, isObject, readString, refuseUnknown } from "./openai/index.ts";
import type { Operators } from "./operator.ts";

/**
 * The operators' view of disaggregated serving: what splitting costs and gains here at which prompt lengths, from what was
 * measured, and what to do about it; and the change of a worker's role.
 */
export function disaggApi(models: ModelRegistry, operators: Operators, planes: Planes): Route[] {
  return [
    {
      method: "GET",
      path: "/v1/admin/disagg",
      family: "openai",
      handle: (exchange) => {
        operators.check(exchange);
        exchange.json(200, { object: "disaggregation.report", models: models.list().map(reportOf) });
      },
    },
    {
      method: "POST",
      path: "/v1/admin/role",
      family: "openai",
      body: "json",
      handle: (exchange) => {
        operators.check(exchange);
        return changeRole(exchange, models, planes);
      },
    },
  ];
}

export interface DisaggReport {
  readonly model: string;
  readonly mode: string;
  readonly workers: { readonly prefill: number; readonly decode: number };
  readonly measured: {
    readonly prefill_tokens_per_second: { readonly prefill_pool: number; readonly decode_pool: number };
    readonly prefill_samples: { readonly prefill_pool: number; readonly decode_pool: number };
    readonly handoff_setup_ms: number;
    readonly handoff_ms_per_block: number;
    readonly handoff_samples: number;
    readonly block_bytes: number;
    readonly step_ms: number;
    readonly step_ms_per_answer: number;
    readonly output_tokens: number;
  };
  /** As the cluster is loaded now; nothing of the prompt cached. */
  readonly lengths: readonly {
    readonly prompt_tokens: number;
    readonly costs: Readonly<Record<SplitChoice, SplitCost>>;
    readonly better: SplitChoice;
  }[];
  readonly advice: string;
}

const LENGTHS = [32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768];
const IDLE: PoolOutlook = Object.freeze({ cachedTokens: 0, queuedTokens: 0, activeRequests: 0, rankCount: 1 });

function reportOf(model: ServedModel): DisaggReport {
  const { advisor, card, router, prefill } = model;
  const decodeNow = outlookNow(router);
  const prefillNow = prefill === undefined ? IDLE : outlookNow(prefill.router);
  const lengths = LENGTHS.filter((tokens) => tokens < card.contextLength).map((promptTokens) => {
    const question = { promptTokens, outputTokens: Infinity, decode: decodeNow, prefill: prefillNow };
    const { costs, choice } = advisor.compare(question);
    const { split, decode, prefill: whole } = costs;
    return {
      prompt_tokens: promptTokens,
      costs: { split: rounded(split), decode: rounded(decode), prefill: rounded(whole) },
      better: choice,
    };
  });
  const measured = advisor.measured();
  return {
    model: model.name,
    mode: advisor.mode,
    workers: { prefill: prefill?.router.workers.length ?? 0, decode: router.workers.length },
    measured: {
      prefill_tokens_per_second: {
        prefill_pool: round(1_000 / advisor.prefillMsPerToken),
        decode_pool: round(1_000 / advisor.decodeMsPerToken),
      },
      prefill_samples: { prefill_pool: measured.prefillPrefillSamples, decode_pool: measured.decodePrefillSamples },
      handoff_setup_ms: round(measured.handoffSetupMs),
      handoff_ms_per_block: round(measured.handoffMsPerBlock),
      handoff_samples: measured.handoffSamples,
      block_bytes: measured.blockBytes,
      step_ms: round(advisor.stepMs(1)),
      step_ms_per_answer: round(advisor.stepMs(2) - advisor.stepMs(1)),
      output_tokens: round(advisor.outputTokens),
    },
    lengths,
    advice: adviceOf(model, lengths),
  };
}

/** The least loaded rank: what a request without a cached prefix would meet. */
function outlookNow({ workers }: Router): PoolOutlook {
  const ranks = workers.flatMap((worker) => worker.ranks);
  const rankCount = ranks.length;
  let best: PoolOutlook | undefined;
  for (const rank of ranks) {
    const { prefillTokens, activeRequests } = rank;
    if (best === undefined || prefillTokens + activeRequests < best.queuedTokens + best.activeRequests) {
      best = { cachedTokens: 0, queuedTokens: prefillTokens, activeRequests, rankCount };
    }
  }
  return best ?? IDLE;
}

function adviceOf({ advisor, prefill }: ServedModel, lengths: DisaggReport["lengths"]): string {
  const { handoffSamples } = advisor.measured();
  const basis =
    handoffSamples === 0
      ? "No handoff was measured yet, its cost is assumed: send some long prompts, with --disagg always for a moment, to know."
      : `After ${handoffSamples} measured handoffs.`;
  const better = lengths.filter((row) => row.better === "split");
  const first = better[0]?.prompt_tokens;
  if ((prefill?.router.workers.length ?? 0) === 0) {
    return first === undefined
      ? `There are no prefill workers, and at this load an idle one would not pay. ${basis}`
      : `There are no prefill workers; at this load an idle one would pay from prompts of ${first} tokens on. ${basis}`;
  }
  if (first === undefined) {
    return `At this load splitting pays at no prompt length: with --disagg auto the prefill workers serve whole requests, too; as agg workers they would do nothing else (dynamo disagg role). ${basis}`;
  }
  return `At this load splitting pays from prompts of ${first} tokens on; shorter ones stay on one worker. ${basis}`;
}

function rounded({ waitMs, prefillMs, interferenceMs, handoffMs, decodeMs, totalMs }: SplitCost): SplitCost {
  return {
    waitMs: round(waitMs),
    prefillMs: round(prefillMs),
    interferenceMs: round(interferenceMs),
    handoffMs: round(handoffMs),
    decodeMs: round(decodeMs),
    totalMs: round(totalMs),
  };
}

function round(value: number): number {
  return Math.round(value * 100) / 100;
}

const ROLE_FIELDS = new Set(["instance_id", "role"]);
/** The worker finishes what runs first, at most for its drain time. */
const ROLE_TIMEOUT_MS = 180_000;

/** Turns a worker to another role; answers when it is back in discovery with it. */
async function changeRole(exchange: Exchange, models: ModelRegistry, planes: Planes): Promise<void> {
  const { body } = exchange;
  if (!isObject(body)) throw invalidField("body", "a JSON object", body);
  refuseUnknown(body, ROLE_FIELDS, "");
  const instanceId = readString(body["instance_id"], "instance_id", 1, 64);
  const role = WORKER_ROLES.find((each) => each === body["role"]);
  if (role === undefined) throw invalidField("role", `one of ${WORKER_ROLES.join(", ")}`, body["role"]);
  const found = models.instances().find(({ instance }) => instance.instanceId === instanceId);
  if (found === undefined) {
    throw new DynamoError("no-workers", "there is no such worker", { param: "instance_id" });
  }
  await ask(planes.request.client, found.instance.address, Buffer.from(JSON.stringify({ role })), {
    endpoint: formatEndpoint({ ...found.instance, endpoint: ROLE_ENDPOINT }),
    requestId: exchange.requestId,
    traceparent: "",
    timeoutMs: ROLE_TIMEOUT_MS,
  });
  exchange.json(200, { instance_id: instanceId, role });
}
