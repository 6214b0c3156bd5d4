import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { KNOWN_BAD, knownBad, memoryNeed, type GpuFacts, type Situation } from "./known-bad.ts";
import { machineFacts, modelFacts, parseGpus } from "./situation-facts.ts";

const GIB = 2 ** 30;
const h100: GpuFacts = { name: "H100", computeCapability: [9, 0], totalBytes: 80 * GIB, freeBytes: 79 * GIB };
const b200: GpuFacts = { name: "B200", computeCapability: [10, 0], totalBytes: 180 * GIB, freeBytes: 178 * GIB };

/** A good one; each test states what it changes. */
function situation(changes: Partial<Situation> = {}): Situation {
  return {
    engine: "vllm",
    version: "0.29.0",
    args: [],
    env: { PYTHONHASHSEED: "0" },
    model: modelWith({}),
    machine: { gpus: [h100], freeMemoryBytes: 64 * GIB },
    wantsKvEvents: true,
    blockSizeTokens: 0,
    ...changes,
  };
}

/** The shape of an 8B Llama. */
function modelWith(config: Record<string, unknown>, weightBytes = 16 * GIB): Situation["model"] {
  const llama = { model_type: "llama", num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128, torch_dtype: "bfloat16", max_position_embeddings: 131_072 };
  return { config: { ...llama, ...config }, weightBytes };
} // prettier-ignore

function transfer(kv_connector: string, extra: Record<string, unknown> = {}): string[] {
  return ["--kv-transfer-config", JSON.stringify({ kv_connector, kv_role: "kv_both", ...extra })];
}

function events(config: Record<string, unknown>): string[] {
  return [`--kv_events_config=${JSON.stringify({ enable_kv_cache_events: true, replay_endpoint: "tcp://*:5558", ...config })}`];
} // prettier-ignore

const nixl = transfer("NixlConnector");
const hybrid = modelWith({ model_type: "nemotron_h", hybrid_override_pattern: "M-M*" });
const fp8 = modelWith({ quantization_config: { quant_method: "modelopt", kv_cache_quant_algo: "FP8" } });
const latent = modelWith({ model_type: "kimi_linear", kv_lora_rank: 512 });
const cpu = { version: "0.29.0+cpu", machine: { gpus: [], freeMemoryBytes: 64 * GIB } };

/** For each entry: where it applies, and the nearest place where it does not. */
const CASES: Record<string, readonly [applies: Partial<Situation>, not: Partial<Situation>]> = {
  "hybrid-kv-with-nixl": [
    { version: "0.17.1", args: nixl, model: hybrid, wantsKvEvents: false },
    { version: "0.18.0", args: nixl, model: hybrid, wantsKvEvents: false },
  ],
  "mamba1-with-nixl": [
    { version: "0.23.0", args: nixl, model: modelWith({ model_type: "falcon_mamba" }) },
    { version: "0.24.0", args: nixl, model: modelWith({ model_type: "falcon_mamba" }) },
  ],
  "latent-attention-with-state-over-nixl": [
    { version: "0.26.0", args: transfer("MultiConnector", { kv_connector_extra_config: { connectors: [{ kv_connector: "NixlConnector" }] } }), model: latent },
    { version: "0.26.0", args: nixl, model: modelWith({ kv_lora_rank: 512 }) },
  ],
  "fp8-kv-with-nixl": [
    { version: "0.16.0", args: nixl, model: fp8 },
    { version: "0.16.0", args: [...nixl, "--kv-cache-dtype", "bfloat16"], model: fp8 },
  ],
  "fp8-kv-with-nixl-unproven": [
    { args: [...nixl, "--kv-cache-dtype=fp8_e4m3"] },
    { args: ["--kv-cache-dtype=fp8_e4m3"] },
  ],
  "flashinfer-autotune-on-blackwell": [
    { machine: { gpus: [b200], freeMemoryBytes: 0 } },
    { machine: { gpus: [b200], freeMemoryBytes: 0 }, args: ["--no-enable-flashinfer-autotune"] },
  ],
  "prefix-cache-off-with-kv-events": [
    { args: ["--no-enable-prefix-caching"] },
    { args: ["--no-enable-prefix-caching"], wantsKvEvents: false },
  ],
  "prefix-cache-off-with-kv-routing": [
    { server: { blockSizeTokens: 16, hasPrefixCache: false }, wantsKvEvents: false },
    { server: { blockSizeTokens: 16, hasPrefixCache: undefined }, wantsKvEvents: false },
  ],
  "kv-events-of-recurrent-model": [
    { version: "0.16.0", model: hybrid },
    { version: "0.16.0", model: hybrid, wantsKvEvents: false },
  ],
  "block-size-mismatch": [
    { args: ["--block-size", "32"], blockSizeTokens: 16 },
    { args: ["--block-size", "32"], blockSizeTokens: 32 },
  ],
  "hash-seed-not-shared": [
    { version: "0.27.0", env: {} },
    { version: "0.27.0", env: undefined },
  ],
  "hash-seed-not-shared-xxhash": [
    { env: {}, args: ["--prefix-caching-hash-algo", "xxhash_cbor"] },
    { env: {}, args: ["--prefix-caching-hash-algo", "sha256"] },
  ],
  "weights-do-not-fit": [
    { model: modelWith({}, 141 * GIB) },
    { model: modelWith({}, 141 * GIB), machine: { gpus: [h100, h100], freeMemoryBytes: 0 }, args: ["--tensor-parallel-size", "2", "--max-model-len", "1k"] },
  ],
  "too-little-memory-after-weights": [
    { model: modelWith({}, 60 * GIB) },
    { model: modelWith({}, 60 * GIB), args: ["--max-model-len=32k"] },
  ],
  "connector-renamed": [{ args: transfer("SharedStorageConnector") }, { version: "0.12.0", args: transfer("SharedStorageConnector") }],
  "connector-removed": [{ args: transfer("P2pNcclConnector") }, { version: "0.22.0", args: transfer("P2pNcclConnector") }],
  "push-connector-too-new": [{ version: "0.23.1", args: transfer("NixlPushConnector") }, { version: "0.24.0", args: transfer("NixlPushConnector") }],
  "offloading-on-cpu": [{ ...cpu, args: transfer("OffloadingConnector") }, { args: transfer("OffloadingConnector") }],
  "example-connector-prompt-lengths": [{ args: transfer("ExampleConnector") }, { args: nixl }],
  "lmcache-with-hybrid-model": [
    { args: transfer("LMCacheConnectorV1"), model: hybrid },
    { args: [...transfer("LMCacheConnectorV1"), "--disable-hybrid-kv-cache-manager"], model: hybrid },
  ],
  "ipc-events-with-ranks": [
    { args: [...events({ endpoint: "ipc:///tmp/kv" }), "-dp", "2"] },
    { args: events({ endpoint: "ipc:///tmp/kv" }) },
  ],
  "kv-events-without-replay": [{ args: events({ replay_endpoint: null }) }, { args: events({}) }],
  "compiling-on-cpu": [{ ...cpu }, { ...cpu, env: { PYTHONHASHSEED: "0", TORCHDYNAMO_DISABLE: "1" } }],
  "experts-without-groups": [{ version: "0.14.1", model: modelWith({ n_group: 0 }) }, { version: "0.14.1", model: modelWith({ n_group: 8 }) }],
}; // prettier-ignore

describe("known-bad combinations", () => {
  test("a plain model on a plain machine has none", () => {
    assert.deepEqual(knownBad(situation()), []);
    assert.deepEqual(knownBad(situation({ args: nixl })), []);
  });

  test("every entry has a case here, and its own name", () => {
    const ids = KNOWN_BAD.map(({ id }) => id);
    assert.deepEqual(Object.keys(CASES).toSorted(), ids.toSorted());
    assert.equal(new Set(ids).size, ids.length);
  });

  for (const { id, effect } of KNOWN_BAD) {
    test(`${id}: where it applies it is told with a way out, one step beside it is not`, () => {
      const [applies, not] = CASES[id]!;
      const found = knownBad(situation(applies)).find((finding) => finding.id === id);
      assert.equal(found?.effect, effect);
      assert.ok(found.text.includes(": ") && found.fix.length > 10);
      assert.equal(
        knownBad(situation(not)).find((finding) => finding.id === id),
        undefined,
      );
    });
  }

  test("what only some versions refuse is a warning while the version is not known", () => {
    const one = knownBad(situation({ version: "dev", args: nixl, model: hybrid, wantsKvEvents: false }));
    assert.deepEqual(
      one.filter(({ id }) => id === "hybrid-kv-with-nixl").map(({ effect }) => effect),
      ["warn"],
    );
    assert.equal(knownBad(situation({ version: undefined, args: ["--no-enable-prefix-caching"] }))[0]?.effect, "refuse");
  }); // prettier-ignore

  test("memory: weights by device, KV by the model's shape, the context asked for", () => {
    const need = memoryNeed(situation({ args: ["--tensor-parallel-size=2", "--max-model-len=1K"], machine: { gpus: [h100, h100], freeMemoryBytes: 0 } })); // prettier-ignore
    assert.equal(need?.weightBytes, 8 * GIB);
    // 2 (K and V) x 32 layers x 8 heads x 128 x 2 bytes, on two devices.
    assert.equal(need.kvBytesOfOne, (131_072 * 1_024) / 2);
    assert.equal(need.availableBytes, 0.9 * 80 * GIB);
    assert.equal(memoryNeed(situation({ model: undefined })), undefined);
    const latentNeed = memoryNeed(situation({ model: modelWith({ kv_lora_rank: 512, qk_rope_head_dim: 64, max_position_embeddings: 1 }) })); // prettier-ignore
    assert.equal(latentNeed?.kvBytesOfOne, 32 * 576 * 2);
  });

  test("facts: a folder's configuration and weights, GPUs as the driver's tool lists them", async () => {
    const folder = mkdtempSync(join(tmpdir(), "known-bad-"));
    try {
      assert.equal(modelFacts(folder), undefined);
      writeFileSync(join(folder, "config.json"), JSON.stringify({ model_type: "outer", text_config: { model_type: "inner" } })); // prettier-ignore
      mkdirSync(join(folder, "other"));
      for (const name of ["model-1.safetensors", "model-2.safetensors", "notes.txt"]) writeFileSync(join(folder, name), "12345"); // prettier-ignore
      assert.equal(modelFacts(folder)?.config["model_type"], "inner");
      assert.equal(modelFacts(folder)?.weightBytes, 10);
    } finally {
      rmSync(folder, { recursive: true });
    }
    assert.deepEqual(parseGpus("NVIDIA B200, 10.0, 183359, 182000\n\n[N/A], [N/A], [N/A], [N/A]\n"), [
      { name: "NVIDIA B200", computeCapability: [10, 0], totalBytes: 183_359 * 2 ** 20, freeBytes: 182_000 * 2 ** 20 },
    ]);
    const { freeMemoryBytes } = await machineFacts({ PATH: folder });
    assert.ok(freeMemoryBytes > 0);
  });
});
