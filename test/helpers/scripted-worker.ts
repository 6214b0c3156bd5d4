import { createHash } from "node:crypto";
import { DynamoError } from "../../src/errors/index.ts";
import { byteArtifact, encodeArtifact, vocabularySizeOf } from "../../src/model/index.ts";
import {
  GENERATE_ENDPOINT,
  StepWriter,
  TOKENIZER_ENDPOINT,
  decodeRequest,
  forEachStepEntry,
  promptLengthOf,
  type ModelCard,
  type PreprocessedRequest,
  type TokenLogprob,
} from "../../src/protocol/index.ts";
import {
  formatEndpoint,
  newInstanceId,
  registerCard,
  registerInstance,
  type Planes,
} from "../../src/runtime/component/index.ts";
import type { ServerStream } from "../../src/runtime/request-plane/index.ts";
import { serveBytes } from "../../src/worker/serve-bytes.ts";

/**
 * A worker that does what a test says: on the real planes, with bytes as tokens, but a script in place of the engine. For
 * breaks at exact points that a real engine cannot be brought to.
 */
export class ScriptedCall {
  readonly request: PreprocessedRequest;
  readonly stream: ServerStream;
  readonly cancelled = Promise.withResolvers<DynamoError>();
  readonly #flush: () => void;
  readonly #writer = new StepWriter();
  #hasFirst = false;

  constructor(request: PreprocessedRequest, stream: ServerStream, flush: () => void) {
    this.request = request;
    this.stream = stream;
    this.#flush = flush;
  }

  get resumedTokens(): number {
    return this.request.resumedTokens ?? 0;
  }

  /** One item with these tokens and, when asked for, a logprob record for each and those of the prompt. */
  tokens(ids: readonly number[], end?: "stop" | "length" | DynamoError): void {
    const { output, tokenIds } = this.request;
    this.#entry((writer) => {
      if (!this.#hasFirst) {
        this.#hasFirst = true;
        writer.first({ promptTokens: promptLengthOf(this.request), cachedTokens: 3, queueMs: 1, prefillMs: 2 });
        if (output.promptLogprobs) writer.promptLogprobs([...tokenIds.subarray(1)].map(logprobOf));
      }
      if (ids.length > 0) writer.tokens(ids);
      if (ids.length > 0 && output.topLogprobs >= 0) writer.logprobs(ids.map(logprobOf));
      if (end instanceof DynamoError) writer.error(end);
      else if (end !== undefined) writer.finish(end, 5);
    });
    if (end !== undefined) this.stream.end();
    this.#flush();
  }

  /** The stream ends, by the request plane's word. */
  end(error?: DynamoError): void {
    this.stream.end(error);
    this.#flush();
  }

  #entry(fill: (writer: StepWriter) => void): void {
    this.#writer.reset();
    this.#writer.beginEntry(1);
    fill(this.#writer);
    this.#writer.endEntry();
    const step = this.#writer.view();
    forEachStepEntry(step, (_id, start, end) => this.stream.write(step.subarray(start, end)));
  }
}

export interface ScriptedWorker {
  readonly instanceId: string;
  readonly address: string;
  readonly calls: ScriptedCall[];
  /** Out of discovery; what runs goes on. */
  unregister(): Promise<void>;
}

export const SCRIPTED_CONTEXT = 4_096;

export async function startScriptedWorker(
  planes: Planes,
  script: (call: ScriptedCall) => void,
  model = "scripted",
): Promise<ScriptedWorker> {
  const server = await planes.request.listen();
  const calls: ScriptedCall[] = [];
  const at = (endpoint: string): string => formatEndpoint({ namespace: "dynamo", component: "backend", endpoint });
  const artifact = byteArtifact();
  const bytes = encodeArtifact(artifact);
  server.serve(at(TOKENIZER_ENDPOINT), serveBytes(bytes));
  server.serve(at(GENERATE_ENDPOINT), (stream, payload) => {
    const call = new ScriptedCall(decodeRequest(payload), stream, () => server.flush());
    calls.push(call);
    setImmediate(() => script(call));
    return { onCancel: (error) => call.cancelled.resolve(error) };
  });
  const card: ModelCard = {
    version: 1,
    name: model,
    engine: "scripted",
    engineVersion: "1",
    contextLength: SCRIPTED_CONTEXT,
    blockSizeTokens: 16,
    totalBlocks: 1_024,
    maxSequences: 64,
    maxBatchedTokens: 4_096,
    dataParallelSize: 1,
    vocabularySize: vocabularySizeOf(artifact),
    tokenizerSha256: createHash("sha256").update(bytes).digest("hex"),
    tokenizerBytes: bytes.length,
    types: ["completions"],
    role: "agg",
    blockBytes: 0,
    modelFingerprint: "",
    created: 1,
  };
  const instanceId = newInstanceId();
  const instance = {
    namespace: "dynamo",
    component: "backend",
    endpoint: GENERATE_ENDPOINT,
    instanceId,
    address: server.address,
    pid: process.pid,
    host: "test",
    startedMs: 0,
  };
  const lease = await planes.discovery.openLease();
  await registerInstance(lease, instance);
  await registerCard(lease, instance, { ...card });
  return { instanceId, address: server.address, calls, unregister: () => lease.close() };
}

/** Another one for each token, so that a record that is lost or doubled shows. */
export function logprobOf(id: number): TokenLogprob {
  return { logprob: -id / 256, topIds: [id, (id + 1) % 256], topLogprobs: [-id / 256, -1 - id / 256] };
}
