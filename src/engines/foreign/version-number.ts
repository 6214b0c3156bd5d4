/** Major and minor of versions such as `0.29.0`, `v0.11.2rc1` and `0.29.0+cpu`. */
export interface VersionNumber {
  readonly major: number;
  readonly minor: number;
}

/** Undefined for what has no number of the usual kind, such as `dev`. */
export function parseVersion(text: string): VersionNumber | undefined {
  const match = /^v?(\d+)\.(\d+)/.exec(text);
  return match === null ? undefined : { major: Number(match[1]), minor: Number(match[2]) };
}

export function isBefore(version: VersionNumber, limit: VersionNumber): boolean {
  return version.major < limit.major || (version.major === limit.major && version.minor < limit.minor);
}
