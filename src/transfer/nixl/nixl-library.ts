import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import type * as Koffi from "koffi";
import { DynamoError } from "../../errors/index.ts";

/**
 * NIXL's C library (`libnixl_capi.so`) through koffi: found, loaded and probed; nothing is touched on import. Signatures are
 * those of the `wrapper.h` of the Rust binding, which the wheels do not ship: a release that lacks one of the symbols is
 * refused with their names. Every function returns 0, 1 (in progress) or a negative error.
 *
 * Where it is: `libraryFolder`, else the parent of `NIXL_PLUGIN_DIR`, else where NVIDIA's containers have it.
 */
export type Handle = bigint;

const CONTAINER_FOLDERS = [
  "/opt/nvidia/nvda_nixl/lib64",
  "/opt/nvidia/nvda_nixl/lib/x86_64-linux-gnu",
  "/opt/nvidia/nvda_nixl/lib/aarch64-linux-gnu",
  "/usr/local/nixl/lib/x86_64-linux-gnu",
];
const LIBRARY = "libnixl_capi.so";

const OUT = "_Out_ void **";
/** Name without `nixl_capi_`, arguments. */
const FUNCTIONS = {
  create_configured_agent: `const char *, nixl_capi_agent_config *, ${OUT}`,
  destroy_agent: "void *",
  get_plugin_params: `void *, const char *, ${OUT}, ${OUT}`,
  create_backend: `void *, const char *, void *, ${OUT}`,
  destroy_mem_list: "void *",
  destroy_params: "void *",
  destroy_backend: "void *",
  create_opt_args: OUT,
  destroy_opt_args: "void *",
  opt_args_add_backend: "void *, void *",
  create_reg_dlist: `int, ${OUT}`,
  destroy_reg_dlist: "void *",
  reg_dlist_add_desc: "void *, uintptr_t, size_t, uint64_t, const void *, size_t",
  register_mem: "void *, void *, void *",
  deregister_mem: "void *, void *, void *",
  create_xfer_dlist: `int, ${OUT}`,
  destroy_xfer_dlist: "void *",
  xfer_dlist_add_desc: "void *, uintptr_t, size_t, uint64_t",
  get_local_md: `void *, ${OUT}, _Out_ size_t *`,
  load_remote_md: `void *, const void *, size_t, ${OUT}`,
  invalidate_remote_md: "void *, const char *",
  create_xfer_req: `void *, int, void *, void *, const char *, ${OUT}, void *`,
  post_xfer_req: "void *, void *, void *",
  get_xfer_status: "void *, void *",
  release_xfer_req: "void *, void *",
  destroy_xfer_req: "void *",
  gen_notif: "void *, const char *, const void *, size_t, void *",
  create_notif_map: OUT,
  destroy_notif_map: "void *",
  get_notifs: "void *, void *, void *",
  notif_map_size: "void *, _Out_ size_t *",
  notif_map_get_agent_at: "void *, size_t, _Out_ const char **",
  notif_map_get_notifs_size: "void *, const char *, _Out_ size_t *",
  notif_map_get_notif: `void *, const char *, size_t, ${OUT}, _Out_ size_t *`,
  notif_map_clear: "void *",
} as const;

export type NixlFunction = keyof typeof FUNCTIONS;

export interface NativeFunction {
  (...args: unknown[]): number;
  async(...args: [...unknown[], (error: Error | null, status: number) => void]): void;
}

export interface NixlLibrary {
  readonly path: string;
  readonly functions: Readonly<Record<NixlFunction, NativeFunction>>;
  addressOf(bytes: Uint8Array): bigint;
  /** A copy of native memory. */
  copy(address: Handle, byteCount: number): Buffer;
  /** Frees what the library allocated with malloc. */
  free(address: Handle): void;
}

let loaded: NixlLibrary | undefined;

/** Throws `library-unavailable` with what to do about it. Cost: some hundred milliseconds the first time. */
export function openNixl(libraryFolder: string | undefined): NixlLibrary {
  loaded ??= load(findFolder(libraryFolder));
  return loaded;
}

const FIX =
  "install it with `pip install nixl-cu12` (it needs no GPU) and set NIXL_PLUGIN_DIR to the folder `.nixl_cu12.mesonpy.libs/plugins` beside the installed package";

function findFolder(given: string | undefined): string {
  const plugins = process.env["NIXL_PLUGIN_DIR"];
  const folders =
    given === undefined ? [...(plugins === undefined ? [] : [dirname(plugins)]), ...CONTAINER_FOLDERS] : [given];
  const folder = folders.find((candidate) => existsSync(join(candidate, LIBRARY)));
  if (folder === undefined) {
    throw new DynamoError("library-unavailable", `NIXL is not here: ${FIX}`, {
      diagnostic: `looked in ${folders.join(", ")}`,
    });
  }
  return folder;
}

function load(folder: string): NixlLibrary {
  const path = join(folder, LIBRARY);
  // The library reads it when the first agent is made.
  process.env["NIXL_PLUGIN_DIR"] ??= join(folder, "plugins");
  let koffi: typeof Koffi;
  let library: Koffi.LibraryHandle;
  let libc: Koffi.LibraryHandle;
  try {
    koffi = createRequire(import.meta.url)("koffi") as typeof Koffi;
    library = koffi.load(path);
    libc = koffi.load(null);
  } catch (cause) {
    throw new DynamoError("library-unavailable", `NIXL cannot be loaded: ${FIX}`, { diagnostic: String(cause), cause });
  }
  koffi.struct("nixl_capi_agent_config", {
    enable_prog_thread: "bool",
    enable_listen_thread: "bool",
    listen_port: "uint16",
    thread_sync: "int",
    num_workers: "uint",
    pthr_delay_us: "uint64",
    lthr_delay_us: "uint64",
    capture_telemetry: "bool",
  });
  const functions: Partial<Record<NixlFunction, NativeFunction>> = {};
  const missing: string[] = [];
  for (const [name, args] of Object.entries(FUNCTIONS) as [NixlFunction, string][]) {
    try {
      functions[name] = library.func(`int nixl_capi_${name}(${args})`) as unknown as NativeFunction;
    } catch {
      missing.push(`nixl_capi_${name}`);
    }
  }
  if (missing.length > 0) {
    throw new DynamoError(
      "library-unavailable",
      "this release of NIXL lacks functions that we call: 1.3.2 is known to work",
      {
        diagnostic: `${path}: ${missing.join(", ")}`,
      },
    );
  }
  const free = libc.func("void free(void *)") as unknown as (address: Handle) => void;
  return {
    path,
    functions: functions as Record<NixlFunction, NativeFunction>,
    addressOf: (bytes) => koffi.address(bytes),
    copy: (address, byteCount) => Buffer.from(Buffer.from(koffi.view(address, byteCount))),
    free,
  };
}
