import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { environmentPage } from "./environment-page.ts";
import { OPTION_NAMES, specOf } from "./options.ts";

const PATH = join(import.meta.dirname, "..", "..", "docs", "environment.md");

/** The formatter pads the columns of tables; that is no difference. */
function unpadded(text: string): string {
  return text
    .replaceAll(/[ \t]+/g, " ")
    .replaceAll(/-{3,}/g, "---")
    .trim();
}

test("docs/environment.md says what the option table says (DYN_UPDATE_DOCS=1 writes it)", () => {
  if (process.env.DYN_UPDATE_DOCS === "1") writeFileSync(PATH, environmentPage());
  assert.equal(unpadded(readFileSync(PATH, "utf8")), unpadded(environmentPage()));
});

test("options: every one has a DYN_ variable of its own, and its default lies within its bounds", () => {
  const variables = new Set<string>();
  const flags = new Set<string>();
  for (const name of OPTION_NAMES) {
    const spec = specOf(name);
    for (const variable of [spec.env, ...(spec.also ?? []).flatMap(({ env }) => env ?? [])]) {
      assert.match(variable, /^DYN_[A-Z0-9_]+$/);
      assert.equal(variables.has(variable), false, variable);
      variables.add(variable);
    }
    for (const flag of [name, ...(spec.also ?? []).map((other) => other.flag)]) {
      assert.match(flag, /^[a-z][a-z0-9-]*$/);
      assert.equal(flags.has(flag), false, flag);
      flags.add(flag);
    }
    if (spec.type === "choice") assert.ok(spec.choices.includes(spec.default), name);
    if (spec.type === "integer" || spec.type === "number") {
      assert.ok(spec.default === undefined || (spec.default >= spec.min && spec.default <= spec.max), name);
    }
    assert.match(spec.help, /^[A-Za-z0-9].*\.$/, name);
  }
});
