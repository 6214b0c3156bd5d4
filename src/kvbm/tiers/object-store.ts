import { link, mkdir, open, readdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { DynamoError } from "../../errors/index.ts";
import { randomId64 } from "../../std/index.ts";
import type { ObjectAddress } from "../../transfer/s3/index.ts";
import type { ReadOptions } from "./tier.ts";

/** The few calls that the object tier makes; a bucket and a shared folder both have them. All reject with a `DynamoError`. */
export interface ObjectStore {
  /** Stores the object unless it is there. */
  put(key: string, pieces: readonly Buffer[], options: ReadOptions): Promise<void>;
  /** Fills the pieces from byte `start` on. `object-not-found` when there is none. */
  get(key: string, start: number, into: readonly Buffer[], options: ReadOptions): Promise<void>;
  /** A page of the keys with this prefix that come after `after`, in order; empty at the end. */
  list(prefix: string, after: string, options: ReadOptions): Promise<readonly string[]>;
  close(): Promise<void>;
}

/** The calls of transfer's `S3Client` that are used here. */
export interface BucketClient {
  put(
    at: ObjectAddress,
    body: readonly Buffer[],
    options: ReadOptions & { readonly ifAbsent: boolean },
  ): Promise<boolean>;
  get(at: ObjectAddress, start: number, into: readonly Buffer[], options: ReadOptions): Promise<void>;
  list(bucket: string, prefix: string, after: string, options: ReadOptions): Promise<{ readonly key: string }[]>;
  close(): Promise<void>;
}

export class BucketStore implements ObjectStore {
  readonly #client: BucketClient;
  readonly #bucket: string;

  constructor(client: BucketClient, bucket: string) {
    this.#client = client;
    this.#bucket = bucket;
  }

  async put(key: string, pieces: readonly Buffer[], options: ReadOptions): Promise<void> {
    await this.#client.put({ bucket: this.#bucket, key }, pieces, { ...options, ifAbsent: true });
  }

  get(key: string, start: number, into: readonly Buffer[], options: ReadOptions): Promise<void> {
    return this.#client.get({ bucket: this.#bucket, key }, start, into, options);
  }

  async list(prefix: string, after: string, options: ReadOptions): Promise<readonly string[]> {
    const page = await this.#client.list(this.#bucket, prefix, after, options);
    return page.map(({ key }) => key);
  }

  close(): Promise<void> {
    return this.#client.close();
  }
}

/** A folder that several machines mount. An object appears whole, by a link; the first of several writers wins. */
export class FolderStore implements ObjectStore {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
  }

  async put(key: string, pieces: readonly Buffer[]): Promise<void> {
    const path = join(this.#folder, key);
    const unfinished = `${path}.${randomId64().toString(16)}.tmp`;
    // The folder itself is the operator's: when it is gone (not mounted), it is not made anew.
    await mkdir(join(path, "..")).catch(ignoring("EEXIST"));
    try {
      await writeFile(unfinished, pieces);
      await link(unfinished, path).catch(ignoring("EEXIST"));
    } catch (thrown) {
      throw failed(thrown);
    } finally {
      await rm(unfinished, { force: true }).catch(() => undefined);
    }
  }

  async get(key: string, start: number, into: readonly Buffer[]): Promise<void> {
    const file = await open(join(this.#folder, key)).catch((thrown: NodeJS.ErrnoException) => {
      if (thrown.code !== "ENOENT") throw failed(thrown);
      throw new DynamoError("object-not-found", "the object is not in the store", { diagnostic: key });
    });
    try {
      // What is missing is found by the checksum.
      await file.readv(into, start);
    } catch (thrown) {
      throw failed(thrown);
    } finally {
      await file.close();
    }
  }

  async list(prefix: string, after: string): Promise<readonly string[]> {
    const names = await readdir(join(this.#folder, prefix)).catch((thrown: NodeJS.ErrnoException) => {
      if (thrown.code === "ENOENT") return [];
      throw failed(thrown);
    });
    const keys = names.filter((name) => !name.endsWith(".tmp")).map((name) => `${prefix}${name}`);
    return keys.filter((key) => key > after).sort();
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

function ignoring(code: string): (thrown: NodeJS.ErrnoException) => void {
  return (thrown) => {
    if (thrown.code !== code) throw failed(thrown);
  };
}

function failed(thrown: unknown): DynamoError {
  return new DynamoError("storage-failed", "the shared folder did not do what it was asked for", {
    diagnostic: thrown instanceof Error ? thrown.message : String(thrown),
    cause: thrown,
  });
}
