import { accessSync, constants, readFileSync, readdirSync, realpathSync } from "node:fs";
import { delimiter, dirname, isAbsolute, join } from "node:path";

/**
 * What a command `vllm` is, without running it (which loads torch for many seconds): where it is, which Python runs it, and
 * which version that Python has installed.
 */
export interface InstalledVllm {
  readonly path: string;
  /** Undefined for a program that is no script of a Python environment. */
  readonly sitePackages: string | undefined;
  /** With the local part, `0.29.0+cpu`, where there is one. */
  readonly version: string | undefined;
}

/** Undefined when there is no such program. */
export function findInstalledVllm(command: string, env: NodeJS.ProcessEnv): InstalledVllm | undefined {
  const path = findProgram(command, env);
  if (path === undefined) return undefined;
  const sitePackages = sitePackagesOf(path);
  return { path, sitePackages, version: sitePackages === undefined ? undefined : versionIn(sitePackages) };
}

function findProgram(command: string, env: NodeJS.ProcessEnv): string | undefined {
  const places = command.includes("/") ? [command] : (env["PATH"] ?? "").split(delimiter).map((folder) => join(folder, command)); // prettier-ignore
  return places.find((place) => {
    try {
      accessSync(place, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** A script of a virtual environment names its interpreter in the first line. */
function sitePackagesOf(path: string): string | undefined {
  try {
    const first = readFileSync(realpathSync(path)).subarray(0, 512).toString("utf8").split("\n", 1)[0]!;
    const interpreter = /^#!\s*(\S+)/.exec(first)?.[1];
    if (interpreter === undefined || !isAbsolute(interpreter)) return undefined;
    const lib = join(dirname(dirname(interpreter)), "lib");
    const python = readdirSync(lib).find((name) => /^python3\.\d+$/.test(name));
    return python === undefined ? undefined : join(lib, python, "site-packages");
  } catch {
    return undefined;
  }
}

/** The longest is the one with a local part: builds for CPUs have an alias beside them. */
function versionIn(sitePackages: string): string | undefined {
  const versions = distributions(sitePackages).flatMap((name) => /^vllm(?:[_-]cpu)?-(\d[^-]*)\.dist-info$/.exec(name)?.[1] ?? []); // prettier-ignore
  return versions.toSorted((a, b) => b.length - a.length)[0];
}

function distributions(sitePackages: string): string[] {
  try {
    return readdirSync(sitePackages);
  } catch {
    return [];
  }
}

/** Whether that Python can import NIXL, by what is installed. */
export function hasNixl({ sitePackages }: InstalledVllm): boolean | undefined {
  if (sitePackages === undefined) return undefined;
  return distributions(sitePackages).some((name) => /^nixl(?:_cu\d+)?$/.test(name));
}
