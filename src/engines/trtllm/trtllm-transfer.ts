import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { TransferTicket } from "../base.ts";
import type { DialectCall, TransferDialect } from "../foreign/index.ts";
import { trtllmCall, type TrtllmFacts } from "./trtllm-request.ts";

/**
 * TensorRT-LLM's context and generation servers, one after the other: the first is asked with `context_only` and says in
 * `disaggregated_params` what the second has to be told. That is carried as the text it was: it has numbers of 64 bits, and is
 * nobody's business but the two servers'. The generation server says the first token too.
 */
export class TrtllmTransfer implements TransferDialect {
  readonly connector = "trtllm";
  readonly roles: readonly ("prefill" | "decode")[];
  /** `cache_transceiver_config.kv_transfer_timeout_ms` is 60 s; less some for our own way. */
  readonly leaseMs = 58_000;

  constructor(role: "prefill" | "decode") {
    this.roles = [role];
  }

  takesFirstToken(): boolean {
    return false;
  }

  prefillCall(request: PreprocessedRequest, facts: TrtllmFacts): DialectCall {
    return trtllmCall(request, facts, { disaggregated_params: { request_type: "context_only" } }, false);
  }

  decodeCall(request: PreprocessedRequest, facts: TrtllmFacts, { parameters }: TransferTicket): DialectCall {
    const { json } = parameters;
    if (typeof json !== "string") throw new DynamoError("handoff-gone", "a prefill worker said nothing of TensorRT-LLM's");
    const params = json.replace(/"request_type"\s*:\s*"[a-z_]*"/, '"request_type":"generation_only"');
    const call = trtllmCall(request, facts);
    return { ...call, body: `{"disaggregated_params":${params},${call.body.slice(1)}` };
  }
} // prettier-ignore

/** The object behind that name in a JSON text, as it stands there; undefined where there is none, or null. */
export function rawObject(text: string, name: string): string | undefined {
  const found = new RegExp(`"${name}"\\s*:\\s*(?=\\{)`).exec(text);
  if (found === null) return undefined;
  const start = found.index + found[0].length;
  let depth = 0;
  for (let i = start; i < text.length; i++) {
    const char = text[i];
    if (char === '"') i = endOfString(text, i);
    else if (char === "{") depth++;
    else if (char === "}" && --depth === 0) return text.slice(start, i + 1);
  }
  return undefined;
}

function endOfString(text: string, from: number): number {
  for (let i = from + 1; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === '"') return i;
  }
  return text.length;
}
