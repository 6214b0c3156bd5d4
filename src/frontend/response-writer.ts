import type { DynamoError } from "../errors/index.ts";
import type { Usage } from "../protocol/openai/index.ts";

/** One token with its logprob, as text and bytes, for the `logprobs` part of an answer. */
export interface LogprobEntry {
  readonly token: string;
  readonly bytes: readonly number[];
  readonly logprob: number;
  readonly top: readonly { readonly token: string; readonly bytes: readonly number[]; readonly logprob: number }[];
}

/**
 * Where the pipeline puts an answer: one implementation per API family and per mode (streamed, whole). Choices are
 * numbered prompt index x n + choice. The pipeline calls `delta` any number of times per loop turn, then `flush` once:
 * a streaming writer makes one socket write there. Exactly one of `complete` and `fail` ends it.
 */
export interface ResponseWriter {
  /** Text that is safe to show, may be empty when only logprobs came. `logprobs` only if they were asked for. */
  delta(choice: number, text: string, logprobs: readonly LogprobEntry[] | undefined): void;
  finish(choice: number, reason: "stop" | "length"): void;
  /** Sends what was collected. Streaming writers send headers with the first flush. */
  flush(): void;
  complete(usage: Usage): void;
  /** Before the headers: a status and a JSON body. After them: an error frame, then the end of the stream. */
  fail(error: DynamoError): void;
  /** Bytes handed over but not yet taken by the client's socket. */
  readonly bufferedBytes: number;
  /** Called when `bufferedBytes` fell to 0 after it had been above 0. */
  onDrained: (() => void) | undefined;
}
