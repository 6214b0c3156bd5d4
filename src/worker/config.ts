import type { EngineConfig } from "../engines/index.ts";
import type { WorkerRole } from "../protocol/index.ts";
import type { HandoffConfig } from "./handoffs.ts";
import type { KvTiersConfig } from "./tiers/index.ts";

export type { EchoEngineConfig, EngineConfig, LlamaEngineConfig } from "../engines/index.ts";

/** What a worker needs to know; `cli/` fills it from flags, environment and file. */
export interface WorkerConfig {
  readonly namespace: string;
  /** @default "backend" */
  readonly component: string;
  readonly engine: EngineConfig;
  /** The name clients use. */
  readonly modelName: string;
  /** A Jinja file used instead of the model's own chat template. */
  readonly chatTemplatePath?: string;
  /** Streams the engine has at once. @default its sequences, of all ranks */
  readonly maxEngineRequests?: number;
  /** Streams that may wait beyond those, before the worker answers `worker-full`. */
  readonly maxQueuedRequests: number;
  readonly drainTimeoutMs: number;
  /** @default "agg" */
  readonly role?: WorkerRole;
  /** Of workers that have, or may be turned to, the role `prefill` or `decode`. @default DEFAULT_HANDOFF */
  readonly handoff?: HandoffConfig;
  /** Work but no engine step for so long: the worker fails. 0 = it waits for ever. @default 60000 */
  readonly engineStallMs?: number;
  /** An engine without work for so long is asked for a token. @default 60000 */
  readonly idleCanaryMs?: number;
  /** Undefined = the engine's own cache alone. */
  readonly kvTiers?: KvTiersConfig;
  /** Where `/health`, `/live` and `/metrics` of this worker are served on loopback; 0 = any free port, undefined = nowhere. */
  readonly systemPort: number | undefined;
}
