import { createHash } from "node:crypto";
import { DynamoError } from "../errors/index.ts";
import { BYTE_RANGE_MAX, encodeByteRange } from "../protocol/index.ts";
import type { RequestPlaneClient } from "../runtime/request-plane/index.ts";

export interface FetchArtifactOptions {
  readonly address: string;
  /** `namespace.component.tokenizer` */
  readonly endpoint: string;
  readonly bytes: number;
  readonly sha256: string;
  readonly timeoutMs: number;
}

/** 256 MiB: ten times the largest tokenizer in use. */
const MAX_ARTIFACT_BYTES = 256 * 1024 * 1024;
/** Ranges asked for at once: enough to keep a connection busy. */
const PARALLEL = 8;

/** Gets a worker's tokenizer artifact over the request plane and checks its checksum. Rejects with what failed. */
export async function fetchArtifact(client: RequestPlaneClient, options: FetchArtifactOptions): Promise<Buffer> {
  if (options.bytes > MAX_ARTIFACT_BYTES) {
    throw new DynamoError(
      "model-file-invalid",
      `the tokenizer of ${options.bytes} bytes is over the limit of ${MAX_ARTIFACT_BYTES}`,
    );
  }
  const whole = Buffer.alloc(options.bytes);
  let next = 0;
  const fetchRanges = async (): Promise<void> => {
    while (next < options.bytes) {
      const offset = next;
      next += BYTE_RANGE_MAX;
      await fetchRange(client, options, whole, offset);
    }
  };
  await Promise.all(Array.from({ length: PARALLEL }, fetchRanges));
  const sha256 = createHash("sha256").update(whole).digest("hex");
  if (sha256 !== options.sha256) {
    throw new DynamoError(
      "model-file-invalid",
      "the tokenizer sent by the worker does not have the checksum of its model card",
      {
        diagnostic: `expected ${options.sha256}, got ${sha256} from ${options.address}`,
      },
    );
  }
  return whole;
}

function fetchRange(
  client: RequestPlaneClient,
  options: FetchArtifactOptions,
  into: Buffer,
  offset: number,
): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const length = Math.min(BYTE_RANGE_MAX, options.bytes - offset);
  let received = 0;
  client.open(
    options.address,
    encodeByteRange(offset, length),
    {
      endpoint: options.endpoint,
      requestId: "tokenizer",
      traceparent: "",
      timeoutMs: options.timeoutMs,
      autoCredit: true,
    },
    {
      onItem(bytes, start, end) {
        if (received + end - start <= length) into.set(bytes.subarray(start, end), offset + received);
        received += end - start;
      },
      onTurnEnd: () => undefined,
      onEnd(end) {
        if (end !== undefined) reject(end);
        else if (received !== length) {
          reject(new DynamoError("malformed-frame", `the worker sent ${received} of ${length} tokenizer bytes`));
        } else resolve();
      },
    },
  );
  return promise;
}
