import { join } from "node:path";
import { canImport, interpreterOf, pythonPackages } from "./python-packages.ts";

/**
 * A Python with the official `openai` package, for tests of the wire format with a client that is not ours (or the
 * environment where `DYN_TEST_VENV` says it is). Where it cannot be had the reason comes back, for `t.skip(reason)`.
 */
const OPENAI_VERSION = "3.54.0";

export type PythonWithOpenai =
  | { readonly interpreter: string; readonly reason?: undefined }
  | { readonly interpreter: undefined; readonly reason: string };

let found: Promise<PythonWithOpenai> | undefined;

export function pythonWithOpenai(): Promise<PythonWithOpenai> {
  found ??= find();
  return found;
}

async function find(): Promise<PythonWithOpenai> {
  const { folder, reason } = await pythonPackages({
    name: join("venv-openai", OPENAI_VERSION),
    packages: [`openai==${OPENAI_VERSION}`],
    given: process.env["DYN_TEST_VENV"],
    works: (at) => canImport(at, "openai"),
  });
  return folder === undefined ? { interpreter: undefined, reason } : { interpreter: interpreterOf(folder) };
}
