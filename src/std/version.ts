import { readFileSync } from "node:fs";
import { join } from "node:path";

let known: string | undefined;

/** The version of this package, from its package.json; read once, on first use. */
export function packageVersion(): string {
  if (known === undefined) {
    const text = readFileSync(join(import.meta.dirname, "..", "..", "package.json"), "utf8");
    known = (JSON.parse(text) as { version: string }).version;
  }
  return known;
}
