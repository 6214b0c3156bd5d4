import { DynamoError } from "../../errors/index.ts";

/** Bounds on one text; both are far above any context that is served, and keep the encoder's memory bounded. */
export const ENCODE_LIMITS = {
  /** A request body is at most 16 MiB, and a unit takes at least a byte of it. */
  textUnits: 16 * 1024 * 1024,
  /**
   * One run without a place to cut, such as a million equal letters; merging takes 40 bytes of memory per byte, and
   * the longest step of `encodeSliced` is proportional to it (15 ms). Models
   * without merges have no such limit.
   */
  pieceBytes: 1024 * 1024,
} as const;

export function checkTextUnits(text: string): void {
  if (text.length <= ENCODE_LIMITS.textUnits) return;
  throw new DynamoError(
    "invalid-field",
    `prompt: expected at most ${ENCODE_LIMITS.textUnits} characters, got ${text.length}`,
    { param: "prompt" },
  );
}
