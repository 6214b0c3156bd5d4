import { readdirSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import type * as Koffi from "koffi";
import { DynamoError } from "../../errors/index.ts";

/**
 * libllama through koffi: finds the prebuilt library of this platform, loads it in the order its parts need, declares
 * the functions we call and checks that the structs passed by value have the layout we declared. A wrong layout would
 * corrupt the stack, so a mismatch is refused with the fields that differ.
 *
 * Loaded lazily, once per thread; nothing native is touched on import. The functions are raw: they check nothing, and an
 * assertion inside ggml ends the process. `llama-context.ts` is the only caller and checks before it calls.
 */
export type Pointer = bigint;

/** A value for a koffi struct: field by field. */
type StructValue = Record<string, unknown>;

export interface LibllamaFunctions {
  readonly modelLoad: (path: string, params: StructValue) => Pointer | null;
  readonly modelFree: (model: Pointer) => void;
  readonly modelVocabulary: (model: Pointer) => Pointer;
  readonly modelTrainedContext: (model: Pointer) => number;
  readonly modelHasEncoder: (model: Pointer) => boolean;
  readonly modelIsRecurrent: (model: Pointer) => boolean;
  readonly modelIsHybrid: (model: Pointer) => boolean;
  readonly vocabularySize: (vocabulary: Pointer) => number;
  readonly contextCreate: (model: Pointer, params: StructValue) => Pointer | null;
  readonly contextFree: (context: Pointer) => void;
  readonly contextCells: (context: Pointer) => number;
  readonly contextBatch: (context: Pointer) => number;
  readonly contextSequences: (context: Pointer) => number;
  readonly contextThreads: (context: Pointer) => number;
  readonly contextMemory: (context: Pointer) => Pointer;
  readonly decode: (context: Pointer, batch: StructValue) => number;
  readonly logits: (context: Pointer) => Pointer | null;
  readonly logitsOfToken: (context: Pointer, batchIndex: number) => Pointer | null;
  readonly memoryClear: (memory: Pointer, data: boolean) => void;
  readonly sequenceCopy: (memory: Pointer, from: number, to: number, start: number, end: number) => void;
  readonly sequenceRemove: (memory: Pointer, sequence: number, start: number, end: number) => boolean;
  readonly sequenceFirst: (memory: Pointer, sequence: number) => number;
  readonly sequenceLast: (memory: Pointer, sequence: number) => number;
  readonly stateBytes: (context: Pointer, sequence: number, flags: number) => number;
  readonly stateGet: (context: Pointer, into: Uint8Array, bytes: number, sequence: number, flags: number) => number;
  readonly stateSet: (context: Pointer, from: Uint8Array, bytes: number, sequence: number, flags: number) => number;
}

export interface Libllama {
  readonly version: string;
  /** The library file. */
  readonly path: string;
  readonly functions: LibllamaFunctions;
  /** A copy of the library's defaults, to be changed and passed on. */
  contextDefaults(): StructValue;
  modelDefaults(): StructValue;
  /** Zeroed native memory that lives until the process ends or `free`; `view` is the same bytes. */
  allocate(byteCount: number): { address: Pointer; view: ArrayBuffer };
  free(address: Pointer): void;
  /** Native memory as bytes; the caller knows how long it lives. */
  view(address: Pointer, byteCount: number): ArrayBuffer;
  /**
   * Sends the library's warnings and errors to `sink` while `during` runs; before and after, all are dropped. The log is
   * one per process and a line from another thread waits until this thread's event loop turns, so capture only what
   * starts up, and turn the loop once afterwards.
   */
  captureLog<T>(sink: (line: LibraryLine) => void, during: () => T): T;
}

export interface LibraryLine {
  readonly level: "warn" | "error";
  readonly text: string;
}

/**
 * `llama_context_params` of release v0.5.0, with the defaults that the library must answer with. Fields that we never
 * set and whose default may change without harm are marked by `undefined`.
 */
const CONTEXT_LAYOUT: readonly (readonly [field: string, type: string, expected: number | boolean | undefined])[] = [
  ["n_ctx", "uint32", 512],
  ["n_batch", "uint32", 2048],
  ["n_ubatch", "uint32", 512],
  ["n_seq_max", "uint32", 1],
  ["n_rs_seq", "uint32", 0],
  ["n_outputs_max", "uint32", 0],
  ["n_outputs_max_per_seq", "uint32", 1],
  ["n_threads", "int32", 4],
  ["n_threads_batch", "int32", 4],
  ["ctx_type", "int32", 0],
  ["rope_scaling_type", "int32", -1],
  ["pooling_type", "int32", -1],
  ["attention_type", "int32", -1],
  ["flash_attn_type", "int32", -1],
  ["rope_freq_base", "float", 0],
  ["rope_freq_scale", "float", 0],
  ["yarn_ext_factor", "float", -1],
  ["yarn_attn_factor", "float", -1],
  ["yarn_beta_fast", "float", -1],
  ["yarn_beta_slow", "float", -1],
  ["yarn_orig_ctx", "uint32", 0],
  ["defrag_thold", "float", -1],
  ["cb_eval", "void *", undefined],
  ["cb_eval_user_data", "void *", undefined],
  ["type_k", "int32", 1],
  ["type_v", "int32", 1],
  ["abort_callback", "void *", undefined],
  ["abort_callback_data", "void *", undefined],
  ["embeddings", "bool", false],
  ["offload_kqv", "bool", true],
  ["no_perf", "bool", true],
  ["op_offload", "bool", true],
  ["swa_full", "bool", true],
  ["kv_unified", "bool", false],
  ["samplers", "void *", undefined],
  ["n_samplers", "size_t", 0],
];
/** Room for fields that a later release appends, so that a struct returned by value never overruns ours. */
const PADDING_BYTES = 64;
/** `llama_model_params` is passed on as it came. 72 bytes in v0.5.0. */
const MODEL_PARAMS_BYTES = 96 + PADDING_BYTES;

const LEVEL_WARN = 3;
const LEVEL_ERROR = 4;
const LEVEL_CONTINUE = 5;

let loaded: Libllama | undefined;

/** The library of this platform. Throws `library-unavailable`. Cost: about 30 ms the first time, then nothing. */
export function openLibllama(): Libllama {
  loaded ??= load();
  return loaded;
}

/** For `dynamo doctor`: loads the library and checks its layout. Throws `library-unavailable`. */
export function probeLibllama(): { version: string; path: string } {
  const { version, path: libraryPath } = openLibllama();
  return { version, path: libraryPath };
}

function platformPackage(): string {
  const { platform, arch } = process;
  if (platform === "darwin") return `@node-llama-cpp/mac-${arch === "arm64" ? "arm64-metal" : arch}`;
  if (platform === "win32") return `@node-llama-cpp/win-${arch}`;
  return `@node-llama-cpp/${platform}-${arch}`;
}

/** The folder with the shared libraries: `bins/<platform>` of the package that npm installed for this machine. */
function findLibraryFolder(require: NodeJS.Require): string {
  const name = platformPackage();
  let entry: string;
  try {
    entry = require.resolve(name);
  } catch (cause) {
    throw new DynamoError("library-unavailable", `the inference library for this platform is not installed`, {
      diagnostic: `package ${name} was not found: reinstall with optional dependencies, or use another engine`,
      cause,
    });
  }
  const bins = path.join(path.dirname(entry), "..", "bins");
  return path.join(bins, readdirSync(bins)[0] ?? "");
}

function load(): Libllama {
  const require = createRequire(import.meta.url);
  const folder = findLibraryFolder(require);
  try {
    return bind(require("koffi") as typeof Koffi, folder);
  } catch (cause) {
    if (cause instanceof DynamoError) throw cause;
    throw new DynamoError("library-unavailable", "the inference library could not be loaded", {
      diagnostic: `${folder}: ${String(cause)}`,
      cause,
    });
  }
}

type KoffiFunction = ReturnType<Koffi.LibraryHandle["func"]>;

function bind(koffi: typeof Koffi, folder: string): Libllama {
  const files = readdirSync(folder);
  const find = (pattern: RegExp): string => {
    const file = files.find((name) => pattern.test(name));
    if (file === undefined) throw new Error(`no file matches ${pattern.source}`);
    return path.join(folder, file);
  };
  // The parts find each other through global symbols, in this order; no search path needs to be set.
  const base = koffi.load(find(/^(lib)?ggml-base\.(so|dylib|dll)$/), { global: true });
  // A log callback written in JavaScript would be called on foreign threads and after its own thread's end. To drop
  // lines natively, any function will do that ignores its arguments: this one returns a constant.
  const dropLine = koffi.address(base.symbol("ggml_cycles_per_ms"));
  (base.func("ggml_log_set", "void", ["void *", "void *"]) as SetLog)(dropLine, null);
  const ggml = koffi.load(find(/^(lib)?ggml(\.v[\d.]+)?\.(so|dylib|dll)$/), { global: true });
  ggml.func("ggml_backend_load_all_from_path", "void", ["str"])(folder);
  const libraryPath = find(/^(lib)?llama(\.v[\d.]+)?\.(so|dylib|dll)$/);
  const library = koffi.load(libraryPath);

  const contextParams = koffi.struct({
    ...Object.fromEntries(CONTEXT_LAYOUT.map(([field, type]) => [field, type])),
    padding: koffi.array("uint8", PADDING_BYTES),
  });
  const modelParams = koffi.struct({ bytes: koffi.array("uint8", MODEL_PARAMS_BYTES) });
  const batch = koffi.struct({
    n_tokens: "int32",
    token: "void *",
    embd: "void *",
    pos: "void *",
    n_seq_id: "void *",
    seq_id: "void *",
    logits: "void *",
  });

  const setLog = library.func("llama_log_set", "void", ["void *", "void *"]) as SetLog;
  setLog(dropLine, null);

  const version = library.func("llama_version", "str", [])() as string;
  const contextDefaults = library.func("llama_context_default_params", contextParams, []) as () => StructValue;
  checkContextLayout(contextDefaults(), version);
  library.func("llama_backend_init", "void", [])();

  const call = (name: string, result: string, parameters: (string | Koffi.TypeObject)[]): KoffiFunction =>
    library.func(name, result, parameters);
  const pointer = "void *";
  const functions: LibllamaFunctions = {
    modelLoad: call("llama_model_load_from_file", pointer, ["str", modelParams]),
    modelFree: call("llama_model_free", "void", [pointer]),
    modelVocabulary: call("llama_model_get_vocab", pointer, [pointer]),
    modelTrainedContext: call("llama_model_n_ctx_train", "int32", [pointer]),
    modelHasEncoder: call("llama_model_has_encoder", "bool", [pointer]),
    modelIsRecurrent: call("llama_model_is_recurrent", "bool", [pointer]),
    modelIsHybrid: call("llama_model_is_hybrid", "bool", [pointer]),
    vocabularySize: call("llama_vocab_n_tokens", "int32", [pointer]),
    contextCreate: call("llama_init_from_model", pointer, [pointer, contextParams]),
    contextFree: call("llama_free", "void", [pointer]),
    contextCells: call("llama_n_ctx", "uint32", [pointer]),
    contextBatch: call("llama_n_batch", "uint32", [pointer]),
    contextSequences: call("llama_n_seq_max", "uint32", [pointer]),
    contextThreads: call("llama_n_threads", "int32", [pointer]),
    contextMemory: call("llama_get_memory", pointer, [pointer]),
    decode: call("llama_decode", "int32", [pointer, batch]),
    logits: call("llama_get_logits", pointer, [pointer]),
    logitsOfToken: call("llama_get_logits_ith", pointer, [pointer, "int32"]),
    memoryClear: call("llama_memory_clear", "void", [pointer, "bool"]),
    sequenceCopy: call("llama_memory_seq_cp", "void", [pointer, "int32", "int32", "int32", "int32"]),
    sequenceRemove: call("llama_memory_seq_rm", "bool", [pointer, "int32", "int32", "int32"]),
    sequenceFirst: call("llama_memory_seq_pos_min", "int32", [pointer, "int32"]),
    sequenceLast: call("llama_memory_seq_pos_max", "int32", [pointer, "int32"]),
    stateBytes: call("llama_state_seq_get_size_ext", "size_t", [pointer, "int32", "uint32"]),
    stateGet: call("llama_state_seq_get_data_ext", "size_t", [pointer, pointer, "size_t", "int32", "uint32"]),
    stateSet: call("llama_state_seq_set_data_ext", "size_t", [pointer, pointer, "size_t", "int32", "uint32"]),
  };

  return {
    version,
    path: libraryPath,
    functions,
    contextDefaults,
    modelDefaults: library.func("llama_model_default_params", modelParams, []) as () => StructValue,
    allocate(byteCount) {
      const handle: unknown = koffi.alloc("uint8", byteCount);
      const address = koffi.address(handle);
      const view = koffi.view(address, byteCount);
      new Uint8Array(view).fill(0);
      return { address, view };
    },
    free: (address) => koffi.free(address),
    view: (address, byteCount) => koffi.view(address, byteCount),
    captureLog: bindLog(koffi, setLog, dropLine),
  };
}

function checkContextLayout(defaults: StructValue, version: string): void {
  const different: string[] = [];
  for (const [field, , expected] of CONTEXT_LAYOUT) {
    const actual = typeof defaults[field] === "bigint" ? Number(defaults[field]) : defaults[field];
    if (expected !== undefined && actual !== expected) {
      different.push(`${field} should be ${expected}, is ${String(actual)}`);
    }
  }
  if (different.length === 0) return;
  throw new DynamoError("library-unavailable", "the inference library has an unexpected layout", {
    diagnostic: `llama_context_params of libllama ${version} differs: ${different.join("; ")}`,
  });
}

/** Assembles lines from the library's pieces: a piece of level "continue" belongs to the one before it. */
class LineAssembler {
  sink: (line: LibraryLine) => void = () => {};
  #level = 0;
  #pending = "";

  onText(level: number, text: string): void {
    if (level !== LEVEL_CONTINUE) this.#level = level;
    if (this.#level !== LEVEL_WARN && this.#level !== LEVEL_ERROR) return;
    this.#pending += text;
    if (!this.#pending.endsWith("\n")) return;
    this.sink({ level: this.#level === LEVEL_WARN ? "warn" : "error", text: this.#pending.trimEnd() });
    this.#pending = "";
  }
}

type SetLog = (callback: Pointer, userData: null) => void;

function bindLog(koffi: typeof Koffi, setLog: SetLog, dropLine: Pointer): Libllama["captureLog"] {
  const lines = new LineAssembler();
  let callback: Pointer | undefined;
  return (sink, during) => {
    // Registered once and kept: a line of another thread may still be on its way when we stop listening.
    callback ??= koffi.register(
      (level: number, text: string) => lines.onText(level, text),
      koffi.pointer(koffi.proto("void", ["int", "str", "void *"])),
    );
    lines.sink = sink;
    setLog(callback, null);
    try {
      return during();
    } finally {
      setLog(dropLine, null);
    }
  };
}
