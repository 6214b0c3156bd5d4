import { DynamoError } from "../../errors/index.ts";
import type { KvEndpoints } from "./kv-feed.ts";

/** Command lines of engines, as far as a worker has to read back what its user wrote there. */

/** `--flag value`, `--flag=value`, with underscores too; the last one counts. */
export function flagValue(args: readonly string[], flag: string): string | undefined {
  let found: string | undefined;
  for (const [i, word] of args.entries()) {
    const [name, value] = splitFlag(word);
    if (name === flag) found = value ?? args[i + 1];
  }
  return found;
}

export function hasFlag(args: readonly string[], flag: string): boolean {
  return args.some((word) => splitFlag(word)[0] === flag);
}

/** Undefined where there is none, or no JSON object: whoever needs it says so. */
export function flagJson(args: readonly string[], flag: string): Record<string, unknown> | undefined {
  const text = flagValue(args, flag);
  if (text === undefined) return undefined;
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}

function splitFlag(word: string): [name: string, value: string | undefined] {
  const at = word.indexOf("=");
  const name = at === -1 ? word : word.slice(0, at);
  return [name.startsWith("--") ? `--${name.slice(2).replaceAll("_", "-")}` : name, at === -1 ? undefined : word.slice(at + 1)];
} // prettier-ignore

/**
 * Where a server with that `--kv-events-config` publishes, as seen from here. It binds addresses with a `*` and paths, and
 * connects to all others. Undefined when it publishes nothing. Throws `invalid-config`.
 */
export function kvEndpointsOf(json: string, host: string): KvEndpoints | undefined {
  let config: Record<string, unknown>;
  try {
    config = JSON.parse(json) as Record<string, unknown>;
    if (typeof config !== "object" || config === null) throw new Error("no object");
  } catch (cause) {
    throw new DynamoError("invalid-config", `--kv-events-config: expected a JSON object, got ${json}`, { cause });
  }
  if (config["enable_kv_cache_events"] === false || config["publisher"] === "null") return undefined;
  const endpoint = typeof config["endpoint"] === "string" ? config["endpoint"] : "tcp://*:5557";
  const replay = config["replay_endpoint"];
  const isBoundThere = endpoint.includes("*") || endpoint.includes("::") || /^(?:ipc|inproc):/.test(endpoint);
  return {
    endpoint: reachable(endpoint, host),
    direction: isBoundThere ? "connect" : "bind",
    ...(typeof replay === "string" ? { replayEndpoint: reachable(replay, host) } : {}),
    ...(typeof config["topic"] === "string" && config["topic"] !== "" ? { topic: config["topic"] } : {}),
  };
}

function reachable(endpoint: string, host: string): string {
  return endpoint.replace(/^tcp:\/\/(?:\*|0\.0\.0\.0|\[::\]|::)(?=:\d+$)/, `tcp://${host.includes(":") ? `[${host}]` : host}`);
} // prettier-ignore

/** As this machine reaches it: any address means loopback. */
export function reachableHost(host: string | undefined): string {
  if (host === undefined || host === "0.0.0.0") return "127.0.0.1";
  if (host === "::") return "[::1]";
  return host.includes(":") ? `[${host}]` : host;
}
