import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, rename, rm } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { promisify } from "node:util";

/**
 * Python packages for tests, each set installed once in the user's cache folder and reused by every later run; nothing goes
 * into the system's Python. A set is either a virtual environment that runs Python, or a plain folder that only holds the
 * files of a wheel. Where Python or a package registry is missing the reason comes back instead, for `t.skip(reason)`.
 */
const INSTALL_TIMEOUT_MS = 140_000;
const PIP = [
  "-m",
  "pip",
  "install",
  "--quiet",
  "--disable-pip-version-check",
  "--only-binary=:all:",
  "--retries=1",
  "--timeout=15",
];

export type Installed =
  { readonly folder: string; readonly reason?: undefined } | { readonly folder: undefined; readonly reason: string };

export interface PackageSet {
  /** The folder's name in the cache, with the version. */
  readonly name: string;
  readonly packages: readonly string[];
  /** Takes the place of the cache folder. */
  readonly given?: string | undefined;
  /** Whether what is in the folder works. */
  readonly works: (folder: string) => Promise<boolean>;
  /** More arguments for pip; with them the packages are only unpacked, for the platform they name. */
  readonly unpack?: readonly string[];
}

/** Never throws. */
export async function pythonPackages(set: PackageSet): Promise<Installed> {
  try {
    const folder = set.given ?? join(homedir(), ".cache", "dynamo-ts", set.name);
    if (!(await set.works(folder))) await install(folder, set);
    return { folder };
  } catch (thrown) {
    return { folder: undefined, reason: `no Python with ${set.packages.join(", ")}: ${reasonOf(thrown)}` };
  }
}

/** The interpreter of a virtual environment. */
export function interpreterOf(folder: string): string {
  return process.platform === "win32" ? join(folder, "Scripts", "python.exe") : join(folder, "bin", "python");
}

/** Whether the environment's Python can import a module. */
export async function canImport(folder: string, module: string): Promise<boolean> {
  if (!existsSync(interpreterOf(folder))) return false;
  try {
    await run(interpreterOf(folder), ["-c", `import ${module}`], 60_000);
    return true;
  } catch {
    return false;
  }
}

/** Builds beside the place and moves it there when it works: a run that is killed, or a second one, leaves no half. */
async function install(folder: string, { packages, unpack, works }: PackageSet): Promise<void> {
  const python = process.env["DYN_TEST_PYTHON"] ?? "python3";
  await run(python, ["--version"], 10_000);
  await mkdir(dirname(folder), { recursive: true });
  const building = await mkdtemp(`${folder}.building-`);
  // A system's Python may come without pip: an environment has one.
  const environment = unpack === undefined ? building : `${building}-pip`;
  try {
    await run(python, ["-m", "venv", environment], INSTALL_TIMEOUT_MS);
    const target = unpack === undefined ? [] : [...unpack, "--no-deps", "--target", building];
    await run(interpreterOf(environment), [...PIP, ...target, ...packages], INSTALL_TIMEOUT_MS);
    if (!(await works(building))) throw new Error("it was installed and does not work");
    await moveInto(building, folder, works);
  } finally {
    await rm(building, { recursive: true, force: true });
    await rm(environment, { recursive: true, force: true });
  }
}

async function moveInto(building: string, folder: string, works: PackageSet["works"]): Promise<void> {
  try {
    await rename(building, folder);
  } catch {
    // Another run was faster, or what is there does not work.
    if (await works(folder)) return;
    await rm(folder, { recursive: true, force: true });
    await rename(building, folder);
  }
}

async function run(file: string, args: readonly string[], timeoutMs: number): Promise<void> {
  // What the caller's shell says about Python packages must not leak into this one.
  const { PYTHONPATH: _path, PYTHONHOME: _home, ...env } = process.env;
  await promisify(execFile)(file, args, { timeout: timeoutMs, env, maxBuffer: 16 * 1024 * 1024 });
}

/** The last line that Python or pip wrote, which is where they say what was wrong. */
function reasonOf(thrown: unknown): string {
  const { stderr = "", message, code } = thrown as { stderr?: string; message?: string; code?: unknown };
  if (code === "ENOENT") return "python3 was not found";
  const said = stderr.trim().split("\n").at(-1) ?? "";
  return said === "" ? (message ?? String(thrown)) : said;
}
