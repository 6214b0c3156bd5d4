export interface NixlOptions { readonly x?: 1 }
import type { AgentContext, TransferBackend } from "../backend.ts";
export class NixlBackend { static open(_c: AgentContext, _o: NixlOptions): Promise<TransferBackend> { return Promise.reject(new Error("x")); } }
