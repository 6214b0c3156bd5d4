import { DynamoError } from "../errors/index.ts";

/**
 * When and where traces go, from OpenTelemetry's variables and Dynamo's two: `OTEL_EXPORT_ENABLED` turns export on or off
 * (on by itself when an endpoint is set), `OTEL_TRACES_SAMPLE_RATIO` is the share of the traces that begin here; of those
 * that a caller began it decides. Headers, time-out and compression are read by the exporter itself
 * (`OTEL_EXPORTER_OTLP_HEADERS`, ...).
 */
export interface TraceSettings {
  /** The whole URL, such as `http://localhost:4318/v1/traces`. */
  readonly url: string;
  readonly serviceName: string;
  /** 0 to 1. */
  readonly sampleRatio: number;
}

const DEFAULT_ENDPOINT = "http://localhost:4318";

/** undefined: off. Throws `invalid-config` with one line per mistake. */
export function readTraceSettings(env: NodeJS.ProcessEnv, role: string): TraceSettings | undefined {
  const given = (name: string): string | undefined => (env[name] === "" ? undefined : env[name]?.trim());
  const mistakes: string[] = [];
  const enabled = readSwitch("OTEL_EXPORT_ENABLED", given("OTEL_EXPORT_ENABLED"), mistakes);
  const disabled = readSwitch("OTEL_SDK_DISABLED", given("OTEL_SDK_DISABLED"), mistakes);
  const traces = given("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
  const base = given("OTEL_EXPORTER_OTLP_ENDPOINT");
  const wanted = disabled !== true && (enabled ?? (traces !== undefined || base !== undefined));
  const protocol = given("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") ?? given("OTEL_EXPORTER_OTLP_PROTOCOL");
  if (wanted && protocol !== undefined && protocol !== "http/protobuf") {
    mistakes.push(`OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, got ${protocol}`);
  }
  const ratioText = given("OTEL_TRACES_SAMPLE_RATIO") ?? "1";
  const sampleRatio = Number(ratioText);
  if (!(ratioText !== "" && sampleRatio >= 0 && sampleRatio <= 1)) {
    mistakes.push(`OTEL_TRACES_SAMPLE_RATIO: expected a number from 0 to 1, got ${ratioText}`);
  }
  const url = traces ?? `${(base ?? DEFAULT_ENDPOINT).replace(/\/+$/, "")}/v1/traces`;
  if (wanted && !(URL.canParse(url) && /^https?:$/.test(new URL(url).protocol))) {
    const name = traces === undefined ? "OTEL_EXPORTER_OTLP_ENDPOINT" : "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    mistakes.push(`${name}: expected an http or https URL, got ${traces ?? base}`);
  }
  if (mistakes.length > 0) throw new DynamoError("invalid-config", mistakes.join("\n"));
  return wanted ? { url, serviceName: given("OTEL_SERVICE_NAME") ?? `dynamo-${role}`, sampleRatio } : undefined;
}

function readSwitch(name: string, text: string | undefined, mistakes: string[]): boolean | undefined {
  if (text === undefined) return undefined;
  if (["true", "1", "yes", "on"].includes(text.toLowerCase())) return true;
  if (!["false", "0", "no", "off"].includes(text.toLowerCase())) {
    mistakes.push(`${name}: expected true or false, got ${text}`);
  }
  return false;
}
