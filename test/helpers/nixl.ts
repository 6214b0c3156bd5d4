import { existsSync } from "node:fs";
import { join } from "node:path";
import { pythonPackages } from "./python-packages.ts";

/**
 * The folder of NIXL's C library for tests and benchmarks (or where `DYN_TEST_NIXL` says it is): its wheel from PyPI,
 * unpacked. The library needs no Python and no GPU.
 */
const VERSION = "1.3.2";
const LIBRARIES = ".nixl_cu12.mesonpy.libs";
const PLATFORMS: Record<string, string> = { x64: "manylinux_2_28_x86_64", arm64: "manylinux_2_28_aarch64" };

export type NixlFolder =
  | { readonly libraryFolder: string; readonly reason?: undefined }
  | { readonly libraryFolder: undefined; readonly reason: string };

let found: Promise<NixlFolder> | undefined;

export function nixlForTests(): Promise<NixlFolder> {
  found ??= find();
  return found;
}

async function find(): Promise<NixlFolder> {
  const given = process.env["DYN_TEST_NIXL"];
  if (given !== undefined) return { libraryFolder: given };
  const platform = PLATFORMS[process.arch];
  if (process.platform !== "linux" || platform === undefined) {
    return { libraryFolder: undefined, reason: `there is no NIXL for ${process.platform} ${process.arch}` };
  }
  const { folder, reason } = await pythonPackages({
    name: join("nixl", VERSION),
    packages: [`nixl-cu12==${VERSION}`],
    unpack: ["--platform", platform, "--implementation", "cp", "--python-version", "3.11"],
    works: (at) => Promise.resolve(existsSync(join(at, LIBRARIES, "libnixl_capi.so"))),
  });
  return folder === undefined ? { libraryFolder: undefined, reason } : { libraryFolder: join(folder, LIBRARIES) };
}
