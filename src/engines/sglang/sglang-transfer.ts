import { createHash } from "node:crypto";
import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { TransferTicket } from "../base.ts";
import type { DialectCall, TransferDialect } from "../foreign/index.ts";
import { sglangCall, type SglangFacts } from "./sglang-request.ts";

/**
 * SGLang's prefill and decode servers: both get the same request, at once, with where they find each other (the prefill
 * server's bootstrap address) and under which number (the room). The decode server answers, from the first token on; the
 * prefill server's answer ends when the blocks have gone over. So the decode leg's ticket is there before anything is computed.
 */
export type SglangRole = "prefill" | "decode";

/** How long the two wait for each other (`SGLANG_DISAGGREGATION_WAITING_TIMEOUT`). */
const LEASE_MS = 300_000;
const BACKENDS = ["mooncake", "nixl", "ascend", "mori", "fake"];
/** SGLang's own. */
const DEFAULT_BACKEND = "mooncake";

/** As in `--disaggregation-transfer-backend`. Throws `invalid-config`. */
export function transferBackendOf(given = DEFAULT_BACKEND): string {
  if (BACKENDS.includes(given)) return given;
  throw new DynamoError(
    "invalid-config",
    `--kv-transfer-config: expected SGLang's name of a transfer backend (${BACKENDS.slice(0, 3).join(", ")}), got ${given}`,
  );
}

export class SglangTransfer implements TransferDialect {
  readonly connector: string;
  readonly roles: readonly SglangRole[];
  readonly leaseMs = LEASE_MS;
  /** Of this server, when it is one for prefill: known after the probe. */
  bootstrap: { readonly host: string; readonly port: number } | undefined;

  constructor(role: SglangRole, backend: string) {
    this.roles = [role];
    this.connector = `sglang-${backend}`;
  }

  /** The decode server says it too. */
  takesFirstToken(): boolean {
    return false;
  }

  prefillCall(request: PreprocessedRequest, facts: SglangFacts, requestId: string): DialectCall {
    return withBootstrap(sglangCall(request, facts), this.earlyParameters(request, requestId));
  }

  earlyParameters({ dpRank }: PreprocessedRequest, requestId: string): Readonly<Record<string, unknown>> {
    const { host, port } = this.bootstrap!;
    return { host, port, room: roomOf(requestId), ...(dpRank === undefined ? {} : { dpRank }) };
  }

  decodeCall(request: PreprocessedRequest, facts: SglangFacts, { parameters }: TransferTicket): DialectCall {
    const { dpRank } = parameters;
    return withBootstrap(
      sglangCall(request, facts, typeof dpRank === "number" ? { disagg_prefill_dp_rank: dpRank } : {}),
      parameters,
    );
  }
}

/** 63 bits, as text: JavaScript's numbers have 53. The same for both legs, another one for every attempt. */
function roomOf(requestId: string): string {
  return (createHash("sha256").update(requestId).digest().readBigUInt64BE(0) >> 1n).toString();
}

function withBootstrap(call: DialectCall, { host, port, room }: Readonly<Record<string, unknown>>): DialectCall {
  if (typeof host !== "string" || typeof port !== "number" || typeof room !== "string" || !/^\d{1,19}$/.test(room)) {
    throw new DynamoError("handoff-gone", "a prefill worker said no bootstrap address of SGLang's");
  }
  const triple = `"bootstrap_host":${JSON.stringify(host)},"bootstrap_port":${port},"bootstrap_room":${room}`;
  return { ...call, body: `{${triple},${call.body.slice(1)}` };
}

/**
 * The worker's own question whether its engine answers: a token of a server for one of the two, from SGLang's own address for
 * that, at which no blocks are fetched or waited for (`FAKE_BOOTSTRAP_HOST` in disaggregation/utils.py).
 */
export function canaryCall(request: PreprocessedRequest, facts: SglangFacts): DialectCall {
  return sglangCall(request, facts, { bootstrap_host: FAKE_BOOTSTRAP_HOST, bootstrap_room: 0 });
}

const FAKE_BOOTSTRAP_HOST = "2.2.2.2";

export function isCanary({ requestId, stop }: PreprocessedRequest): boolean {
  return requestId === "canary" && stop.maxTokens === 1;
}

/** A server that was started for one of the two cannot do a whole request. */
export function wholeRefusal(role: SglangRole): DynamoError {
  return new DynamoError(
    "transfer-no-path",
    `an SGLang server for ${role} (--disaggregation-mode ${role}) does no whole requests: each needs one for prefill and one for decode; serve with --disagg always`,
  );
}
