import { DynamoError } from "../errors/index.ts";
import type { DisaggReport } from "../frontend/index.ts";
import type { CommandContext } from "./commands.ts";
import { callFrontend, frontendUrl, type FrontendAnswer } from "./frontend-call.ts";
import { resolveOptions } from "./resolve-options.ts";
import { table } from "./status-table.ts";

/** The worker finishes what runs before it changes its role. */
const ROLE_MS = 180_000;

/**
 * `dynamo disagg report`: what splitting prefill from decode costs and gains on a running cluster, by prompt length, and what
 * to do; `dynamo disagg role INSTANCE ROLE` turns a worker to another role.
 */
export async function run({ argv, env, out, err }: CommandContext): Promise<number> {
  const { values, positionals } = await resolveOptions({ command: "disagg", argv, env, maxPositionals: 3 });
  const [word, instanceId, role] = positionals;
  const base = frontendUrl(values.frontend);
  const adminKey = values["admin-key"];
  let answer: FrontendAnswer;
  if (word === "report" && instanceId === undefined) {
    answer = await callFrontend(new URL("/v1/admin/disagg", base), { adminKey });
  } else if (word === "role" && role !== undefined) {
    answer = await callFrontend(new URL("/v1/admin/role", base), {
      adminKey,
      timeoutMs: ROLE_MS,
      method: "POST",
      body: JSON.stringify({ instance_id: instanceId, role }),
    });
  } else {
    throw new DynamoError("invalid-config", "expected: report, or: role INSTANCE agg|prefill|decode");
  }
  if (answer.status === 404) {
    err(`dynamo disagg: ${base.origin} does not take us for an operator; set DYN_ADMIN_KEY to its key\n`);
    return 1;
  }
  if (answer.status !== 200) {
    err(`dynamo disagg: ${base.origin} answered with status ${answer.status}: ${errorOf(answer.text)}\n`);
    return 1;
  }
  if (values.json) out(`${answer.text}\n`);
  else if (word === "role") out(`${instanceId} is ${role} now\n`);
  else out(reportText(readReports(answer.text, base), base.origin));
  return 0;
}

function errorOf(text: string): string {
  try {
    return (JSON.parse(text) as { error: { message: string } }).error.message;
  } catch {
    return text.slice(0, 200);
  }
}

function readReports(text: string, base: URL): readonly DisaggReport[] {
  try {
    const { models } = JSON.parse(text) as { models: readonly DisaggReport[] };
    if (Array.isArray(models)) return models;
  } catch {
    // Told below, with what it was not.
  }
  throw new DynamoError("unsupported-operation", `${base.origin} does not answer like a Dynamo frontend`);
}

/** Pure. */
export function reportText(reports: readonly DisaggReport[], where: string): string {
  if (reports.length === 0) return `No model is served at ${where}.\n`;
  return reports.map(modelText).join("\n");
}

function modelText({ model, mode, workers, measured, lengths, advice }: DisaggReport): string {
  const { prefill_tokens_per_second: speed, prefill_samples: samples } = measured;
  const head = [
    "PROMPT",
    "WHOLE ON DECODE",
    "WHOLE ON PREFILL",
    "SPLIT",
    "WAIT",
    "PROMPT",
    "OTHERS",
    "HANDOFF",
    "ANSWER",
    "BETTER",
  ];
  const rows = lengths.map(({ prompt_tokens: tokens, costs, better }) => {
    const { waitMs, prefillMs, interferenceMs, handoffMs, decodeMs } = costs.split;
    return [
      String(tokens),
      ...[costs.decode.totalMs, costs.prefill.totalMs, costs.split.totalMs].map(ms),
      ...[waitMs, prefillMs, interferenceMs, handoffMs, decodeMs].map(ms),
      better === "split" ? "split" : `whole on ${better}`,
    ];
  });
  return [
    `${model}: ${workers.prefill} prefill and ${workers.decode} other workers, --disagg ${mode}`,
    `prefill: ${Math.round(speed.prefill_pool)} tokens/s on prefill workers (${samples.prefill_pool} samples), ` +
      `${Math.round(speed.decode_pool)} on the others (${samples.decode_pool})`,
    `answers: ${Math.round(measured.output_tokens)} tokens, one each ${ms(measured.step_ms)} ms, ${ms(measured.step_ms_per_answer)} ms more for each answer beside it`,
    `handoff: ${ms(measured.handoff_setup_ms)} ms and ${ms(measured.handoff_ms_per_block)} ms a block of ` +
      `${Math.round(measured.block_bytes / 1_000)} kB (${measured.handoff_samples} samples)`,
    "",
    "Delay in ms, for the request and for others, as the cluster is loaded now and nothing of the prompt cached; the parts",
    "are those of splitting:",
    "",
    table([head, ...rows]),
    advice,
    "",
  ].join("\n");
}

function ms(value: number): string {
  return value < 10 ? value.toFixed(1) : String(Math.round(value));
}
