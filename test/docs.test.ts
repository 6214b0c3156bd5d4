import assert from "node:assert/strict";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { test } from "node:test";
import { KNOWN_BAD, versionRange } from "../src/engines/index.ts";
import { REASONS } from "../src/errors/index.ts";
import { METRICS } from "../src/observability/index.ts";

/** The lists in docs/ against the code, in both directions. `DYN_UPDATE_DOCS=1` rewrites the tables (format after it). */
const ROOT = resolve(import.meta.dirname, "..");

/** The rows of the page's table; rewritten first when asked for. */
function pageRows(path: string, expected: readonly string[]): string[] {
  if (process.env["DYN_UPDATE_DOCS"] === "1") {
    const lines = readFileSync(join(ROOT, path), "utf8").split("\n");
    const first = lines.findIndex((line) => line.startsWith("| `"));
    const kept = lines.filter((line, i) => i < first || !line.startsWith("| `"));
    writeFileSync(join(ROOT, path), kept.toSpliced(first, 0, ...expected).join("\n"));
  }
  return readFileSync(join(ROOT, path), "utf8")
    .split("\n")
    .filter((line) => line.startsWith("| `"))
    .map((line) =>
      `| ${line
        .split("|")
        .slice(1, -1)
        .map((cell) => cell.trim())
        .join(" | ")} |`.replaceAll("|  |", "| |"),
    );
}

test("docs: errors.md lists every reason with its class and when it happens", () => {
  const expected = Object.entries(REASONS).map(
    ([reason, entry]) => `| \`${reason}\` | ${entry.class} | ${entry.when} |`,
  );
  assert.deepEqual(pageRows("docs/errors.md", expected), expected);
});

test("docs: metrics.md lists every metric with its type, labels and help", () => {
  const expected = Object.entries(METRICS).map(([name, entry]) =>
    `| \`${name}\` | ${entry.type} | ${entry.labels.join(", ")} | ${entry.help} |`.replaceAll("|  |", "| |"),
  );
  assert.deepEqual(pageRows("docs/metrics.md", expected), expected);
});

test("docs: engines/known-bad.md lists every known-bad combination of engines", () => {
  const expected = KNOWN_BAD.map(
    ({ id, engine, versions, effect, what, why, fix }) =>
      `| \`${id}\` | ${engine} | ${versionRange(versions)} | ${effect} | ${what}: ${why} | ${fix} |`,
  );
  assert.deepEqual(pageRows("docs/engines/known-bad.md", expected), expected);
});

test("docs: every metric is used somewhere in the product", async () => {
  const { readdirSync } = await import("node:fs");
  const text = readdirSync(join(ROOT, "src"), { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".ts") && !file.endsWith("metric-names.ts") && !file.endsWith(".test.ts"))
    .map((file) => readFileSync(join(ROOT, "src", file), "utf8"))
    .join("\n");
  const unused = Object.keys(METRICS).filter((name) => !text.includes(name));
  assert.deepEqual(unused, []);
});

test("docs: every reason of the catalogue is used somewhere in the product", async () => {
  const { readdirSync } = await import("node:fs");
  const text = readdirSync(join(ROOT, "src"), { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".ts") && !file.endsWith("catalogue.ts") && !file.endsWith(".test.ts"))
    .map((file) => readFileSync(join(ROOT, "src", file), "utf8"))
    .join("\n");
  const unused = Object.keys(REASONS).filter((reason) => !text.includes(`"${reason}"`));
  assert.deepEqual(unused, []);
});

test("docs: every file and every symbol that walk.md names exists, and every arrow of the walk is there", () => {
  const page = readFileSync(join(ROOT, "docs/walk.md"), "utf8");
  const files = [...page.matchAll(/`((?:src|bin|test)\/[\w./-]+\.(?:ts|mjs))(?:#(\w+))?`/g)];
  assert.ok(files.length >= 12, "the walk names its files");
  for (const [, file, symbol] of files) {
    assert.ok(existsSync(join(ROOT, file!)), `${file} of docs/walk.md does not exist`);
    if (symbol === undefined) continue;
    assert.ok(new RegExp(`\\b${symbol}\\b`).test(readFileSync(join(ROOT, file!), "utf8")), `${file} has no ${symbol}`);
  }
  for (const reason of [...page.matchAll(/`reason:([\w-]+)`/g)].map((match) => match[1]!)) {
    assert.ok(Object.hasOwn(REASONS, reason), `walk.md names the unknown reason ${reason}`);
  }
  for (const metric of [...page.matchAll(/`(dynamo_\w+)`/g)].map((match) => match[1]!)) {
    assert.ok(Object.hasOwn(METRICS, metric), `walk.md names the unknown metric ${metric}`);
  }
});

test("docs: the steps of walk.md are the steps of the pipeline, in order", () => {
  const page = readFileSync(join(ROOT, "docs/walk.md"), "utf8");
  const steps = [...page.matchAll(/^## \d+\. (.+?) ·/gm)].map((match) => match[1]);
  const walk = ["src/frontend/pipeline.ts", "src/frontend/choice-stream.ts"].map((file) =>
    readFileSync(join(ROOT, file), "utf8"),
  );
  const marked = [...walk.join("\n").matchAll(/\/\/ Step \d+: ([\w +]+?)\.?$/gm)].map((match) => match[1]);
  assert.deepEqual(marked, steps);
});

test("docs: walk.md names the spans that the product makes, and no others", () => {
  const page = readFileSync(join(ROOT, "docs/walk.md"), "utf8");
  const named = new Set(
    [...page.matchAll(/spans? `([\w-]+)`/g), ...page.matchAll(/and `(handle_payload)`/g)].map((match) => match[1]!),
  );
  const files = ["frontend/pipeline", "frontend/generation-run", "frontend/choice-trace", "worker/serve-generate"];
  const text = files.map((file) => readFileSync(join(ROOT, `src/${file}.ts`), "utf8")).join("\n");
  const made = new Set([...text.matchAll(/\.(?:span|child)\("([\w-]+)"/g)].map((match) => match[1]!));
  assert.deepEqual([...named].toSorted(), [...made].toSorted());
});

test("docs: every test, metric and reason that faults.md names exists", () => {
  const page = readFileSync(join(ROOT, "docs/faults.md"), "utf8");
  const rows = page.split("\n").filter((line) => line.startsWith("| ") && !/^\| (?:fault|-+) /.test(line));
  assert.ok(rows.length >= 25, `${rows.length} faults`);
  for (const row of rows) {
    const tests = [
      ...row
        .split("|")
        .at(-2)!
        .matchAll(/`([^`]+)`/g),
    ].map((match) => match[1]!);
    assert.ok(tests.length > 0, `no test for: ${row}`);
    for (const file of tests) assert.ok(existsSync(join(ROOT, file)), `${file} of docs/faults.md does not exist`);
  }
  for (const [, metric] of page.matchAll(/`(dynamo_\w+)`/g)) {
    assert.ok(Object.hasOwn(METRICS, metric!), `faults.md names the unknown metric ${metric}`);
  }
  for (const [, reason] of page.matchAll(/`reason:([\w-]+)`/g)) {
    assert.ok(Object.hasOwn(REASONS, reason!), `faults.md names the unknown reason ${reason}`);
  }
});

test("docs: every link between pages of this repository leads somewhere", () => {
  const pages = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/walk.md",
    "docs/faults.md",
    "docs/errors.md",
    "docs/metrics.md",
    "docs/dependencies.md",
    "docs/environment.md",
    "benchmarks/README.md",
  ];
  for (const page of pages) {
    const text = readFileSync(join(ROOT, page), "utf8");
    for (const [, target] of text.matchAll(/\]\((?!https?:)([^)#]+)[^)]*\)/g)) {
      assert.ok(existsSync(resolve(ROOT, page, "..", target!)), `${page} links to ${target}, which does not exist`);
    }
  }
});
