import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { test } from "node:test";

/**
 * The architecture as data: which folder may import which (house rule: a folder is entered through its index.ts), and
 * which packages are imported where. Fails in a second and names the folder.
 */
const ROOT = resolve(import.meta.dirname, "..");
const BASE = ["std", "errors", "observability"];
const PLANES = ["runtime/discovery", "runtime/request-plane", "runtime/event-plane"];
const RUNTIME = ["runtime/component", ...PLANES];

const ALLOWED: Record<string, readonly string[]> = {
  std: [],
  errors: ["std"],
  observability: ["std", "errors"],
  tokens: ["std", "errors"],
  protocol: ["std", "errors", "tokens"],
  "runtime/component": [...BASE, ...PLANES],
  "runtime/discovery": BASE,
  "runtime/request-plane": BASE,
  "runtime/event-plane": BASE,
  transfer: BASE,
  model: [...BASE, "protocol"],
  "perf-model": BASE,
  kvbm: [...BASE, "tokens", "protocol", "transfer"],
  engines: [
    ...BASE,
    "tokens",
    "protocol",
    "engines/echo",
    "engines/llama",
    "engines/mocker",
    "engines/foreign",
    "engines/vllm",
    "engines/llama-server",
    "engines/openai",
    "engines/sglang",
    "engines/trtllm",
  ],
  "engines/foreign": [...BASE, "tokens", "protocol", "engines", "engine-events", "runtime/event-plane"],
  "engines/sglang": [...BASE, "tokens", "protocol", "engines", "engines/foreign"],
  "engines/trtllm": [...BASE, "tokens", "protocol", "engines", "engines/foreign"],
  "engines/vllm": [...BASE, "tokens", "protocol", "engines", "engines/foreign"],
  "engines/llama-server": [...BASE, "tokens", "protocol", "engines", "engines/foreign"],
  "engines/openai": [...BASE, "tokens", "protocol", "engines", "engines/foreign"],
  "engines/echo": [...BASE, "tokens", "protocol", "engines"],
  "engines/llama": [...BASE, "tokens", "protocol", "engines"],
  "engines/mocker": [...BASE, "tokens", "protocol", "perf-model", "engines"],
  replay: [...BASE, "tokens", "protocol", "perf-model", "router", "engines", "engines/mocker"],
  "engine-events": [...BASE, "tokens", "protocol", "runtime/event-plane"],
  worker: [...BASE, "tokens", "protocol", "model", "engines", "kvbm", "transfer", ...RUNTIME],
  router: [...BASE, "tokens", "protocol", ...RUNTIME],
  "router-service": [...BASE, "tokens", "protocol", "router", ...RUNTIME],
  frontend: [...BASE, "tokens", "protocol", "model", "router", "router-service", ...RUNTIME],
  bench: [...BASE, "protocol"],
  cli: ["*"],
};

/** Native, heavy or optional packages and the only folders that may name each. Prefix match. */
const PACKAGES: Record<string, readonly string[]> = {
  koffi: ["engines/llama", "transfer"],
  "@smithy/signature-v4": ["transfer"],
  "@node-llama-cpp/": ["engines/llama"],
  zeromq: ["runtime/event-plane"],
  "@huggingface/jinja": ["frontend"],
  "@huggingface/tokenizers": ["frontend"],
  "prom-client": ["observability"],
  "@opentelemetry/": ["observability"],
  pino: ["observability"],
  typebox: ["frontend"],
  yaml: ["cli"],
  undici: ["model", "transfer", "engines/foreign"],
};
/** Files that name a package to look for it, not to use it. */
const PACKAGE_EXCEPTIONS: Record<string, readonly string[]> = {};

const sources = readdirSync(join(ROOT, "src"), { recursive: true, encoding: "utf8" })
  .filter((file) => file.endsWith(".ts"))
  .map((file) => `src/${file.replaceAll("\\", "/")}`);

/** The longest known folder a file is in: `src/runtime/discovery/file.ts` -> `runtime/discovery`. */
function folderOf(file: string): string {
  const inside = relative("src", file).replaceAll("\\", "/");
  const known = Object.keys(ALLOWED).filter((folder) => inside.startsWith(`${folder}/`));
  return known.toSorted((a, b) => b.length - a.length)[0] ?? `(no folder for ${inside})`;
}

function isTestFile(file: string): boolean {
  return /\.(test|battery|fixture|bench)\.ts$|\/fixtures?\/|naive-|\/testing\.ts$/.test(file);
}

function importsOf(file: string): string[] {
  const text = readFileSync(join(ROOT, file), "utf8");
  const pattern =
    /(?:^|\n)\s*(?:import|export)\b[^;'"]*?from\s*["']([^"']+)["']|import\(\s*["']([^"']+)["']\s*\)|(?:^|\n)import\s+["']([^"']+)["']/g;
  return [...text.matchAll(pattern)].map((match) => (match[1] ?? match[2] ?? match[3])!);
}

test("tidy: every folder of src/ imports only what the layout allows, through index.ts", () => {
  const violations: string[] = [];
  for (const file of sources) {
    const from = folderOf(file);
    const allowed = ALLOWED[from];
    if (allowed === undefined) {
      violations.push(`${file}: ${from}; add the folder to ALLOWED`);
      continue;
    }
    for (const specifier of importsOf(file)) {
      if (!specifier.startsWith(".")) continue;
      const target = relative(ROOT, resolve(ROOT, dirname(file), specifier)).replaceAll("\\", "/");
      if (!target.startsWith("src/")) {
        if (!isTestFile(file)) violations.push(`${file}: imports ${target} outside src/`);
        continue;
      }
      const to = folderOf(target);
      if (to === from || isTestFile(file) || allowed.includes("*")) continue;
      if (!allowed.includes(to)) violations.push(`${file}: ${from}/ may not import ${to}/`);
      else if (!target.endsWith("/index.ts") && !isEngineDoor(from, target)) {
        violations.push(`${file}: enter ${to}/ through an index.ts, not ${target}`);
      }
    }
  }
  assert.deepEqual(violations, []);
});

/** The loader opens engines lazily by file, and engines take the contract itself: through index.ts both would be a cycle. */
function isEngineDoor(from: string, target: string): boolean {
  if (from === "engines") return true;
  return from.startsWith("engines/") && /^src\/engines\/(?:base|config|load-engine)\.ts$/.test(target);
}

test("tidy: no import cycles between files", () => {
  const graph = new Map<string, string[]>();
  for (const file of sources) {
    const targets = importsOf(file)
      .filter((specifier) => specifier.startsWith("."))
      .map((specifier) => relative(ROOT, resolve(ROOT, dirname(file), specifier)).replaceAll("\\", "/"));
    graph.set(file, targets);
  }
  // The loader's lazy imports of engines and the contract they share are one deliberate meeting point.
  const state = new Map<string, "open" | "done">();
  const cycles: string[] = [];
  const visit = (file: string, path: readonly string[]): void => {
    if (state.get(file) === "done") return;
    if (state.get(file) === "open") {
      cycles.push([...path.slice(path.indexOf(file)), file].join(" -> "));
      return;
    }
    state.set(file, "open");
    for (const target of graph.get(file) ?? []) if (!isLazy(file, target)) visit(target, [...path, file]);
    state.set(file, "done");
  };
  for (const file of sources) visit(file, []);
  assert.deepEqual(cycles, []);
});

/** Dynamic and type-only imports do not make a load-time cycle. */
function isLazy(file: string, target: string): boolean {
  const text = readFileSync(join(ROOT, file), "utf8");
  const specifier = relative(dirname(file), target).replaceAll("\\", "/");
  const form = specifier.startsWith(".") ? specifier : `./${specifier}`;
  const escaped = form.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const eager = new RegExp(`(?:^|\\n)\\s*(?:import|export)\\s+(?!type\\b)[^;'"]*?from\\s*["']${escaped}["']`);
  return !eager.test(text);
}

test("tidy: native and heavy packages are imported only in the folder that owns them", () => {
  const violations: string[] = [];
  for (const file of sources.filter((name) => !isTestFile(name))) {
    const folder = folderOf(file);
    for (const specifier of importsOf(file)) {
      if (specifier.startsWith(".") || specifier.startsWith("node:")) continue;
      const owner = Object.entries(PACKAGES).find(
        ([name]) => specifier === name || specifier.startsWith(name.endsWith("/") ? name : `${name}/`),
      );
      if (owner === undefined) violations.push(`${file}: ${specifier} is not in the list of packages`);
      else if (!owner[1].includes(folder) && PACKAGE_EXCEPTIONS[owner[0]]?.includes(file) !== true) {
        violations.push(`${file}: ${specifier} belongs to ${owner[1].join("/, ")}/`);
      }
    }
  }
  assert.deepEqual(violations, []);
});

test("tidy: every dependency is explained in docs/dependencies.md, and nothing else is", () => {
  const manifest = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as Record<
    string,
    Record<string, string>
  >;
  const names = ["dependencies", "optionalDependencies", "devDependencies"].flatMap((part) =>
    Object.keys(manifest[part] ?? {}),
  );
  const page = readFileSync(join(ROOT, "docs/dependencies.md"), "utf8");
  const listed = [...page.matchAll(/^\| `([^`]+)`/gm)].map((match) => match[1]!);
  assert.deepEqual(listed.toSorted(), names.toSorted());
});

test("tidy: no skipped, focused or unfinished tests and no leftovers", () => {
  const banned = /\b(?:test|it|describe)\.(?:only|todo)\b|\bskip:\s*true\b|\b(?:TODO|FIXME|XXX)\b|not implemented yet/;
  const files = [
    ...sources,
    ...readdirSync(join(ROOT, "test"), { recursive: true, encoding: "utf8" })
      .filter((f) => f.endsWith(".ts"))
      .map((f) => `test/${f}`),
  ];
  const found = files.filter(
    (file) => !file.endsWith("tidy.test.ts") && banned.test(readFileSync(join(ROOT, file), "utf8")),
  );
  assert.deepEqual(found, []);
});
