import { DynamoError } from "../errors/index.ts";
import { EngineOutput, GREEDY, decodeEngineOutput, encodeRequest } from "../protocol/index.ts";
import type { RequestPlaneClient } from "../runtime/request-plane/index.ts";

export interface CanaryOptions {
  readonly address: string;
  readonly endpoint: string;
  readonly model: string;
  /** Tokens of the probe; any that the engine knows. */
  readonly tokenIds: Uint32Array;
  readonly timeoutMs: number;
}

/**
 * Asks a worker for one token over its own request plane, as a frontend would. Resolves when a whole answer came back;
 * rejects with what went wrong. A model is listed only after this.
 */
export function runCanary(client: RequestPlaneClient, options: CanaryOptions): Promise<void> {
  const payload = encodeRequest({
    requestId: "canary",
    model: options.model,
    tokenIds: options.tokenIds,
    sampling: GREEDY,
    stop: { maxTokens: 1, minTokens: 0, stopTokenIds: [], ignoreEos: true },
    output: { topLogprobs: -1, promptLogprobs: false },
    priority: 0,
    cacheNamespace: "",
  });
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const output = new EngineOutput();
  let tokenCount = 0;
  let failure: DynamoError | undefined;
  client.open(
    options.address,
    payload,
    {
      endpoint: options.endpoint,
      requestId: "canary",
      traceparent: "",
      timeoutMs: options.timeoutMs,
      autoCredit: true,
    },
    {
      onItem(bytes, start, end) {
        decodeEngineOutput(bytes, start, end, output);
        tokenCount += output.tokenCount;
        failure ??= output.error;
      },
      onTurnEnd: () => undefined,
      onEnd(end) {
        const error = end ?? failure;
        if (error !== undefined) reject(error);
        else if (tokenCount !== 1)
          reject(new DynamoError("engine-failed", `the canary expected 1 token, got ${tokenCount}`));
        else resolve();
      },
    },
  );
  return promise;
}
