"""A GGUF file of a llama model with byte-level BPE as a folder that vLLM loads: weights in bfloat16, configuration,
tokenizer, chat template.

    python gguf-to-safetensors.py FILE.gguf FOLDER

vLLM has no GGUF loader any more. The converter to GGUF had put the two halves of each head's rotary dimensions into
alternating rows; that is undone here.
"""

import json
import pathlib
import sys

import gguf
import numpy
import safetensors.torch
import tokenizers
import torch

PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3


class Source:
    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.architecture = self.get("general.architecture")
        if self.architecture != "llama":
            sys.exit(f"expected a llama model, got {self.architecture}")

    def get(self, key, default=None):
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def of_model(self, key, default=None):
        return self.get(f"llama.{key}", default)

    def of_tokenizer(self, key, default=None):
        return self.get(f"tokenizer.ggml.{key}", default)


def heads_of(source, name):
    if name == "attn_q":
        return source.of_model("attention.head_count")
    if name == "attn_k":
        return source.of_model("attention.head_count_kv")
    return None


def weight_of(source, tensor):
    """Its name in vLLM and its values; None for what is no weight, such as tables of rotary factors."""
    values = numpy.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
    values = values.reshape([int(length) for length in reversed(tensor.shape)])
    parts = tensor.name.split(".")
    if parts[0] in WHOLE:
        return f"{WHOLE[parts[0]]}.weight", values
    if parts[0] != "blk" or parts[2] not in PER_LAYER:
        return None
    heads = heads_of(source, parts[2])
    if heads is not None:
        rows, columns = values.shape
        values = values.reshape(heads, rows // heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)
    return f"model.layers.{parts[1]}.{PER_LAYER[parts[2]]}.weight", values


def weights_of(source):
    found = (weight_of(source, tensor) for tensor in source.reader.tensors)
    return {
        name: torch.from_numpy(numpy.array(values, order="C")).to(torch.bfloat16)
        for name, values in (pair for pair in found if pair is not None)
    }


def config_of(source, weights):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": source.of_model("embedding_length"),
        "intermediate_size": source.of_model("feed_forward_length"),
        "num_hidden_layers": source.of_model("block_count"),
        "num_attention_heads": source.of_model("attention.head_count"),
        "num_key_value_heads": source.of_model("attention.head_count_kv"),
        "max_position_embeddings": source.of_model("context_length"),
        "rms_norm_eps": float(source.of_model("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(source.of_model("rope.freq_base", 10_000.0)),
        "vocab_size": len(source.of_tokenizer("tokens")),
        "bos_token_id": source.of_tokenizer("bos_token_id"),
        "eos_token_id": source.of_tokenizer("eos_token_id"),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


def tokenizer_of(source):
    tokens = source.of_tokenizer("tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in source.of_tokenizer("merges")]
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if source.of_tokenizer("pre") == "smollm":
        steps.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    built.decoder = tokenizers.decoders.ByteLevel()
    kinds = source.of_tokenizer("token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    built.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return built


def tokenizer_config_of(source):
    tokens = source.of_tokenizer("tokens")
    end = tokens[source.of_tokenizer("eos_token_id")]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[source.of_tokenizer("bos_token_id")],
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.of_model("context_length"),
        "chat_template": source.get("tokenizer.chat_template"),
    }


def main(path, folder):
    source = Source(path)
    out = pathlib.Path(folder)
    out.mkdir(parents=True)
    weights = weights_of(source)
    safetensors.torch.save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(source).save(str(out / "tokenizer.json"))
    for name, content in {"config": config_of(source, weights), "tokenizer_config": tokenizer_config_of(source)}.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
