import { DynamoError } from "../errors/index.ts";

const UNITS: Readonly<Record<string, number>> = {
  "": 1e9,
  kb: 1e3,
  mb: 1e6,
  gb: 1e9,
  tb: 1e12,
  kib: 2 ** 10,
  mib: 2 ** 20,
  gib: 2 ** 30,
  tib: 2 ** 40,
};

/** `1GB`, `512 MiB`; a number alone is in GB, as in Dynamo's `DYN_KVBM_..._GB`. Throws `invalid-config`. */
export function parseByteSize(text: string, flag: string): number {
  const [, number, unit] = /^\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*$/i.exec(text) ?? [];
  const factor = UNITS[(unit ?? "?").toLowerCase()];
  const bytes = factor === undefined ? NaN : Math.floor(Number(number) * factor);
  if (Number.isSafeInteger(bytes)) return bytes;
  throw new DynamoError(
    "invalid-config",
    `--${flag}: expected a size such as 512MB or 4GB, got ${JSON.stringify(text)}`,
  );
}
