import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { VllmEngineConfig } from "../config.ts";
import {
  knownBad,
  machineFacts,
  modelFacts,
  type EngineCommand,
  type KnownBadFinding,
  type Situation,
} from "../foreign/index.ts";
import { findInstalledVllm } from "./vllm-installed.ts";

/** What is known of a server before it is started. */
export async function situationOfLaunch(config: VllmEngineConfig, command: EngineCommand): Promise<Situation> {
  const env = command.env ?? process.env;
  return {
    ...(await common(config, env)),
    version: findInstalledVllm(command.command, env)?.version,
    args: command.args,
    env,
  };
}

export interface RunningVllm {
  readonly version: string;
  readonly blockSizeTokens: number;
  readonly hasPrefixCache: boolean | undefined;
}

/** What is known of a server that runs already: what it was started with is what the worker was told. */
export async function situationOfRunning(config: VllmEngineConfig, running: RunningVllm): Promise<Situation> {
  const args = config.kvEventsConfig === undefined ? [] : ["--kv-events-config", config.kvEventsConfig];
  const { model, ...rest } = await common(config, process.env);
  return {
    ...rest,
    version: running.version,
    args,
    env: undefined,
    // It has its memory already.
    model: model === undefined ? undefined : { ...model, weightBytes: 0 },
    server: running,
  };
}

async function common(config: VllmEngineConfig, env: NodeJS.ProcessEnv) {
  return {
    engine: "vllm" as const,
    model: config.modelPath === undefined ? undefined : modelFacts(config.modelPath),
    machine: await machineFacts(env),
    wantsKvEvents: config.kvEvents,
    blockSizeTokens: config.blockSizeTokens,
  };
}

/** Warnings are logged; throws `invalid-config` with all that is refused, but for what the user accepts by its id. */
export function judgeVllm(situation: Situation, config: VllmEngineConfig, logger: Logger): void {
  const accepted = new Set(config.acceptKnownBad);
  const findings = knownBad(situation);
  const refused = findings.filter(({ id, effect }) => effect === "refuse" && !accepted.has(id));
  for (const finding of findings) if (!refused.includes(finding)) logger.warn({ known_bad: finding.id }, textOf(finding));
  if (refused.length === 0) return;
  const version = situation.version === undefined ? "vLLM" : `vLLM ${situation.version}`;
  throw new DynamoError(
    "invalid-config",
    refused.map((one) => `${version}: ${textOf(one)} (or, to try it all the same, --accept-known-bad ${one.id})`).join("\n"),
  );
} // prettier-ignore

function textOf({ text, fix }: KnownBadFinding): string {
  return `${text}; ${fix}`;
}
