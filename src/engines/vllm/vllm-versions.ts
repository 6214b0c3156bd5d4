import { DynamoError } from "../../errors/index.ts";
import { isBefore, parseVersion } from "../foreign/index.ts";

/**
 * What a version of vLLM can do, where it does not say so itself. `docs/engines/vllm.md` shows this table with how each cell
 * was tested.
 */
export interface VllmVersion {
  readonly text: string;
  readonly major: number;
  readonly minor: number;
}

/** First with token ids in the answers of `/v1/completions` (`return_token_ids`): without them nothing is exact. */
const OLDEST = { major: 0, minor: 11 };
/** First whose `/inference/v1/generate` streams. */
const GENERATE_STREAMS = { major: 0, minor: 20 };

/** Undefined for a build without a number of the usual kind, such as `dev`: it is taken for a new one. */
export function parseVllmVersion(text: string): VllmVersion | undefined {
  const version = parseVersion(text);
  return version === undefined ? undefined : { text, ...version };
}

/** Throws `invalid-config`. */
export function checkVllmVersion(text: string): VllmVersion | undefined {
  const version = parseVllmVersion(text);
  if (version !== undefined && isBefore(version, OLDEST)) {
    throw new DynamoError(
      "invalid-config",
      `vLLM ${text} is too old: ${OLDEST.major}.${OLDEST.minor} is the first that says its answers in token ids; install a newer one`,
    );
  }
  return version;
}

export function generateStreams(version: VllmVersion | undefined): boolean {
  return version === undefined || !isBefore(version, GENERATE_STREAMS);
}
