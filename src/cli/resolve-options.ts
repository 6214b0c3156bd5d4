import { parseArgs } from "node:util";
import { DynamoError } from "../errors/index.ts";
import { closestWord } from "./closest-word.ts";
import { dynamoFlag } from "./dynamo-flags.ts";
import { ignoredVariables } from "./dynamo-variables.ts";
import {
  COMMAND_NAMES,
  OPTION_NAMES,
  RETIRED_FLAGS,
  optionsOf,
  specOf,
  type CommandName,
  type OptionName,
  type OptionSpec,
  type OptionValues,
} from "./options.ts";

/**
 * From what was typed to checked values: flag, else environment, else configuration file, else default. Every mistake is
 * found before anything starts and reported together. Unknown keys are mistakes here, never ignored.
 */
export type ValueSource = "flag" | "environment" | "file" | "default";

export interface ResolvedOptions {
  readonly command: CommandName;
  readonly values: OptionValues;
  readonly sources: Readonly<Record<OptionName, ValueSource>>;
  /** Words that are not options: `pull smollm2`. */
  readonly positionals: readonly string[];
  /** Behind `--`: arguments for an engine's own command line. */
  readonly engineArgs: readonly string[];
  /** One line each, for stderr: renamed flags, and variables of Dynamo that mean nothing here. */
  readonly warnings: readonly string[];
}

export interface ResolveInput {
  readonly command: CommandName;
  /** After the command's name. */
  readonly argv: readonly string[];
  readonly env: NodeJS.ProcessEnv;
  /** @default 0 */
  readonly maxPositionals?: number;
}

interface Given {
  readonly text: string;
  /** As the user would recognise it: `--http-port`, `DYN_HTTP_PORT`, `http-port in dynamo.yaml`. */
  readonly where: string;
  readonly source: ValueSource;
}

/** Commands with an engine that may have a command line of its own. */
const WITH_ENGINE_ARGS: readonly CommandName[] = ["local", "worker", "vllm", "sglang", "trtllm", "doctor"];

/** Throws `invalid-config`; its message has one line per mistake. */
export async function resolveOptions(given: ResolveInput): Promise<ResolvedOptions> {
  const end = WITH_ENGINE_ARGS.includes(given.command) ? given.argv.indexOf("--") : -1;
  const engineArgs = end === -1 ? [] : given.argv.slice(end + 1);
  const input = end === -1 ? given : { ...given, argv: given.argv.slice(0, end) };
  const mistakes: string[] = [];
  const warnings: string[] = [];
  const allowed = new Set(acceptedOptions(input.command));
  const flags = readFlags(input, allowed, mistakes, warnings);
  const environment = readEnvironment(input.env, allowed);
  if (allowed.has("kv-host")) warnings.push(...ignoredVariables(input.env));
  const configPath = (flags.given.get("config") ?? environment.get("config"))?.text;
  const file =
    configPath === undefined ? new Map<OptionName, Given>() : await readConfigFile(configPath, allowed, mistakes);

  const values: Partial<Record<OptionName, string | number | boolean | undefined>> = {};
  const sources = {} as Record<OptionName, ValueSource>;
  for (const name of OPTION_NAMES) {
    const spec = specOf(name, input.command);
    const given = flags.given.get(name) ?? environment.get(name) ?? file.get(name);
    sources[name] = given?.source ?? "default";
    values[name] = given === undefined ? spec.default : parseValue(given, spec, mistakes);
  }
  const max = input.maxPositionals ?? 0;
  for (const word of flags.positionals.slice(max)) mistakes.push(`${word}: unexpected word`);
  if (mistakes.length > 0) throw new DynamoError("invalid-config", mistakes.join("\n"));
  // Each value was made by `parseValue` for its own spec or is the spec's default.
  return {
    command: input.command,
    values: values as OptionValues,
    sources,
    positionals: flags.positionals,
    engineArgs,
    warnings,
  };
}

/** `dynamo doctor` judges the command line of a worker or of `dynamo local`, so it takes all of theirs. */
function acceptedOptions(command: CommandName): OptionName[] {
  const commands: CommandName[] = command === "doctor" ? ["doctor", "worker", "local"] : [command];
  return commands.flatMap((one) => optionsOf(one));
}

/** Whether a flag is one of that command's, in any spelling, or one of Dynamo's that is answered here. */
export function isKnownFlag(name: string, command: CommandName): boolean {
  const known = knownFlags().get(name);
  if (known !== undefined) return optionsOf(command).includes(known.name);
  return dynamoFlag(name) !== undefined && !VLLM_FLAGS.has(name);
}

/** Dynamo has them for its frontend; behind a vLLM worker they are vLLM's. */
const VLLM_FLAGS = new Set(["trust-remote-code", "tokenizer"]);

function readFlags(
  input: ResolveInput,
  allowed: ReadonlySet<OptionName>,
  mistakes: string[],
  warnings: string[],
): { given: Map<OptionName, Given>; positionals: string[] } {
  const given = new Map<OptionName, Given>();
  const all = knownFlags();
  const args = withoutEmptyFlags(input, all, mistakes);
  const { tokens } = parseArgs({ args, options: parserOptions(), strict: false, tokens: true });
  const positionals: string[] = [];
  // Where the value of an unknown flag would stand: one mistake, not two.
  let skipIndex = -1;
  for (const token of tokens) {
    if (token.kind === "positional" && token.index !== skipIndex) positionals.push(token.value);
    if (token.kind !== "option") continue;
    const flag = all.get(token.name);
    const shown = token.rawName.startsWith("--") ? `--${token.name}` : token.rawName;
    if (flag === undefined || shown !== `--${token.name}`) {
      skipIndex = token.index + 1;
      const foreign = shown === `--${token.name}` ? dynamoFlag(token.name) : shown === "-i" ? dynamoFlag("interactive") : undefined; // prettier-ignore
      if (foreign === undefined) mistakes.push(unknownFlag(shown, allowed));
      else if (foreign.ignored === true) warnings.push(`${shown} is ignored: ${foreign.why}`);
      else mistakes.push(`${shown}: an option of Dynamo that is none here: ${foreign.why}`);
      continue;
    }
    const { name, fixedValue } = flag;
    const retired = RETIRED_FLAGS[token.name];
    if (!allowed.has(name)) {
      mistakes.push(`${shown}: not an option of dynamo ${input.command}; it belongs to ${commandsOf(name)}`);
      continue;
    }
    if (retired !== undefined) warnings.push(`--${token.name} is now ${retired.now}`);
    const text = fixedValue ?? token.value;
    if (fixedValue !== undefined && token.value !== undefined)
      mistakes.push(`${shown}: takes no value, got ${token.value}`);
    else if (text === undefined) mistakes.push(nothingGiven(shown, name, input.command));
    else if (isSecret(specOf(name)))
      mistakes.push(`${shown}: set ${specOf(name).env} instead; a command line is public`);
    else if (given.has(name)) mistakes.push(`${shown}: given twice`);
    else given.set(name, { text, where: shown, source: "flag" });
  }
  return { given, positionals };
}

/** The parser would take `--http-port` for the value in `--http-host --http-port 1`; such a flag is taken out first. */
function withoutEmptyFlags(
  { argv, command }: ResolveInput,
  all: ReadonlyMap<string, KnownFlag>,
  mistakes: string[],
): string[] {
  return argv.filter((word, index) => {
    const flag = word.startsWith("--") ? all.get(word.slice(2)) : undefined;
    if (flag === undefined || flag.fixedValue !== undefined) return true;
    const next = argv[index + 1];
    if (next !== undefined && !next.startsWith("--")) return true;
    mistakes.push(nothingGiven(word, flag.name, command));
    return false;
  });
}

function nothingGiven(shown: string, name: OptionName, command: CommandName): string {
  return `${shown}: expected ${expectation(specOf(name, command))}, got nothing`;
}

interface KnownFlag {
  readonly name: OptionName;
  /** For switches and retired switches: what the bare flag means. */
  readonly fixedValue?: string;
}

function knownFlags(): Map<string, KnownFlag> {
  const known = new Map<string, KnownFlag>();
  for (const name of OPTION_NAMES) {
    const spec = specOf(name);
    if (spec.type === "switch") {
      known.set(name, { name, fixedValue: "true" });
      known.set(`no-${name}`, { name, fixedValue: "false" });
    } else {
      known.set(name, { name });
      for (const { flag } of spec.also ?? []) known.set(flag, { name });
    }
  }
  for (const [flag, { name, value }] of Object.entries(RETIRED_FLAGS)) {
    known.set(flag, { name, ...(value === undefined ? {} : { fixedValue: value }) });
  }
  return known;
}

function parserOptions(): Record<string, { type: "string" | "boolean" }> {
  const options: Record<string, { type: "string" | "boolean" }> = {};
  for (const [flag, { fixedValue }] of knownFlags()) {
    options[flag] = { type: fixedValue === undefined ? "string" : "boolean" };
  }
  return options;
}

function readEnvironment(env: NodeJS.ProcessEnv, allowed: ReadonlySet<OptionName>): Map<OptionName, Given> {
  const given = new Map<OptionName, Given>();
  for (const name of allowed) {
    const spec = specOf(name);
    for (const variable of [spec.env, ...(spec.also ?? []).flatMap((other) => other.env ?? [])]) {
      const text = env[variable];
      // Set but empty is how shells and compose files say "not set".
      if (text === undefined || text === "" || given.has(name)) continue;
      given.set(name, { text, where: variable, source: "environment" });
    }
  }
  return given;
}

async function readConfigFile(
  path: string,
  allowed: ReadonlySet<OptionName>,
  mistakes: string[],
): Promise<Map<OptionName, Given>> {
  const given = new Map<OptionName, Given>();
  let content: unknown;
  try {
    const { readFileSync } = await import("node:fs");
    const { parseDocument } = await import("yaml");
    // What the library would only warn of (an unknown tag, an odd alias) is a mistake here.
    const document = parseDocument(readFileSync(path, "utf8"), { logLevel: "silent" });
    const problem = document.errors[0] ?? document.warnings[0];
    if (problem !== undefined) throw problem;
    content = document.toJS({ maxAliasCount: 16 });
  } catch (error) {
    mistakes.push(`--config: ${path}: ${(error as Error).message.split("\n")[0]}`);
    return given;
  }
  if (content === null) return given;
  if (typeof content !== "object" || Array.isArray(content)) {
    mistakes.push(`--config: ${path}: expected options as "name: value" lines`);
    return given;
  }
  const known = knownFlags();
  for (const [key, value] of Object.entries(content)) {
    const flag = known.get(key);
    const where = `${key} in ${path}`;
    if (flag === undefined || flag.name === "config")
      mistakes.push(`${where}: no such option${didYouMean(key, OPTION_NAMES)}`);
    else if (!["string", "number", "boolean"].includes(typeof value)) {
      mistakes.push(
        `${where}: expected ${expectation(specOf(flag.name))}, got ${value === null ? "nothing" : "a list or a map"}`,
      );
    } else if (given.has(flag.name)) mistakes.push(`${where}: given twice`);
    // One file may serve several commands: an option of another command is no mistake here.
    else if (allowed.has(flag.name))
      given.set(flag.name, { text: fileText(flag, value as string), where, source: "file" });
  }
  return given;
}

/** `no-router-kv-events: true` is `router-kv-events: false`; a retired switch set to true is its new value. */
function fileText({ fixedValue }: KnownFlag, value: string | number | boolean): string {
  const text = String(value);
  if (fixedValue === undefined || fixedValue === "true") return text;
  if (fixedValue === "false") return text === "true" ? "false" : text === "false" ? "true" : text;
  return fixedValue;
}

function parseValue(given: Given, spec: OptionSpec, mistakes: string[]): string | number | boolean | undefined {
  const value = valueOf(given.text.trim(), spec);
  if (value === undefined) {
    mistakes.push(
      `${given.where}: expected ${expectation(spec)}, got ${isSecret(spec) ? "something else" : given.text}`,
    );
  }
  return value;
}

function valueOf(text: string, spec: OptionSpec): string | number | boolean | undefined {
  switch (spec.type) {
    case "text":
      return text === "" ? undefined : text;
    case "choice": {
      const word = spec.synonyms?.[text] ?? text;
      return spec.choices.includes(word) ? word : undefined;
    }
    case "switch":
      if (["true", "1", "yes", "on"].includes(text.toLowerCase())) return true;
      return ["false", "0", "no", "off"].includes(text.toLowerCase()) ? false : undefined;
    default: {
      const pattern = spec.type === "integer" ? /^-?\d{1,15}$/ : /^-?\d{1,15}(\.\d{1,9})?$/;
      const number = Number(text);
      return pattern.test(text) && number >= spec.min && number <= spec.max ? number : undefined;
    }
  }
}

/** `a whole number from 0 to 65535`, `llama or echo`. */
export function expectation(spec: OptionSpec): string {
  switch (spec.type) {
    case "text":
      return "a text";
    case "choice":
      return spec.choices.length === 1
        ? spec.choices[0]!
        : `${spec.choices.slice(0, -1).join(", ")} or ${spec.choices.at(-1)}`;
    case "switch":
      return "true or false";
    default:
      return `a ${spec.type === "integer" ? "whole " : ""}number from ${spec.min} to ${spec.max}`;
  }
}

function unknownFlag(shown: string, allowed: ReadonlySet<OptionName>): string {
  const flags = [...allowed].flatMap((name) =>
    specOf(name).type === "switch" ? [`--${name}`, `--no-${name}`] : [`--${name}`],
  );
  return `${shown}: no such option${didYouMean(shown, flags)}`;
}

function didYouMean(word: string, known: readonly string[]): string {
  const closest = closestWord(word, known);
  return closest === undefined ? "" : `; did you mean ${closest}?`;
}

function commandsOf(name: OptionName): string {
  const commands: readonly CommandName[] = specOf(name).commands;
  return COMMAND_NAMES.filter((command) => commands.includes(command))
    .map((command) => `dynamo ${command}`)
    .join(", ");
}

function isSecret(spec: OptionSpec): boolean {
  return spec.type === "text" && spec.secret === true;
}

/**
 * The resolved configuration as `--http-port=8001 (flag)` entries: everything that is not a default, and the defaults of
 * `always`.
 */
export function describeOptions(resolved: ResolvedOptions, always: readonly OptionName[]): string[] {
  const lines: string[] = [];
  for (const name of optionsOf(resolved.command)) {
    const source = resolved.sources[name];
    const value = resolved.values[name];
    if (source === "default" && (!always.includes(name) || value === undefined)) continue;
    lines.push(`--${name}=${isSecret(specOf(name)) ? "***" : String(value)} (${source})`);
  }
  return lines;
}

/** The options that are not defaults and that another command has too, as flags for it. Secrets are left out. */
export function forwardedFlags(resolved: ResolvedOptions, to: CommandName): string[] {
  const theirs = new Set(optionsOf(to));
  const flags: string[] = [];
  for (const name of optionsOf(resolved.command)) {
    const spec = specOf(name);
    const value = resolved.values[name];
    if (!theirs.has(name) || name === "config" || isSecret(spec) || resolved.sources[name] === "default") continue;
    flags.push(spec.type === "switch" ? `--${value === true ? "" : "no-"}${name}` : `--${name}=${String(value)}`);
  }
  return flags;
}
