import { readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";

/**
 * What pip is told about indexes and certificates, from its environment variables and configuration files, so that a
 * machine whose pip works needs no second set-up. Where nothing is configured pip itself knows its index. A plain reading of the settings we use, not of everything pip knows.
 */
export interface PipConfig {
  readonly indexUrls: readonly string[];
  /** A CA bundle's path. */
  readonly cert?: string;
}

export function readPipConfig(env: NodeJS.ProcessEnv): PipConfig {
  const settings = new Map<string, string>();
  for (const path of configFiles(env)) {
    for (const [key, value] of iniSettings(textOf(path))) settings.set(key, value);
  }
  const setting = (name: string): string | undefined =>
    env[`PIP_${name.toUpperCase().replaceAll("-", "_")}`] ?? settings.get(name);
  const indexUrls = [setting("index-url") ?? "", ...(setting("extra-index-url") ?? "").split(/\s+/)];
  const cert = setting("cert");
  return {
    indexUrls: indexUrls.filter((url) => /^https?:\/\//.test(url)),
    ...(cert === undefined ? {} : { cert }),
  };
}

/** Lowest precedence first, as pip reads them. `PIP_CONFIG_FILE` naming the null device turns all off. */
function configFiles(env: NodeJS.ProcessEnv): string[] {
  const named = env.PIP_CONFIG_FILE;
  if (named === "/dev/null" || named?.toLowerCase() === "nul") return [];
  const home = env.HOME ?? homedir();
  const configHome = env.XDG_CONFIG_HOME ?? join(home, ".config");
  return [
    "/etc/pip.conf",
    join(home, ".pip", "pip.conf"),
    join(configHome, "pip", "pip.conf"),
    ...(env.VIRTUAL_ENV === undefined ? [] : [join(env.VIRTUAL_ENV, "pip.conf")]),
    ...(named === undefined ? [] : [named]),
  ];
}

function textOf(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return ""; // Absent or unreadable: pip goes on without it as well.
  }
}

/** `[global]` settings; a value may go on in indented lines. */
function iniSettings(text: string): Map<string, string> {
  const settings = new Map<string, string>();
  let section = "";
  let key: string | undefined;
  for (const line of text.split(/\r?\n/)) {
    if (/^\s*([#;]|$)/.test(line)) continue;
    const header = /^\[(.+)\]\s*$/.exec(line);
    if (header !== null) {
      section = header[1]!;
      key = undefined;
    } else if (/^\s/.test(line) && key !== undefined) {
      settings.set(key, `${settings.get(key) ?? ""} ${line.trim()}`.trim());
    } else if (section === "global") {
      const at = line.search(/[=:]/);
      if (at === -1) continue;
      key = line.slice(0, at).trim().toLowerCase().replaceAll("_", "-");
      settings.set(key, line.slice(at + 1).trim());
    }
  }
  return settings;
}
