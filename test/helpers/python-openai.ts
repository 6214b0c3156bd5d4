import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, rename, rm } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { promisify } from "node:util";

/**
 * A Python with the official `openai` package, for tests of the wire format with a client that is not ours. It is made
 * once, in the user's cache folder (or where `DYN_TEST_VENV` says), and reused by every later run; nothing is installed
 * into the system's Python. Where Python, `venv` or a package registry is missing the reason comes back instead, for
 * `t.skip(reason)`.
 */
const OPENAI_VERSION = "3.54.0";
const INSTALL_TIMEOUT_MS = 140_000;

export type PythonWithOpenai =
  | { readonly interpreter: string; readonly reason?: undefined }
  | { readonly interpreter: undefined; readonly reason: string };

let found: Promise<PythonWithOpenai> | undefined;

export function pythonWithOpenai(): Promise<PythonWithOpenai> {
  found ??= find().catch((thrown: unknown) => ({ interpreter: undefined, reason: reasonOf(thrown) }));
  return found;
}

async function find(): Promise<PythonWithOpenai> {
  const given = process.env["DYN_TEST_VENV"];
  const folder = given ?? join(homedir(), ".cache", "dynamo-ts", "venv-openai", OPENAI_VERSION);
  if (!(await hasOpenai(interpreterOf(folder)))) await install(folder);
  return { interpreter: interpreterOf(folder) };
}

function interpreterOf(folder: string): string {
  return process.platform === "win32" ? join(folder, "Scripts", "python.exe") : join(folder, "bin", "python");
}

async function hasOpenai(interpreter: string): Promise<boolean> {
  if (!existsSync(interpreter)) return false;
  try {
    await run(interpreter, ["-c", "import openai"], 60_000);
    return true;
  } catch {
    return false;
  }
}

/** Builds beside the place and moves it there when it works: a run that is killed, or a second one, leaves no half. */
async function install(folder: string): Promise<void> {
  const python = process.env["DYN_TEST_PYTHON"] ?? "python3";
  await run(python, ["--version"], 10_000);
  await mkdir(dirname(folder), { recursive: true });
  const building = await mkdtemp(`${folder}.building-`);
  try {
    await run(python, ["-m", "venv", building], INSTALL_TIMEOUT_MS);
    const options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--retries=1", "--timeout=15"];
    const pip = ["-m", "pip", "install", ...options, `openai==${OPENAI_VERSION}`];
    await run(interpreterOf(building), pip, INSTALL_TIMEOUT_MS);
    await moveInto(building, folder);
  } finally {
    await rm(building, { recursive: true, force: true });
  }
}

async function moveInto(building: string, folder: string): Promise<void> {
  try {
    await rename(building, folder);
  } catch (thrown) {
    // Another run was faster, or what is there does not work.
    if (await hasOpenai(interpreterOf(folder))) return;
    if (!existsSync(join(folder, "pyvenv.cfg"))) throw thrown;
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
  if (code === "ENOENT") return "no Python: python3 was not found";
  const said = stderr.trim().split("\n").at(-1) ?? "";
  return `no Python with openai ${OPENAI_VERSION}: ${said === "" ? (message ?? String(thrown)) : said}`;
}
