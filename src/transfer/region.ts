import assert from "node:assert/strict";
import { DynamoError } from "../errors/index.ts";
import { MEMORY_KINDS, type Memory, type MemoryKind, type RegisterOptions, type RemoteAccess } from "./base.ts";
import { MAX_NAME_BYTES, MAX_REGIONS } from "./limits.ts";

/**
 * Registered memory of this agent. An id is `generation << 16 | slot`: the slot finds the region, the generation tells a
 * reader with old metadata that what it knew is gone. Every access from outside goes through `RegionTable.check`, which is
 * the only place that turns numbers from another process into memory.
 *
 * A region in use is pinned: deregistering refuses new uses at once and resolves when the last pin is gone.
 */
export class Region {
  readonly id: number;
  readonly memory: Memory;
  readonly kind: MemoryKind;
  readonly byteLength: number;
  readonly label: string;
  readonly remoteAccess: RemoteAccess;
  /** Host memory as bytes; empty for the other kinds. */
  readonly bytes: Buffer;
  /** Where host memory is when it was allocated by the agent: page-aligned. */
  readonly address: bigint | undefined;
  registered = true;
  #pinCount = 0;
  #whenUnpinned: (() => void)[] = [];

  constructor(id: number, memory: Memory, options: RegisterOptions & { readonly address?: bigint | undefined }) {
    this.id = id;
    this.memory = memory;
    this.kind = memory.kind;
    this.byteLength = memoryBytes(memory);
    this.label = options.label ?? "";
    this.remoteAccess = options.remoteAccess ?? (memory.kind === "host" ? "read-write" : "none");
    this.address = options.address;
    this.bytes =
      memory.kind === "host"
        ? Buffer.from(memory.bytes.buffer, memory.bytes.byteOffset, memory.bytes.byteLength)
        : Buffer.alloc(0);
  }

  pin(): void {
    this.#pinCount++;
  }

  unpin(): void {
    assert.ok(this.#pinCount > 0, "a region is unpinned as often as it was pinned");
    if (--this.#pinCount === 0) for (const resolve of this.#whenUnpinned.splice(0)) resolve();
  }

  get pinned(): boolean {
    return this.#pinCount > 0;
  }

  unpinned(): Promise<void> {
    if (this.#pinCount === 0) return Promise.resolve();
    return new Promise((resolve) => this.#whenUnpinned.push(resolve));
  }
}

function memoryBytes(memory: Memory): number {
  switch (memory.kind) {
    case "host":
      return memory.bytes.byteLength;
    case "object":
      return memory.slotBytes * memory.slotCount;
    case "file":
    case "device":
      return memory.byteLength;
  }
}

/** The memory of a call that breaks its own promises: refused before anything is registered. */
export function checkMemory(memory: Memory, options: RegisterOptions): void {
  const refuse = (message: string): never => {
    throw new DynamoError("transfer-out-of-bounds", message);
  };
  if (!MEMORY_KINDS.includes(memory.kind)) refuse(`memory.kind: expected one of ${MEMORY_KINDS.join(", ")}`);
  const byteLength = memoryBytes(memory);
  if (!Number.isSafeInteger(byteLength) || byteLength <= 0) {
    refuse(`memory: expected a positive number of bytes, got ${byteLength}`);
  }
  if (memory.kind === "object" && !(Number.isSafeInteger(memory.slotBytes) && Number.isSafeInteger(memory.slotCount))) {
    refuse("memory.slotBytes, memory.slotCount: expected whole numbers");
  }
  if (Buffer.byteLength(options.label ?? "") > MAX_NAME_BYTES) refuse(`label: longer than ${MAX_NAME_BYTES} bytes`);
  const access = options.remoteAccess ?? "none";
  if ((memory.kind === "file" || memory.kind === "object") && access !== "none") {
    refuse(`remoteAccess: ${memory.kind} memory is never reachable from another process, got ${access}`);
  }
}

const SLOT_MASK = 0xffff;

export class RegionTable {
  readonly #slots: (Region | undefined)[] = [];
  readonly #generations: number[] = [];
  readonly #free: number[] = [];

  add(memory: Memory, options: RegisterOptions & { readonly address?: bigint | undefined }): Region {
    checkMemory(memory, options);
    const slot = this.#free.pop() ?? this.#slots.length;
    if (slot >= MAX_REGIONS) throw new DynamoError("transfer-full", `more than ${MAX_REGIONS} registered regions`);
    const generation = ((this.#generations[slot] ?? 0) + 1) & SLOT_MASK;
    this.#generations[slot] = generation;
    const region = new Region(((generation << 16) | slot) >>> 0, memory, options);
    this.#slots[slot] = region;
    return region;
  }

  remove(region: Region): void {
    const slot = region.id & SLOT_MASK;
    assert.equal(this.#slots[slot], region, "a region is removed once");
    region.registered = false;
    this.#slots[slot] = undefined;
    this.#free.push(slot);
  }

  /** The region with this id and generation, if it is registered. */
  find(id: number): Region | undefined {
    const region = this.#slots[id & SLOT_MASK];
    return region?.id === id ? region : undefined;
  }

  all(): Region[] {
    return this.#slots.filter((region) => region !== undefined);
  }

  /**
   * The region, when a peer may do this with these bytes of it. Throws `transfer-stale` for an id of the past,
   * `transfer-out-of-bounds` for everything else that is not allowed.
   */
  check(id: number, offset: number, byteCount: number, access: "read" | "write"): Region {
    const slot = id & SLOT_MASK;
    const region = this.#slots[slot];
    if (region?.id !== id) {
      const generation = this.#generations[slot];
      // A generation that was never given is no old metadata but a guess.
      if (generation === undefined || id >>> 16 > generation || id >>> 16 === 0) {
        throw new DynamoError("transfer-out-of-bounds", "the transfer names memory that was never registered");
      }
      throw new DynamoError("transfer-stale", "the memory was deregistered after its metadata was taken");
    }
    if (region.remoteAccess !== "read-write" && region.remoteAccess !== access) {
      throw new DynamoError("transfer-out-of-bounds", `the memory is not registered for remote ${access}`);
    }
    if (!(offset >= 0 && Number.isSafeInteger(offset) && byteCount > 0 && offset + byteCount <= region.byteLength)) {
      throw new DynamoError("transfer-out-of-bounds", "the transfer reaches outside the registered memory", {
        diagnostic: `[${offset}, ${offset + byteCount}) of ${region.byteLength} bytes`,
      });
    }
    return region;
  }
}
