import { readFile } from "node:fs/promises";
import { DynamoError } from "../errors/index.ts";
import { parseProfile, profileTiming, type TimingModel } from "../perf-model/index.ts";
import { readTrace, renderReports, runReplay, syntheticTrace, type ReplayReport, type Trace } from "../replay/index.ts"; // prettier-ignore
import { ROUTING_POLICIES, findPolicy, type RouterMode, type RoutingPolicy } from "../router/index.ts";
import type { CommandContext } from "./commands.ts";
import { mockEngineConfig } from "./mocker.ts";
import type { OptionName, OptionValues } from "./options.ts";
import { checkOnePolicy, loadPolicyModule } from "./policy-module.ts";
import { describeTrace, type ReplayOutput } from "./replay-output.ts";
import { replayOnline } from "./replay-online.ts";
import { resolveOptions, type ResolvedOptions } from "./resolve-options.ts";
import { routerConfig } from "./role-config.ts";

/**
 * `dynamo replay`: reads or makes a trace and either simulates it, once per router mode, or sends it to a running cluster.
 * The report goes to stdout; what is being done to stderr. Ctrl-C ends it with what is there: the reports of the router
 * modes that are finished, or the figures of the requests so far; a second one ends the process.
 */
export async function run({ argv, env, out, err }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "replay", argv, env, maxPositionals: 1 });
  checkFlags(resolved);
  checkOnePolicy(resolved);
  const own = await loadPolicyModule(resolved.values["router-policy-module"]);
  const policies = resolved.values.url !== undefined ? [] : own === undefined ? policiesOf(resolved.values["router-mode"]) : [findPolicy(own)!]; // prettier-ignore
  const trace = await traceOf(resolved);
  const leave = new AbortController();
  const onSignal = (): void => leave.abort();
  process.once("SIGINT", onSignal).once("SIGTERM", onSignal);
  try {
    if (resolved.values.url !== undefined) {
      return await replayOnline(trace, resolved.values, resolved.values.url, { out, err, signal: leave.signal });
    }
    return await simulate(trace, resolved, policies, { out, err, signal: leave.signal });
  } finally {
    process.off("SIGINT", onSignal).off("SIGTERM", onSignal);
  }
}

async function simulate(
  trace: Trace,
  resolved: ResolvedOptions,
  policies: readonly RoutingPolicy[],
  { out, err, signal }: ReplayOutput,
): Promise<number> {
  const { values } = resolved;
  const engine = await mockEngineConfig(resolved, undefined);
  const timing = engine.profilePath === undefined ? undefined : await profileOf(engine.profilePath);
  const reports: ReplayReport[] = [];
  for (const policy of policies) {
    err(`simulating ${describeTrace(trace)} on ${values.workers} workers, ${policy.name}\n`);
    try {
      const report = await runReplay(trace, {
        policy,
        workers: values.workers,
        engine,
        ...(timing === undefined ? {} : { timing }),
        router: routerConfig(values),
        seed: values.seed,
        smearMs: values["smear-ms"],
        arrivals:
          values.concurrency === undefined
            ? { kind: "schedule", speedup: values["arrival-speedup"] }
            : { kind: "concurrency", sessions: values.concurrency },
        signal,
      });
      reports.push(report);
    } catch (thrown) {
      if (!(thrown instanceof DynamoError && thrown.reason === "cancelled")) throw thrown;
      err(`interrupted; ${policy.name} has no report\n`);
      break;
    }
  }
  if (values.json) out(`${JSON.stringify({ trace: trace.name, seed: values.seed, reports })}\n`);
  else if (reports.length > 0) out(renderReports(reports));
  return reports.length === policies.length ? 0 : 130;
}

// ---- What was asked for ----

const ONLINE_ONLY: readonly OptionName[] = ["allow-remote", "max-in-flight", "model", "request-timeout-secs", "time-limit-secs"]; // prettier-ignore
const SYNTHETIC_ONLY: readonly OptionName[] = [
  "arrival-interval-ms",
  "input-tokens",
  "inter-turn-delay-ms",
  "num-prefix-groups",
  "output-tokens",
  "request-count",
  "shared-prefix-ratio",
  "turns-per-session",
];
/** What a run against a cluster has, beside the options of the trace. */
const ONLINE: ReadonlySet<OptionName> = new Set<OptionName>([
  ...ONLINE_ONLY,
  ...SYNTHETIC_ONLY,
  ...(["arrival-speedup", "concurrency", "config", "format", "json", "limit", "seed", "smear-ms", "trace-block-size", "url"] as const), // prettier-ignore
]);

/** Flags that would do nothing are mistakes; variables and files may serve several runs. */
function checkFlags({ values, sources, positionals }: ResolvedOptions): void {
  const mistakes: string[] = [];
  const isSynthetic = values.format === "synthetic";
  const [path] = positionals;
  for (const [name, source] of Object.entries(sources) as [OptionName, string][]) {
    if (source !== "flag") continue;
    if (values.url === undefined && ONLINE_ONLY.includes(name)) mistakes.push(`--${name}: only with --url`);
    if (values.url !== undefined && !ONLINE.has(name)) mistakes.push(`--${name}: only without --url`);
    if (!isSynthetic && SYNTHETIC_ONLY.includes(name)) mistakes.push(`--${name}: only with --format=synthetic`);
  }
  if (sources.concurrency === "flag" && sources["arrival-speedup"] === "flag") {
    mistakes.push("--arrival-speedup: not with --concurrency, which takes no notice of arrivals");
  }
  if (isSynthetic && path !== undefined) mistakes.push(`${path}: expected no trace with --format=synthetic`);
  if (!isSynthetic && path === undefined) mistakes.push("TRACE: expected a file, or --format=synthetic, got nothing");
  if (mistakes.length > 0) throw new DynamoError("invalid-config", mistakes.join("\n"));
}

function policiesOf(text: string): RoutingPolicy[] {
  const mistakes: string[] = [];
  const modes = text.split(",").map((mode) => mode.trim());
  const policies = modes.flatMap((mode, index): RoutingPolicy[] => {
    if (mode === "direct")
      mistakes.push("--router-mode: direct needs requests that name their worker; a trace has none");
    else if (!Object.hasOwn(ROUTING_POLICIES, mode)) {
      const known = Object.keys(ROUTING_POLICIES).filter((name) => name !== "direct");
      mistakes.push(`--router-mode: expected ${known.slice(0, -1).join(", ")} or ${known.at(-1)}, got ${mode === "" ? "nothing" : mode}`); // prettier-ignore
    } else if (modes.indexOf(mode) !== index) mistakes.push(`--router-mode: ${mode} is given twice`);
    else return [ROUTING_POLICIES[mode as RouterMode]];
    return [];
  });
  if (mistakes.length > 0) throw new DynamoError("invalid-config", mistakes.join("\n"));
  return policies;
}

/** A run against a cluster is bounded in count too. */
const ONLINE_LIMIT = 10_000;

async function traceOf({ values, positionals }: ResolvedOptions): Promise<Trace> {
  const limit = values.limit ?? (values.url === undefined ? undefined : ONLINE_LIMIT);
  const [path] = positionals;
  if (path === undefined) return madeUp(values, limit);
  return readTrace(path, {
    ...(values.format === "mooncake" || values.format === "azure" ? { format: values.format } : {}),
    ...(limit === undefined ? {} : { maxRows: limit }),
    traceBlockSizeTokens: values["trace-block-size"],
  });
}

function madeUp(values: OptionValues, limit = Infinity): Trace {
  return syntheticTrace({
    sessions: Math.min(values["request-count"], limit),
    inputTokens: values["input-tokens"],
    outputTokens: values["output-tokens"],
    intervalMs: values["arrival-interval-ms"],
    turns: values["turns-per-session"],
    turnDelayMs: values["inter-turn-delay-ms"],
    sharedPrefixRatio: values["shared-prefix-ratio"],
    groups: values["num-prefix-groups"],
    seed: values.seed,
  });
}

async function profileOf(path: string): Promise<TimingModel> {
  const text = await readFile(path, "utf8").catch((cause: unknown) => {
    throw new DynamoError("invalid-config", `the performance profile ${path} cannot be read`, { cause });
  });
  return profileTiming(parseProfile(text));
}
