import { enableCompileCache } from "node:module";
import { DynamoError } from "../errors/index.ts";
import { packageVersion } from "../std/index.ts";
import { closestWord } from "./closest-word.ts";
import { COMMANDS } from "./commands.ts";
import { commandHelp, generalHelp } from "./help.ts";
import { COMMAND_NAMES, type CommandName } from "./options.ts";

/**
 * The command `dynamo`: finds the command, loads its module, turns what it throws into one clear text and an exit code.
 * 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted twice.
 */
export async function main(argv: readonly string[]): Promise<number> {
  const out = (text: string): void => void process.stdout.write(text);
  const err = (text: string): void => void process.stderr.write(text);
  const [first, ...rest] = argv;
  if (first === undefined || first === "--help" || first === "-h") {
    out(generalHelp());
    return 0;
  }
  if (first === "--version" || first === "-V") {
    out(`${packageVersion()}\n`);
    return 0;
  }
  const name = first === "help" ? rest[0] : first;
  if (name === undefined) {
    out(generalHelp());
    return 0;
  }
  if (!isCommand(name)) {
    const closest = closestWord(name, COMMAND_NAMES);
    err(
      `dynamo: no command ${JSON.stringify(name)}${closest === undefined ? "" : `; did you mean ${closest}?`} See dynamo --help.\n`,
    );
    return 2;
  }
  if (first === "help" || rest.includes("--help") || rest.includes("-h")) {
    out(commandHelp(name));
    return 0;
  }
  // Timers of our clock do not keep a process alive, and a command may wait for nothing else for a moment.
  const alive = setInterval(() => undefined, 2 ** 30);
  try {
    const { run } = await COMMANDS[name].load();
    return await run({ argv: rest, env: process.env, out, err });
  } catch (thrown) {
    return report(thrown, name, err);
  } finally {
    clearInterval(alive);
  }
}

function report(thrown: unknown, name: CommandName, err: (text: string) => void): number {
  if (!(thrown instanceof DynamoError)) {
    err(
      `dynamo ${name}: internal error: ${thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown)}\n`,
    );
    return 1;
  }
  if (thrown.reason === "invalid-config") {
    const lines = thrown.publicMessage.split("\n").map((line) => `  ${line}\n`);
    err(`dynamo ${name}: the configuration has ${lines.length === 1 ? "a mistake" : `${lines.length} mistakes`}:\n`);
    err(`${lines.join("")}See dynamo ${name} --help.\n`);
    return 2;
  }
  err(`dynamo ${name}: ${thrown.publicMessage}\n`);
  if (thrown.reason === "internal" && thrown.diagnostic !== undefined) err(`${thrown.diagnostic}\n`);
  return 1;
}

function isCommand(name: string): name is CommandName {
  return (COMMAND_NAMES as readonly string[]).includes(name);
}

if (import.meta.main) {
  // Stripping types and compiling our modules is most of a role's start; the second start takes it from Node's cache.
  enableCompileCache();
  process.exit(await main(process.argv.slice(2)));
}
