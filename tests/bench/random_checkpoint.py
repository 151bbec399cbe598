#!/usr/bin/env python3
"""random_checkpoint.py SHAPE FOLDER: a HF directory of a model's true shape with seeded random weights.

For measurements of whole jobs where no such model can be had: nothing about its quality means anything.
Weights are normal with variance 1/in (a tenth of that deviation for the linears that write the residual
stream), norms near 1, stored in BF16, in shards of 4 GB. The tokenizer is a byte-level BPE whose merges make a token
of a space and the one to three letters after it, and of as many longer ones as fill the vocabulary. calibration.txt
beside them has seeded words of one to three letters, about as unequal in frequency as those of a language (Zipf): a
token each, enough for 128 windows of 2,048 and 20 more for evaluation. Needs torch; uses a GPU where there is one.
"""

import itertools
import json
import os
import random
import string
import struct
import sys

import torch

# hidden, intermediate, layers, heads, KV heads, head width, vocabulary; all as LlamaForCausalLM, without biases
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152),
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 128, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128, 128256),
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128, 128256),
}
SHARD_BYTES = 4 << 30
TEXT_WORDS = 330_000
SPACE = "\u0120"  # GPT-2's letter for the space


def tensors(shape, n_layers):
    """Names, shapes and standard deviations; a deviation of None is a norm."""
    hidden, inter, _, heads, kv_heads, head_dim, vocab = shape
    yield "model.embed_tokens.weight", (vocab, hidden), 1.0
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        for name, out in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            yield f"{prefix}self_attn.{name}_proj.weight", (out, hidden), hidden**-0.5
        width = heads * head_dim
        yield f"{prefix}self_attn.o_proj.weight", (hidden, width), 0.1 * width**-0.5
        yield f"{prefix}mlp.gate_proj.weight", (inter, hidden), hidden**-0.5
        yield f"{prefix}mlp.up_proj.weight", (inter, hidden), hidden**-0.5
        yield f"{prefix}mlp.down_proj.weight", (hidden, inter), 0.1 * inter**-0.5
        yield f"{prefix}input_layernorm.weight", (hidden,), None
        yield f"{prefix}post_attention_layernorm.weight", (hidden,), None
    yield "model.norm.weight", (hidden,), None
    yield "lm_head.weight", (vocab, hidden), hidden**-0.5


def make(index, shape, deviation, device):
    generator = torch.Generator(device=device).manual_seed(index + 1)
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    values = 1 + 0.1 * values if deviation is None else values * deviation
    return values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()


def write_shard(path, entries, device):
    header, offset = {}, 0
    for _, name, shape, _ in entries:
        size = 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for index, _, shape, deviation in entries:
            file.write(make(index, shape, deviation, device))


def byte_alphabet():
    """GPT-2's letters for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(printable)))
    return [letters[byte] for byte in range(256)]


def merges(n):
    """n merges of a space with a letter, of those with another, and so on."""
    known = [SPACE]
    while True:
        grown = [(left, right) for left in known for right in string.ascii_lowercase]
        yield from grown[:n]
        n -= len(grown)
        if n <= 0:
            return
        known = [left + right for left, right in grown]


def text():
    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product(string.ascii_lowercase, repeat=n)]
    generator = random.Random(1)
    generator.shuffle(words)
    return " ".join(generator.choices(words, [1 / (rank + 2.7) for rank in range(len(words))], k=TEXT_WORDS))


def write_tokenizer(folder, vocab):
    added = [{"id": 256, "content": "<s>"}, {"id": 257, "content": "</s>"}]
    for token in added:
        token.update(special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)
    alphabet = byte_alphabet()
    pairs = list(merges(vocab - 258))
    tokens = {c: i for i, c in enumerate(alphabet)}
    tokens.update({left + right: 258 + i for i, (left, right) in enumerate(pairs)})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": tokens, "merges": [" ".join(pair) for pair in pairs]},
    }  # fmt: skip
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(tokenizer, file)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}, file)


def main():
    name, folder = sys.argv[1:3]
    shape = SHAPES[name]
    hidden, inter, n_layers, heads, kv_heads, head_dim, vocab = shape
    n_layers = int(sys.argv[3]) if len(sys.argv) > 3 else n_layers
    os.makedirs(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inter,
        "num_hidden_layers": n_layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    write_tokenizer(folder, vocab)

    shards, size = [[]], 0
    for index, (tensor, dims, deviation) in enumerate(tensors(shape, n_layers)):
        n_bytes = 2 * int(torch.tensor(dims).prod())
        if size + n_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((index, tensor, dims, deviation))
        size += n_bytes
    weight_map = {}
    for i, entries in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(os.path.join(folder, file), entries, device)
        weight_map.update({entry[1]: file for entry in entries})
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump({"metadata": {}, "weight_map": weight_map}, file)

    with open(os.path.join(folder, "calibration.txt"), "w", encoding="utf-8") as file:
        file.write(text())


if __name__ == "__main__":
    main()
