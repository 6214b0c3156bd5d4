import { readFileSync } from "node:fs";
import { join } from "node:path";
import { DynamoError } from "../../errors/index.ts";
import { promptLengthOf, type PreprocessedRequest } from "../../protocol/index.ts";
import { parsePrometheus, sumOf, type DialectCall, type EngineFacts, type TransferDialect } from "../foreign/index.ts";
import type { TransferTicket } from "../base.ts";
import type { VllmFacts } from "./vllm-probe.ts";
import { vllmCall, type VllmLeg } from "./vllm-request.ts";

/**
 * vLLM's connectors for KV blocks, as its `--kv-transfer-config` names them. What is to be known of each: how it is asked,
 * how long a prefill server keeps blocks, and which prompts it must not get.
 */
export type VllmRole = "prefill" | "decode";

export interface VllmKvTransfer {
  /** vLLM's name of it. */
  readonly connector: string;
  /** `nixl-pull`, `nixl-push`, `example` */
  readonly kind: VllmConnectorKind;
  readonly roles: readonly VllmRole[];
  readonly leaseMs: number;
  /** For the command line. */
  readonly json: string;
}

export type VllmConnectorKind = "nixl-pull" | "nixl-push" | "example";

const KINDS: Readonly<Record<string, VllmConnectorKind>> = {
  NixlConnector: "nixl-pull",
  NixlPullConnector: "nixl-pull",
  NixlPushConnector: "nixl-push",
  ExampleConnector: "example",
  // Its name before December 2025.
  SharedStorageConnector: "example",
};
const KV_ROLES: Readonly<Record<string, readonly VllmRole[]>> = {
  kv_producer: ["prefill"],
  kv_consumer: ["decode"],
  kv_both: ["prefill", "decode"],
};
/** vLLM's `kv_lease_duration`. */
const LEASE_SECONDS = 30;
/** Between the engine's end of a prompt and our word of it. */
const LEASE_MARGIN_MS = 2_000;

export interface KvTransferOptions {
  readonly role: VllmRole;
  /** JSON as vLLM takes it, or only the connector's name. @default NixlConnector */
  readonly given: string | undefined;
  /** The server computes on a CPU: its blocks lie in host memory. */
  readonly isCpu: boolean;
}

/** Throws `invalid-config`, with the fix. */
export function readKvTransfer({ role, given = "NixlConnector", isCpu }: KvTransferOptions): VllmKvTransfer {
  const config: Record<string, unknown> = given.trimStart().startsWith("{")
    ? { kv_role: kvRoleOf(role), ...parse(given) }
    : ownConfig(given, role, isCpu);
  const connector = String(config["kv_connector"]);
  const kind = KINDS[connector];
  if (kind === undefined) {
    throw invalid(`expected one of ${Object.keys(KINDS).slice(0, 4).join(", ")} as kv_connector, got ${connector}`);
  }
  const kvRole = String(config["kv_role"]);
  const roles = KV_ROLES[kvRole];
  if (roles === undefined) throw invalid(`expected ${Object.keys(KV_ROLES).join(", ")} as kv_role, got ${kvRole}`);
  if (!roles.includes(role)) {
    throw invalid(`kv_role ${kvRole} is not for --disaggregation-mode ${role}; it takes ${kvRoleOf(role)}`);
  }
  const extra = (config["kv_connector_extra_config"] ?? {}) as Record<string, unknown>;
  if (kind === "example" && typeof extra["shared_storage_path"] !== "string") {
    throw invalid(
      'ExampleConnector needs a folder that both servers see: {"kv_connector":"ExampleConnector","kv_role":"kv_producer","kv_connector_extra_config":{"shared_storage_path":"/path"}}',
    );
  }
  return {
    connector,
    kind,
    roles,
    leaseMs: kind === "example" ? Infinity : leaseOf(extra["kv_lease_duration"]),
    json: JSON.stringify(config),
  };
}

function parse(given: string): Record<string, unknown> {
  try {
    return JSON.parse(given) as Record<string, unknown>;
  } catch (cause) {
    throw new DynamoError(
      "invalid-config",
      `--kv-transfer-config: expected a JSON object or the name of a connector, got ${given}`,
      { cause },
    );
  }
}

function ownConfig(connector: string, role: VllmRole, isCpu: boolean): Record<string, unknown> {
  return {
    kv_connector: connector,
    kv_role: kvRoleOf(role),
    // A failed transfer is told, and the worker has the prompt computed, which it counts.
    kv_load_failure_policy: "fail",
    ...(isCpu ? { kv_buffer_device: "cpu", kv_connector_extra_config: { num_threads: 1 } } : {}),
  };
}

function kvRoleOf(role: VllmRole): string {
  return role === "prefill" ? "kv_producer" : "kv_consumer";
}

function leaseOf(seconds: unknown): number {
  const known = seconds === undefined ? LEASE_SECONDS : seconds;
  if (typeof known !== "number" || !(known > 0)) {
    throw invalid(`expected a number of seconds as kv_lease_duration, got ${JSON.stringify(seconds)}`);
  }
  return Math.max(known * 500, known * 1_000 - LEASE_MARGIN_MS);
}

function invalid(what: string): DynamoError {
  return new DynamoError("invalid-config", `--kv-transfer-config: ${what}`);
}

/** Layers with a state in place of KV blocks (Mamba and its kin), by the model's configuration. */
function isRecurrent(modelPath: string): boolean {
  try {
    return /mamba|linear_attention|"ssm_|gated_delta/i.test(readFileSync(join(modelPath, "config.json"), "utf8"));
  } catch {
    // No model of ours to look at: an attached server's tokenizer alone.
    return false;
  }
}

const FOR_DECODE = { do_remote_decode: true, do_remote_prefill: false };
const FETCHED = new Set(["vllm:nixl_bytes_transferred_sum"]);

export class VllmTransfer implements TransferDialect {
  readonly connector: VllmConnectorKind;
  readonly roles: readonly VllmRole[];
  readonly leaseMs: number;

  readonly #isRecurrent: boolean;

  constructor({ kind, roles, leaseMs }: VllmKvTransfer, modelPath: string | undefined) {
    this.#isRecurrent = modelPath !== undefined && isRecurrent(modelPath);
    this.connector = kind;
    this.roles = roles;
    this.leaseMs = leaseMs;
  }

  /**
   * The decode server gets the prompt and the first token as one prompt. That is the same answer only where nothing hangs on
   * how many tokens it has generated itself: no random numbers, no penalties that leave the prompt out, no grammar.
   */
  takesFirstToken(request: PreprocessedRequest, facts: EngineFacts): boolean {
    // Of a recurrent model vLLM's prefill server computes a token less: what it samples is no first token.
    if (this.connector === "example" || this.#isRecurrent) return false;
    const { sampling, answerForm } = request;
    const { temperature, presencePenalty, frequencyPenalty } = sampling;
    const isPlain = temperature === 0 && presencePenalty === 0 && frequencyPenalty === 0 && answerForm === undefined;
    return isPlain && promptLengthOf(request) + 2 <= facts.contextLength;
  }

  /** A prompt of n blocks and a token ends the decode server when one that begins alike was stored before. */
  refusal(request: PreprocessedRequest, facts: EngineFacts): string | undefined {
    if (this.connector !== "example") return undefined;
    const isTrap = (promptLengthOf(request) - 1) % facts.blockSizeTokens === 0;
    return isTrap ? "ExampleConnector takes no prompt of whole blocks and one token" : undefined;
  }

  prefillCall(request: PreprocessedRequest, facts: VllmFacts, requestId: string): DialectCall {
    const isTokenUsed = this.takesFirstToken(request, facts);
    // Prompt and token must be in as many blocks there as here: at the end of a block the token's own is computed, too.
    const isAtBlockEnd = promptLengthOf(request) % facts.blockSizeTokens === 0;
    return this.#call(request, facts, {
      requestId,
      parameters: this.connector === "example" ? undefined : FOR_DECODE,
      prefillTokens: isTokenUsed && isAtBlockEnd ? 2 : 1,
      isTokenUsed,
    });
  }

  decodeCall(request: PreprocessedRequest, facts: VllmFacts, { parameters, requestId }: TransferTicket): DialectCall {
    return this.#call(request, facts, {
      requestId,
      parameters: this.connector === "example" ? undefined : parameters,
    });
  }

  #call(request: PreprocessedRequest, facts: VllmFacts, leg: VllmLeg): DialectCall {
    return vllmCall(request, facts, { route: facts.route, takesPriority: facts.takesPriority, leg });
  }

  fetchedBytes(metricsText: string): number | undefined {
    return sumOf(parsePrometheus(metricsText, FETCHED), "vllm:nixl_bytes_transferred_sum");
  }
}
