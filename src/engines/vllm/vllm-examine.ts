import { createServer } from "node:net";
import { toDynamoError } from "../../errors/index.ts";
import { silentLogger } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import type { VllmEngineConfig } from "../config.ts";
import {
  EngineHttp,
  ZmqKvFeed,
  kvEndpointsOf,
  knownBad,
  memoryNeed,
  parseEngineUrl,
  type Situation,
} from "../foreign/index.ts";
import { findInstalledVllm, hasNixl, type InstalledVllm } from "./vllm-installed.ts";
import { readVllmArgs, vllmLaunchPlan } from "./vllm-launch.ts";
import { situationOfLaunch, situationOfRunning } from "./vllm-known-bad.ts";
import { probeVllm, type VllmFacts } from "./vllm-probe.ts";
import { checkVllmVersion } from "./vllm-versions.ts";

/**
 * What could keep a worker with this configuration from working, found out without starting anything: the command and its
 * version, memory, ports, NIXL where a split is wanted; of a server that runs already what it says of itself, whether the
 * tokenizers agree and its KV events come. And all of `known-bad.ts`.
 */
export interface VllmFinding {
  readonly check: string;
  readonly result: "ok" | "warn" | "fail";
  readonly detail: string;
  /** What to do; always there unless ok. */
  readonly fix?: string;
}

export interface VllmExamination {
  readonly config: VllmEngineConfig;
  readonly env: NodeJS.ProcessEnv;
  readonly clock: Clock;
  /** The worker is one of a prefill and decode pair. */
  readonly isSplit: boolean;
}

export async function examineVllm(examination: VllmExamination): Promise<VllmFinding[]> {
  return examination.config.launch === undefined ? examineRunning(examination) : examineLaunch(examination);
}

// ---- One that a worker would start ----

async function examineLaunch({ config, env, isSplit }: VllmExamination): Promise<VllmFinding[]> {
  const launch = config.launch!;
  const installed = findInstalledVllm(launch.command[0]!, env);
  const findings = [commandFinding(launch.command[0]!, installed)];
  const args = attempt(() => readVllmArgs(launch.args));
  if (typeof args === "string") return [...findings, fail("flags", args, "take what is wrong out of the engine's flags")];
  const wanted = args.port ?? launch.port;
  findings.push(await portFinding(wanted, args.port === undefined ? "--engine-port" : "--port"));
  // Ports that the worker would choose for itself do not matter here.
  const plan = vllmLaunchPlan(config, args, { http: wanted, events: 1, replay: 2 } as Parameters<typeof vllmLaunchPlan>[2], env, "doctor");
  if (isSplit && installed !== undefined && flagOf(plan.command.args).includes("Nixl")) findings.push(nixlFinding(installed));
  const situation = await situationOfLaunch(config, plan.command);
  return [...findings, memoryFinding(situation), ...knownBadFindings(situation, config)];
} // prettier-ignore

function flagOf(args: readonly string[]): string {
  return args.find((word) => word.includes("kv_connector")) ?? "";
}

function attempt<T>(make: () => T): T | string {
  try {
    return make();
  } catch (thrown) {
    return toDynamoError(thrown).publicMessage;
  }
}

function commandFinding(command: string, installed: InstalledVllm | undefined): VllmFinding {
  if (installed === undefined) {
    return fail("command", `there is no program ${command}`, "install vLLM, or say where it is with --engine-command");
  }
  const { path, version } = installed;
  if (version === undefined) {
    return warn("command", `${path}, version not known: it is no script of a Python environment`, "none is needed if it starts a vLLM server; its version is asked for when it runs");
  }
  const problem = attempt(() => checkVllmVersion(version));
  if (typeof problem === "string") return fail("command", problem, "install a newer vLLM");
  return ok("command", `${path}, vLLM ${version}`);
} // prettier-ignore

async function portFinding(port: number, flag: string): Promise<VllmFinding> {
  if (port === 0) return ok("ports", "any free ones");
  const server = createServer();
  const { promise, resolve } = Promise.withResolvers<string | undefined>();
  server.once("error", (error) => resolve((error as { code?: string }).code ?? error.message));
  server.listen({ host: "127.0.0.1", port, exclusive: true }, () => resolve(undefined));
  const problem = await promise;
  await new Promise<void>((done) => server.close(() => done()));
  if (problem === undefined) return ok("ports", `${port} on 127.0.0.1 is free`);
  return fail("ports", `${flag}: port ${port} on 127.0.0.1 cannot be had (${problem})`, `choose another with ${flag}, or leave it out`);
} // prettier-ignore

function nixlFinding(installed: InstalledVllm): VllmFinding {
  const there = hasNixl(installed);
  if (there === true) return ok("nixl", "installed beside vLLM");
  if (there === undefined) return warn("nixl", "not known whether the engine's Python has it", "pip install nixl there, if it has not"); // prettier-ignore
  return fail("nixl", `not installed in ${installed.sitePackages}, and the KV blocks of a split move over it`, "pip install nixl in vLLM's environment, or leave --disaggregation-mode out"); // prettier-ignore
}

function memoryFinding(situation: Situation): VllmFinding {
  const need = memoryNeed(situation);
  if (need === undefined) return warn("memory", "not known what the model needs: no safetensors files in its folder", "give the folder with the weights as --model"); // prettier-ignore
  const { weightBytes, runtimeBytes, kvBytesOfOne, contextTokens, availableBytes } = need;
  const kv = kvBytesOfOne === 0 ? "KV not known" : `KV ${gb(kvBytesOfOne)} for one sequence of ${contextTokens} tokens`;
  const where = situation.machine.gpus.length === 0 ? "free memory" : "free on each GPU";
  const detail = `weights ${gb(weightBytes)}, runtime about ${gb(runtimeBytes)}, ${kv}; ${gb(availableBytes)} ${where}`;
  const isEnough = weightBytes + runtimeBytes + kvBytesOfOne <= availableBytes;
  return isEnough ? ok("memory", detail) : warn("memory", detail, "see the known-bad combination of that name");
}

function gb(bytes: number): string {
  return bytes < 1e8 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

// ---- One that runs already ----

async function examineRunning(examination: VllmExamination): Promise<VllmFinding[]> {
  const { config } = examination;
  const url = config.url!;
  const http = new EngineHttp({ url, ...(config.apiKey === undefined ? {} : { apiKey: config.apiKey }) });
  try {
    const facts = await factsOf(http, config);
    if (typeof facts === "string") return [fail("server", facts, "start it, or give its address as --engine-url; the text says more")]; // prettier-ignore
    const { engineVersion: version, blockSizeTokens, hasPrefixCache } = facts;
    const situation = await situationOfRunning(config, { version, blockSizeTokens, hasPrefixCache });
    return [
      ok("server", `${url}: vLLM ${version}, ${facts.servedModel}, ${facts.totalBlocks} KV blocks of ${blockSizeTokens} tokens, context ${facts.contextLength}`),
      ...facts.notes.slice(1).map((note) => warn("server", note, "start the server with that flag")),
      ok("tokenizer", `the same tokens here and there for ${config.tokenizerSamples?.length ?? 0} texts`),
      await eventsFinding(examination, facts),
      ...knownBadFindings(situation, config),
    ];
  } finally {
    await http.close();
  }
} // prettier-ignore

const PROBE_MS = 60_000;

async function factsOf(http: EngineHttp, config: VllmEngineConfig): Promise<VllmFacts | string> {
  try {
    const { engineModel, maxSequences, maxBatchedTokens, blockSizeTokens, vocabularySize, tokenizerSamples } = config;
    const sizes = { maxSequences, maxBatchedTokens, blockSizeTokens, vocabularySize };
    return await probeVllm({ http, signal: AbortSignal.timeout(PROBE_MS), engineModel, ...sizes, tokenizerSamples });
  } catch (thrown) {
    const { publicMessage, diagnostic } = toDynamoError(thrown, "worker-unreachable");
    return publicMessage.includes(http.url) ? publicMessage : `nothing usable at ${http.url}: ${diagnostic ?? publicMessage}`; // prettier-ignore
  }
}

const EVENTS_MS = 8_000;

/** Connects as a worker would and asks for what is kept. */
async function eventsFinding({ config, clock }: VllmExamination, facts: VllmFacts): Promise<VllmFinding> {
  const { kvEventsConfig, url, kvEvents } = config;
  if (!kvEvents) return ok("kv events", "not wanted (--no-engine-kv-events): what is cached is guessed");
  const fix = "start the server with --kv-events-config, and give the same here";
  if (kvEventsConfig === undefined) return warn("kv events", "no --kv-events-config: what is cached will be guessed", fix);
  const { origin, socketPath } = parseEngineUrl(url!);
  const endpoints = kvEndpointsOf(kvEventsConfig, socketPath === undefined ? new URL(origin).hostname : "127.0.0.1");
  if (endpoints === undefined) return warn("kv events", "switched off in --kv-events-config: what is cached will be guessed", fix);
  const { blockSizeTokens, dataParallelSize, blockHashAlgorithm } = facts;
  const feed = new ZmqKvFeed(endpoints, { clock, logger: silentLogger });
  const deadlineMs = clock.monotonicMs() + EVENTS_MS;
  try {
    await feed.open({ blockSizeTokens, dataParallelSize, blockHashAlgorithm, onEvents: () => undefined });
    while (!feed.isWhole && clock.monotonicMs() < deadlineMs) await new Promise<void>((resolve) => clock.setTimer(POLL_MS, resolve));
    const addresses = `${endpoints.endpoint}${endpoints.replayEndpoint === undefined ? "" : `, ${endpoints.replayEndpoint}`}`;
    const check = "check the addresses in --kv-events-config, here and there, and what is between";
    if (!feed.isWhole) return fail("kv events", `${addresses}: nobody answered within ${EVENTS_MS / 1_000} s`, check);
    return heard(addresses, feed.describe() as unknown as FeedFacts);
  } catch (thrown) {
    const { publicMessage, diagnostic } = toDynamoError(thrown);
    return fail("kv events", `${endpoints.endpoint}: ${diagnostic ?? publicMessage}`, "give an address that this machine reaches, and that no other worker listens on");
  } finally {
    feed.close();
  }
} // prettier-ignore

const POLL_MS = 20;

interface FeedFacts {
  readonly block_hashes: { readonly state: string; readonly advice?: string };
  readonly ranks: readonly { readonly batches: number }[];
}

function heard(addresses: string, { block_hashes: hashes, ranks }: FeedFacts): VllmFinding {
  const batches = ranks.reduce((sum, rank) => sum + rank.batches, 0);
  const detail = `${addresses}: answers, ${batches} batches kept; ${HASH_WORDS[hashes.state] ?? hashes.state}`;
  return hashes.advice === undefined ? ok("kv events", detail) : warn("kv events", detail, hashes.advice);
}

const HASH_WORDS: Readonly<Record<string, string>> = {
  match: "block hashes as computed here",
  mismatch: "block hashes are not those computed here",
  unchecked: "no block hashes seen yet",
  "not-reproducible": "block hashes of an algorithm that is not computed here",
};

// ---- Both ----

function knownBadFindings(situation: Situation, config: VllmEngineConfig): VllmFinding[] {
  const found = knownBad(situation);
  if (found.length === 0) return [ok("known bad", "none of the combinations that are known not to work")];
  const accepted = new Set(config.acceptKnownBad);
  return found.map(({ id, effect, text, fix }) =>
    effect === "refuse" && !accepted.has(id) ? fail("known bad", `${id}: ${text}`, fix) : warn("known bad", `${id}: ${text}`, fix),
  );
} // prettier-ignore

function ok(check: string, detail: string): VllmFinding {
  return { check, result: "ok", detail };
}

function warn(check: string, detail: string, fix: string): VllmFinding {
  return { check, result: "warn", detail, fix };
}

function fail(check: string, detail: string, fix: string): VllmFinding {
  return { check, result: "fail", detail, fix };
}
