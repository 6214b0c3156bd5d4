import { COMMANDS } from "./commands.ts";
import { COMMAND_NAMES, optionsOf, specOf, type CommandName, type OptionGroup, type OptionSpec } from "./options.ts";

const WIDTH = 100;

/** `dynamo --help`. */
export function generalHelp(): string {
  const names = COMMAND_NAMES.map((name) => `  ${name.padEnd(10)}${COMMANDS[name].summary}`);
  return `dynamo: LLM inference serving, from a laptop to a cluster

Usage: dynamo COMMAND [options]

${names.join("\n")}
  ${"help".padEnd(10)}show the options of a command: dynamo help COMMAND

Example: dynamo local --model smollm2

Every option has a DYN_ variable and a place in --config file.yaml; a flag wins over a variable, a variable over the file.
`;
}

/** `dynamo COMMAND --help`: usage, what it does, one example, every option with variable and default. */
export function commandHelp(name: CommandName): string {
  const { usage, about, example } = COMMANDS[name];
  const groups = new Map<OptionGroup, string[]>();
  for (const option of optionsOf(name)) {
    const spec = specOf(option, name);
    const lines = groups.get(spec.group) ?? [];
    lines.push(optionHelp(option, spec));
    groups.set(spec.group, lines);
  }
  const options = [...groups].map(([group, lines]) => `${group}:\n${lines.join("\n")}`);
  return `Usage: ${usage}\n\n${about}\n\nExample: ${example}\n\n${options.join("\n\n")}\n`;
}

function optionHelp(name: string, spec: OptionSpec): string {
  const head = isSecret(spec) ? `  ${spec.env} (not a flag)` : `  --${name}${valueHint(spec)}`;
  const text = `${spec.help} [${defaultOf(spec)}${isSecret(spec) ? "" : `; ${spec.env}`}]`;
  return `${head}\n${wrap(text, WIDTH - 6)
    .map((line) => `      ${line}`)
    .join("\n")}`;
}

function valueHint(spec: OptionSpec): string {
  switch (spec.type) {
    case "choice":
      return `=${spec.choices.join("|")}`;
    case "switch":
      return spec.default ? ", and --no-... to turn it off" : "";
    case "text":
      return "=TEXT";
    default:
      return "=NUMBER";
  }
}

/** As in the help and in docs/environment.md. */
export function defaultOf(spec: OptionSpec): string {
  return `default: ${spec.defaultText ?? String(spec.default ?? "none")}`;
}

export function isSecret(spec: OptionSpec): boolean {
  return spec.type === "text" && spec.secret === true;
}

function wrap(text: string, width: number): string[] {
  const lines: string[] = [];
  let line = "";
  for (const word of text.split(" ")) {
    if (line !== "" && line.length + 1 + word.length > width) {
      lines.push(line);
      line = word;
    } else line = line === "" ? word : `${line} ${word}`;
  }
  lines.push(line);
  return lines;
}
