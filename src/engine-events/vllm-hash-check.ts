import type { Logger } from "../observability/index.ts";
import { vllmBlockDigest, vllmNoneHash, type VllmHashAlgorithm } from "./vllm-block-hash.ts";
import type { VllmEvent, VllmStored } from "./vllm-events.ts";

/**
 * Whether an engine's block hashes are what we compute from its tokens, looked at while its events come. Routing here does
 * not need it (blocks are indexed by our hashes), but whoever shares blocks by the engine's own hashes does: KV tiers,
 * transfers by hash, several servers over one store. And a mismatch says that one side does not mean what the other thinks.
 *
 * Looked at are the first blocks of sequences (later ones hang on a digest of which an event tells 64 bits only): all until
 * something is known, then each 256th. A mismatch is logged once for each cause.
 */
export type HashState = "unchecked" | "match" | "mismatch" | "not-reproducible";
export type HashMismatch = "seed" | "algorithm" | "extra-keys" | "changed";

export interface VllmHashCheckOptions {
  readonly logger: Logger;
  /** As the engine tells it in its metrics; undefined = either of the reproducible ones. */
  readonly algorithm?: string | undefined;
  /** PYTHONHASHSEED that it may have besides "0" and none. */
  readonly seed?: string | undefined;
}

interface Recipe {
  readonly algorithm: VllmHashAlgorithm;
  readonly seed: string;
  readonly noneHash: Buffer;
}

const REPRODUCIBLE: readonly VllmHashAlgorithm[] = ["sha256", "sha256_cbor"];
/** What vLLM hashes in place of a seed since 0.28. */
const NO_SEED = "vllm-none-hash";
const SAMPLE = 256;
/** Of one event: enough to tell, whatever its length. */
const MAX_BLOCKS = 4;

const CAUSES: Readonly<Record<HashMismatch, string>> = {
  seed: "it has another seed: PYTHONHASHSEED is not set there (random in each process before 0.28), or set to another value than here; set PYTHONHASHSEED=0 for every server",
  algorithm: "neither its algorithm nor its seed is one that is known here; give it --prefix-caching-hash-algo sha256_cbor and PYTHONHASHSEED=0",
  "extra-keys": "only blocks with a LoRA adapter, a cache salt or pictures differ: this version puts those into the hash in another form (since 0.31)",
  changed: "they were equal before: the engine was restarted with another seed or algorithm; set PYTHONHASHSEED=0 for every server",
}; // prettier-ignore

export class VllmHashCheck {
  readonly #logger: Logger;
  readonly #algorithm: string | undefined;
  readonly #candidates: readonly Recipe[];
  #recipe: Recipe | undefined;
  #roots = 0;
  #told = new Set<HashMismatch>();
  cause: HashMismatch | undefined;
  checked = 0;
  mismatches = 0;

  constructor({ logger, algorithm, seed }: VllmHashCheckOptions) {
    this.#logger = logger;
    this.#algorithm = algorithm;
    const seeds = [...new Set(["0", NO_SEED, ...(seed === undefined ? [] : [seed])])];
    const algorithms = REPRODUCIBLE.filter((one) => algorithm === undefined || one === algorithm);
    this.#candidates = algorithms.flatMap((one) =>
      seeds.map((text) => ({ algorithm: one, seed: text, noneHash: vllmNoneHash(one, text) })),
    );
  }

  get state(): HashState {
    if (this.#candidates.length === 0) return "not-reproducible";
    if (this.checked === 0) return "unchecked";
    return this.cause === undefined ? "match" : "mismatch";
  }

  observe(events: readonly VllmEvent[]): void {
    if (this.#candidates.length === 0) return;
    for (const event of events) {
      if (event.type !== "stored" || event.parent !== undefined || event.isPaired) continue;
      if (event.tokenIds.length === 0 || event.hashes.length === 0) continue;
      // Groups of hybrid models hash with other block sizes, or tell tokens that are not theirs.
      if (event.blockSize * (event.hashes.length / 2) !== event.tokenIds.length) continue;
      if (this.checked > 0 && this.#roots++ % SAMPLE !== 0) continue;
      this.#check(event);
    }
  }

  describe(): Readonly<Record<string, unknown>> {
    const { state, checked, mismatches } = this;
    return {
      state,
      algorithm: this.#recipe?.algorithm ?? this.#algorithm ?? null,
      ...(this.#recipe === undefined ? {} : { seed: this.#recipe.seed === NO_SEED ? null : this.#recipe.seed }),
      checked,
      mismatches,
      ...(this.cause === undefined ? {} : { cause: this.cause, advice: CAUSES[this.cause] }),
    };
  }

  #check(event: VllmStored): void {
    this.checked++;
    const candidates = this.#recipe === undefined ? this.#candidates : [this.#recipe];
    const found = candidates.find((recipe) => agrees(recipe, event));
    if (found !== undefined) {
      this.#recipe = found;
      if (this.cause !== "extra-keys") this.cause = undefined;
      return;
    }
    this.mismatches++;
    this.#tell(this.#causeOf(event));
  }

  #causeOf(event: VllmStored): HashMismatch {
    if (event.extraKeys.some((keys) => keys !== undefined) || event.loraName !== undefined) return "extra-keys";
    if (this.#recipe !== undefined) {
      // Looked for anew from the next one on.
      this.#recipe = undefined;
      return "changed";
    }
    return this.#algorithm === undefined ? "algorithm" : "seed";
  }

  #tell(cause: HashMismatch): void {
    this.cause = cause;
    if (this.#told.has(cause)) return;
    this.#told.add(cause);
    this.#logger.warn({ cause, algorithm: this.#algorithm }, `the engine's block hashes are not those computed here: ${CAUSES[cause]}; routing goes by other hashes and is exact all the same`); // prettier-ignore
  }
}

function agrees({ algorithm, noneHash }: Recipe, { hashes, tokenIds, blockSize, extraKeys, loraName }: VllmStored): boolean {
  let parent = noneHash;
  const count = Math.min(MAX_BLOCKS, hashes.length / 2);
  for (let i = 0; i < count; i++) {
    const texts = (extraKeys[i] ?? []).map(({ text }) => text);
    const keys = texts.length === 0 && loraName !== undefined ? [loraName] : texts;
    parent = vllmBlockDigest(algorithm, parent, tokenIds.subarray(i * blockSize, (i + 1) * blockSize), keys.length === 0 ? undefined : keys); // prettier-ignore
    const [lo, hi] = [parent.readUInt32BE(parent.length - 4), parent.readUInt32BE(parent.length - 8)];
    if (lo !== hashes[2 * i] || hi !== hashes[2 * i + 1]) return false;
  }
  return true;
} // prettier-ignore
