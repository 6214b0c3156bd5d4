import { isIPv4 } from "node:net";
import { generateSessionLoad, type LoadSession, type Percentiles, type SessionLoadReport, type SessionRequest } from "../bench/index.ts"; // prettier-ignore
import { DynamoError } from "../errors/index.ts";
import { arrivalTimes, traceRequests, type Trace, type TraceSession } from "../replay/index.ts";
import { SeededRandom } from "../std/index.ts";
import type { OptionValues } from "./options.ts";
import { describeTrace, type ReplayOutput } from "./replay-output.ts";
import { milliseconds } from "./role-config.ts";
import { table } from "./status-table.ts";

/**
 * A trace against a running cluster: its requests at its times as streaming completions, prompts as token ids. Real load,
 * so only to this machine unless `--allow-remote`, and bounded in rows, in requests under way and in time.
 *
 * Exit code 1 when no request was answered. The report is complete for what was sent, also after Ctrl-C.
 */
export async function replayOnline(
  trace: Trace,
  values: OptionValues,
  urlText: string,
  { out, err, signal }: ReplayOutput,
): Promise<number> {
  const base = baseUrl(urlText, values["allow-remote"]);
  const model = await servedModel(base, values.model, signal);
  err(`sending ${describeTrace(trace)} to ${base.origin}, model ${model}\n`);
  const { concurrency } = values;
  const report = await generateSessionLoad({
    url: new URL("completions", base),
    sessions: loadSessions(trace, model, values),
    ...(concurrency === undefined ? {} : { concurrency }),
    maxInFlight: concurrency ?? values["max-in-flight"],
    timeoutMs: milliseconds(values["request-timeout-secs"]),
    timeLimitMs: milliseconds(values["time-limit-secs"]),
    signal,
  });
  out(values.json ? `${JSON.stringify({ trace: trace.name, seed: values.seed, model, report })}\n` : rendered(report));
  return report.okCount === 0 && report.requestCount > 0 && report.endedBy !== "signal" ? 1 : 0;
}

// ---- What is sent ----

function loadSessions({ sessions }: Trace, model: string, values: OptionValues): LoadSession[] {
  const arrivals = arrivalTimes(
    sessions,
    { smearMs: values["smear-ms"], arrivals: { kind: "schedule", speedup: values["arrival-speedup"] } },
    new SeededRandom(values.seed),
  );
  return sessions
    .map((session, number) => ({
      arrivalMs: arrivals[number]!,
      requests: sessionRequests(session, number, model),
    }))
    .toSorted((a, b) => a.arrivalMs - b.arrivalMs);
}

function* sessionRequests(session: TraceSession, number: number, model: string): Generator<SessionRequest, void> {
  for (const { delayMs, promptTokenIds, outputTokens } of traceRequests(session, number)) {
    yield {
      delayMs,
      body: () =>
        JSON.stringify({
          model,
          prompt: Array.from(promptTokenIds),
          max_tokens: outputTokens,
          // As long as the trace says, whatever the model would say.
          ignore_eos: true,
          temperature: 0,
          stream: true,
          stream_options: { include_usage: true },
        }),
    };
  }
}

// ---- Where to ----

/** Of the API, with a slash at its end: `http://127.0.0.1:8000/v1/`. */
function baseUrl(text: string, allowRemote: boolean): URL {
  const url = URL.parse(text);
  const isPlain = url !== null && url.username === "" && url.password === "" && url.search === "" && url.hash === "";
  if (!isPlain || url.protocol !== "http:") {
    // A password in it is not for the terminal.
    throw new DynamoError("invalid-config", "--url: expected http://HOST:PORT, got something else");
  }
  if (!allowRemote && !isLoopback(url.hostname)) {
    throw new DynamoError("invalid-config", `--url: ${url.hostname} is another machine; --allow-remote sends it real load`); // prettier-ignore
  }
  const path = url.pathname.replace(/\/+$/, "");
  url.pathname = path.endsWith("/v1") ? `${path}/` : `${path}/v1/`;
  return url;
}

function isLoopback(hostname: string): boolean {
  return hostname === "localhost" || hostname === "[::1]" || (isIPv4(hostname) && hostname.startsWith("127."));
}

const MODELS_TIMEOUT_MS = 10_000;

/** Asked for before any load is sent, so that a wrong address or name is one clear line. */
async function servedModel(base: URL, wanted: string | undefined, signal: AbortSignal): Promise<string> {
  let names: string[];
  try {
    const answer = await fetch(new URL("models", base), {
      signal: AbortSignal.any([signal, AbortSignal.timeout(MODELS_TIMEOUT_MS)]),
      redirect: "error",
    });
    const { data } = (await answer.json()) as { data: { id: unknown }[] };
    names = data.map(({ id }) => String(id));
  } catch (cause) {
    if (signal.aborted) throw new DynamoError("cancelled", "interrupted before any request was sent", { cause });
    throw new DynamoError("worker-unreachable", `--url: nothing at ${base.origin} lists models at ${base.pathname}models`, { cause }); // prettier-ignore
  }
  const listed = names.length === 0 ? "no model" : names.slice(0, 20).join(", ");
  if (wanted === undefined) {
    if (names.length === 1) return names[0]!;
    throw new DynamoError("invalid-config", `--model: expected one of the served models, got nothing; served: ${listed}`); // prettier-ignore
  }
  if (names.includes(wanted)) return wanted;
  throw new DynamoError("model-not-found", `${wanted} is not served at ${base.origin}; served: ${listed}`);
}

// ---- What came of it ----

const ENDED_BY = {
  "last-session": "the end of the trace",
  "time-limit": "--time-limit-secs",
  signal: "interruption",
} as const;

function rendered(report: SessionLoadReport): string {
  const rows: [string, string][] = [
    ["ended by", ENDED_BY[report.endedBy]],
    ["time", seconds(report.wallMs)],
    ["requests answered", `${report.okCount} of ${report.requestCount} sent`],
    ...counts("status", without200(report.statuses)),
    ...counts("failed:", report.errors),
    ...counts("not sent:", { overload: report.overloadCount, "sessions not begun": report.notStartedCount }),
    ["prompt tokens", String(report.promptTokens)],
    ["prompt tokens from cache", report.hitRate === undefined ? "-" : `${(100 * report.hitRate).toFixed(1)} %`],
    ["output tokens", String(report.outputTokens)],
    ["requests per second", report.requestsPerSecond.toFixed(2)],
    ["output tokens per second", report.outputTokensPerSecond.toFixed(0)],
    ...percentiles("TTFT", report.ttftMs),
    ...percentiles("ITL", report.itlMs),
    ...percentiles("request", report.latencyMs),
    ["sent late by p99", seconds(report.lateMs.p99)],
  ];
  return table(rows);
}

function without200({ 200: _ok, ...others }: Readonly<Record<string, number>>): Record<string, number> {
  return others;
}

function counts(label: string, counted: Readonly<Record<string, number>>): [string, string][] {
  return Object.entries(counted)
    .filter(([, count]) => count > 0)
    .map(([kind, count]) => [`${label} ${kind}`, String(count)]);
}

function percentiles(label: string, { count, mean, p50, p90, p99 }: Percentiles): [string, string][] {
  if (count === 0) return [[label, "-"]];
  const all = { mean, p50, p90, p99 };
  return Object.entries(all).map(([name, value]) => [`${label} ${name}`, seconds(value)]);
}

function seconds(ms: number): string {
  return ms < 1_000 ? `${ms.toFixed(1)} ms` : `${(ms / 1_000).toFixed(2)} s`;
}
