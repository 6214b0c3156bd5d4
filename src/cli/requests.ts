import { DynamoError } from "../errors/index.ts";
import type { CommandContext } from "./commands.ts";
import { callFrontend, frontendUrl } from "./frontend-call.ts";
import { resolveOptions } from "./resolve-options.ts";
import { duration, table } from "./status-table.ts";

/** `dynamo requests`: what a frontend is serving, oldest first; `dynamo requests cancel ID` ends one. */
export async function run({ argv, env, out, err }: CommandContext): Promise<number> {
  const { values, positionals } = await resolveOptions({ command: "requests", argv, env, maxPositionals: 2 });
  const [word, id] = positionals;
  if (word !== undefined && (word !== "cancel" || id === undefined)) {
    throw new DynamoError("invalid-config", `expected nothing or: cancel ID, got ${positionals.join(" ")}`);
  }
  const base = frontendUrl(values.frontend);
  const adminKey = values["admin-key"];
  const [method, path] = id === undefined ? ["GET", `?limit=${values.show}`] : ["DELETE", `/${encodeURIComponent(id)}`];
  const { status, text } = await callFrontend(new URL(`/v1/admin/requests${path}`, base), { method, adminKey });
  if (status === 404) {
    err(
      id === undefined
        ? `dynamo requests: ${base.origin} does not take us for an operator; set DYN_ADMIN_KEY to its key\n`
        : `dynamo requests: no request ${id} at ${base.origin}, or we are not an operator there (DYN_ADMIN_KEY)\n`,
    );
    return 1;
  }
  if (status !== 200) throw new DynamoError("unsupported-operation", `${base.origin} answered with status ${status}`);
  if (values.json) out(`${text}\n`);
  else out(id === undefined ? requestsText(readList(text, base), base.origin) : `ended ${id}\n`);
  return 0;
}

/** What is shown of a request; the answer has more. */
export interface ShownRequest {
  readonly id: string;
  readonly model: string;
  readonly tenant: string;
  readonly age_ms: number;
  readonly stage: string;
  readonly owner: string;
  readonly stage_ms: number;
  readonly prompt_tokens: number;
  readonly output_tokens: number;
  readonly deadline_in_ms: number;
}

export interface RequestList {
  readonly total: number;
  readonly data: readonly ShownRequest[];
}

function readList(text: string, base: URL): RequestList {
  try {
    const list = JSON.parse(text) as RequestList;
    if (Array.isArray(list.data)) return list;
  } catch {
    // Told below, with what it was not.
  }
  throw new DynamoError("unsupported-operation", `${base.origin} does not answer like a Dynamo frontend`);
}

/** Pure. */
export function requestsText({ total, data }: RequestList, where: string): string {
  if (data.length === 0) return `No requests at ${where}.\n`;
  const rows = data.map((request) => [
    request.id,
    request.model,
    request.tenant,
    seconds(request.age_ms),
    request.stage,
    request.owner,
    seconds(request.stage_ms),
    String(request.prompt_tokens),
    String(request.output_tokens),
    seconds(request.deadline_in_ms),
  ]);
  const head = ["REQUEST", "MODEL", "TENANT", "AGE", "STAGE", "OWNER", "IN STAGE", "PROMPT", "OUTPUT", "DEADLINE IN"];
  return `${data.length} of ${total} requests at ${where}, oldest first\n\n${table([head, ...rows])}`;
}

/** `0.12s`, then as `dynamo status`. */
function seconds(ms: number): string {
  return ms < 10_000 ? `${(Math.max(0, ms) / 1_000).toFixed(2)}s` : duration(ms);
}
