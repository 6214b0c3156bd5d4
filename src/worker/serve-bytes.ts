import { decodeByteRange } from "../protocol/index.ts";
import type { EndpointHandler } from "../runtime/request-plane/index.ts";

/**
 * Serves a fixed byte string, the tokenizer artifact, one range per request: frontends need no access to the worker's
 * files, and a range never exceeds a stream's credit window, so nothing is buffered for slow ones.
 */
export function serveBytes(bytes: Uint8Array): EndpointHandler {
  return (stream, payload) => {
    const { offset, length } = decodeByteRange(payload);
    if (offset < bytes.length) stream.write(bytes.subarray(offset, Math.min(bytes.length, offset + length)));
    stream.end();
    return { onCancel: () => undefined };
  };
}
