/** Command lines of engines, read back: `--flag value`, `--flag=value`, with underscores too; the last one counts. */
export function flagValue(args: readonly string[], flag: string): string | undefined {
  let found: string | undefined;
  for (const [i, word] of args.entries()) {
    const [name, value] = splitFlag(word);
    if (name === flag) found = value ?? args[i + 1];
  }
  return found;
}

export function hasFlag(args: readonly string[], flag: string): boolean {
  return args.some((word) => splitFlag(word)[0] === flag);
}

/** Undefined where there is none, or no JSON object: whoever needs it says so. */
export function flagJson(args: readonly string[], flag: string): Record<string, unknown> | undefined {
  const text = flagValue(args, flag);
  if (text === undefined) return undefined;
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}

function splitFlag(word: string): [name: string, value: string | undefined] {
  const at = word.indexOf("=");
  const name = at === -1 ? word : word.slice(0, at);
  return [name.startsWith("--") ? `--${name.slice(2).replaceAll("_", "-")}` : name, at === -1 ? undefined : word.slice(at + 1)];
} // prettier-ignore
