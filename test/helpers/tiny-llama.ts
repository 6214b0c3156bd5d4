import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { BYTE_TOKENS, byteArtifact } from "../../src/model/index.ts";
import { SeededRandom } from "../../src/std/index.ts";

/**
 * A Llama of a few million parameters with random weights that spread wide enough for every answer to depend on all of its
 * prompt, as a folder that stock engines load: config, safetensors, and the tokenizer whose tokens are bytes. The same seed
 * gives the same files. Many thin layers: a step takes some milliseconds, as a real model's does. One that takes none lets a
 * server's frontend fall behind on a busy machine, which then sends its answers in pieces of 64 KB.
 */
const HIDDEN = 128;
const INTERMEDIATE = 256;
const LAYERS = 40;
const HEADS = 4;
const KV_HEADS = 2;
const HEAD = 32;
const VOCABULARY = BYTE_TOKENS.vocabularySize;

export function writeTinyLlama(folder: string, seed = 7): void {
  mkdirSync(folder, { recursive: true });
  const { tokenizerJson, chatTemplate } = byteArtifact();
  const dump = (name: string, value: unknown): void => writeFileSync(join(folder, name), JSON.stringify(value));
  dump("tokenizer.json", tokenizerJson);
  dump("tokenizer_config.json", {
    tokenizer_class: "PreTrainedTokenizerFast",
    bos_token: "<|endoftext|>",
    eos_token: "<|im_end|>",
    pad_token: "<|endoftext|>",
    model_max_length: 4_096,
    clean_up_tokenization_spaces: false,
    chat_template: chatTemplate,
  });
  dump("config.json", {
    architectures: ["LlamaForCausalLM"],
    model_type: "llama",
    hidden_size: HIDDEN,
    intermediate_size: INTERMEDIATE,
    num_hidden_layers: LAYERS,
    num_attention_heads: HEADS,
    num_key_value_heads: KV_HEADS,
    head_dim: HEAD,
    vocab_size: VOCABULARY,
    max_position_embeddings: 4_096,
    rms_norm_eps: 1e-5,
    rope_theta: 10_000,
    hidden_act: "silu",
    tie_word_embeddings: false,
    bos_token_id: BYTE_TOKENS.endOfText,
    eos_token_id: BYTE_TOKENS.imEnd,
    pad_token_id: BYTE_TOKENS.endOfText,
    torch_dtype: "float32",
    attention_bias: false,
  });
  writeFileSync(join(folder, "model.safetensors"), safetensors(tensors(seed)));
}

interface Tensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

function tensors(seed: number): Map<string, Tensor> {
  const random = new SeededRandom(seed);
  const scale = Math.sqrt(2 / LAYERS);
  const normal = (): number =>
    Math.sqrt(-2 * Math.log(1 - random.nextFloat())) * Math.cos(2 * Math.PI * random.nextFloat());
  const matrix = (rows: number, columns: number, scale: number): Tensor => ({
    shape: [rows, columns],
    data: Float32Array.from({ length: rows * columns }, () => scale * normal()),
  });
  const ones = (): Tensor => ({ shape: [HIDDEN], data: new Float32Array(HIDDEN).fill(1) });
  const all = new Map<string, Tensor>([
    ["model.embed_tokens.weight", matrix(VOCABULARY, HIDDEN, 1)],
    ["lm_head.weight", matrix(VOCABULARY, HIDDEN, 0.3)],
    ["model.norm.weight", ones()],
  ]);
  for (let layer = 0; layer < LAYERS; layer++) {
    const name = (part: string): string => `model.layers.${layer}.${part}.weight`;
    all.set(name("self_attn.q_proj"), matrix(HEADS * HEAD, HIDDEN, 0.15));
    all.set(name("self_attn.k_proj"), matrix(KV_HEADS * HEAD, HIDDEN, 0.15));
    all.set(name("self_attn.v_proj"), matrix(KV_HEADS * HEAD, HIDDEN, 0.3));
    all.set(name("self_attn.o_proj"), matrix(HIDDEN, HEADS * HEAD, 0.3 * scale));
    all.set(name("mlp.gate_proj"), matrix(INTERMEDIATE, HIDDEN, 0.1));
    all.set(name("mlp.up_proj"), matrix(INTERMEDIATE, HIDDEN, 0.1));
    all.set(name("mlp.down_proj"), matrix(HIDDEN, INTERMEDIATE, 0.1 * scale));
    all.set(name("input_layernorm"), ones());
    all.set(name("post_attention_layernorm"), ones());
  }
  return all;
}

/** u64 length of a JSON head, the head, the numbers one after the other. */
function safetensors(all: ReadonlyMap<string, Tensor>): Buffer {
  const head: Record<string, unknown> = { __metadata__: { format: "pt" } };
  let at = 0;
  for (const [name, { shape, data }] of all) {
    head[name] = { dtype: "F32", shape, data_offsets: [at, at + data.byteLength] };
    at += data.byteLength;
  }
  let text = JSON.stringify(head);
  text = text.padEnd(Math.ceil(text.length / 8) * 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, Buffer.from(text), ...[...all.values()].map(({ data }) => Buffer.from(data.buffer))]);
}
