import { DynamoError } from "../../errors/index.ts";
import type { OpenOptions, RequestPlaneClient } from "./base.ts";

/** Far more than any answer that is one thing; a stream is for the others. */
const MAX_ANSWER_BYTES = 1024 * 1024;

/** One question, one answer: its items as one Buffer. Rejects with how the stream ended, at the latest after `timeoutMs`. */
export function ask(
  client: RequestPlaneClient,
  address: string,
  payload: Uint8Array,
  options: Omit<OpenOptions, "autoCredit" | "windowBytes">,
): Promise<Buffer> {
  const { promise, resolve, reject } = Promise.withResolvers<Buffer>();
  const items: Buffer[] = [];
  let byteCount = 0;
  const stream = client.open(
    address,
    payload,
    { ...options, autoCredit: true },
    {
      onItem(bytes, start, end) {
        byteCount += end - start;
        if (byteCount <= MAX_ANSWER_BYTES) items.push(Buffer.from(bytes.subarray(start, end)));
        else stream.cancel(new DynamoError("malformed-frame", `an answer of more than ${MAX_ANSWER_BYTES} bytes`));
      },
      onTurnEnd: () => undefined,
      onEnd: (end) => (end === undefined ? resolve(Buffer.concat(items)) : reject(end)),
    },
  );
  return promise;
}
