#!/usr/bin/env python3
"""Makes tests/golden/models: a tiny random model of each family and the logits that transformers gives for it.

    pip install torch transformers safetensors
    python3 tests/golden/models/make_golden_models.py [FAMILY…]

Each folder holds config.json and model.safetensors as transformers writes them, and what the tests compare with:
expected.json (token ids, versions, the shape of the logits) and logits.bin (little-endian floats, [tokens, vocab]).
Weights are stored in bf16 and the logits computed in float32 from exactly those values, so that the files are small
and nothing is rounded twice. The prompt is longer than every sliding window and all norms differ from one another.
"""
import json
import pathlib
import shutil
import sys

import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
VOCAB = 320  # of the tokenizer that tests/testing/tiny_model.h writes
N_TOKENS = 80
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=316, eos_token_id=317, pad_token_id=None,
    attention_dropout=0.0,
)

FAMILIES = {
    # QKV biases, o_proj without one; tied head.
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, rope_theta=1e6, tie_word_embeddings=True),
    # The same with a sliding window from the second layer on.
    "qwen2_sliding": lambda: transformers.Qwen2Config(
        **SHAPE, rope_theta=1e6, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    # RMSNorm of each head of q and k, heads wider than hidden / heads.
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32, rope_theta=1e6, rms_norm_eps=1e-6),
    # A sliding window in every layer.
    "mistral": lambda: transformers.MistralConfig(**SHAPE, head_dim=16, sliding_window=24, rope_theta=1e6),
    # Fused qkv_proj and gate_up_proj, a sliding window.
    "phi3": lambda: transformers.Phi3Config(**SHAPE, sliding_window=31),
    # Norms of 1 + weight before and behind each sublayer and on q and k, a scaled embedding, its own scale of the
    # scores, GELU, sliding layers with their own RoPE base; the third layer sees everything.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=32,
        query_pre_attn_scalar=48, sliding_window=24, rms_norm_eps=1e-6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]),
}


def randomize(model, generator):
    """Linears with variance 1 / inputs, norms and biases that no two positions share; all bf16 values."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                value /= weight.shape[1] ** 0.5
            elif name.endswith("bias"):
                value *= 0.3
            else:
                value = weight + 0.2 * value  # ones, or zeros where the norm is 1 + weight
            weight.copy_(value.bfloat16().float())


def make(family):
    out = HERE / family
    shutil.rmtree(out, ignore_errors=True)
    config = FAMILIES[family]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(20)
    randomize(model, generator)
    tokens = torch.randint(0, 316, (1, N_TOKENS), generator=generator)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0].float()
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("generation_config.json",):
        (out / name).unlink(missing_ok=True)
    (out / "logits.bin").write_bytes(logits.numpy().astype("<f4").tobytes())
    expected = {
        "tokens": tokens[0].tolist(),
        "shape": list(logits.shape),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    (out / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        make(name)
        print(name)
