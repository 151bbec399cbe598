#!/usr/bin/env python3
"""Writes gptq_checkpoints/: tiny checkpoints as other programs quantize them, and what they stand for.

    pip install gptqmodel
    make_gptq_checkpoints.py

Packing is done here, bit by bit, after the published layout; GPTQModel's own torch kernel unpacks and
dequantizes (its scales raised to float32, so that nothing is rounded), and its own converter turns
version 1 into version 2 first. expected.json has the SHA-256 of every dequantized weight, [out, in]
float32, and the logits that transformers gives with those weights in float32.
Each checkpoint: one layer, hidden 64, intermediate 128, 4 heads of 16, 2 KV heads, vocabulary 320.
"""

import hashlib
import json
import pathlib

import numpy as np
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 64, 128, 4, 2, 320
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
CASES = {
    # name: bits, group size, symmetric, act-order, version
    "v1-4bit-sym-act-order": (4, 32, True, True, 1),
    "v1-3bit-act-order": (3, 32, False, True, 1),
    "v2-2bit": (2, 64, False, False, 2),
    "v2-8bit-channel": (8, -1, False, False, 2),
}


def pack_stream(values, bits):
    """[n, k] values below 2^bits to [n*bits/32, k] words: a little-endian stream down each column."""
    n, k = values.shape
    stream = ((values[:, None, :].astype(np.int64) >> np.arange(bits)[None, :, None]) & 1).astype(np.uint8)
    packed = np.packbits(stream.reshape(n * bits, k), axis=0, bitorder="little")
    return np.ascontiguousarray(packed.T).view("<i4").T.copy()


def quantized_linear(rng, rows, cols, bits, group, symmetric, act_order, version):
    group = cols if group < 0 else group
    groups = cols // group
    top = 2**bits - 1
    codes = rng.integers(0, top + 1, (rows, cols))
    if symmetric:
        zeros = np.full((rows, groups), 2**(bits - 1))
    else:   # version 1 has no zero of 0
        zeros = rng.integers(1 if version == 1 else 0, top + 1, (rows, groups))
    scales = (rng.random((rows, groups)) * 0.2 / 2**bits + 1e-3).astype(np.float16)
    g_idx = np.arange(cols) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    stored = zeros - 1 if version == 1 else zeros
    return {
        "qweight": pack_stream(codes.T, bits),
        "qzeros": np.ascontiguousarray(pack_stream(stored, bits).T),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": g_idx.astype(np.int32),
    }, codes, zeros, scales


def dequantize(tensors, rows, cols, bits, group, symmetric, act_order, version):
    """[out, in] float32 by GPTQModel."""
    layer = TorchLinear(bits=bits, group_size=group, sym=symmetric, desc_act=act_order, in_features=cols,
                        out_features=rows, bias=False, format=FORMAT.GPTQ if version == 1 else FORMAT.GPTQ_V2)
    for name, value in tensors.items():
        setattr(layer, name, torch.from_numpy(value.copy()))
    if version == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.scales = layer.scales.float()
    return layer.dequantize_weight().T.contiguous().float().numpy()


def main():
    root = pathlib.Path(__file__).with_name("gptq_checkpoints")
    torch.manual_seed(0)
    prompt = [(i * 37 + 5) % VOCAB for i in range(24)]
    for index, (name, case) in enumerate(CASES.items()):
        bits, group, symmetric, act_order, version = case
        rng = np.random.default_rng(100 + index)
        directory = root / name
        directory.mkdir(parents=True, exist_ok=True)
        config = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
                             num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
                             max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
                             eos_token_id=None)
        model = LlamaForCausalLM(config).float().eval()
        stored, hashes = {}, {}
        state = model.state_dict()
        for suffix, (rows, cols) in LINEARS.items():
            linear = f"model.layers.0.{suffix}"
            tensors, codes, zeros, scales = quantized_linear(rng, rows, cols, *case)
            weight = dequantize(tensors, rows, cols, *case)
            # The formula, so that two descriptions of the layout agree before anything is written.
            g_idx = tensors["g_idx"]
            ours = scales.astype(np.float32)[:, g_idx] * (codes - zeros[:, g_idx]).astype(np.float32)
            assert (ours == weight).all(), linear
            state[f"{linear}.weight"] = torch.from_numpy(weight)
            hashes[linear] = hashlib.sha256(weight.astype("<f4").tobytes()).hexdigest()
            stored.update({f"{linear}.{part}": value for part, value in tensors.items()})
            if version == 1:   # as AutoGPTQ writes them
                stored[f"{linear}.bias"] = np.zeros(rows, dtype=np.float16)
        for tensor, value in state.items():
            if tensor.endswith("weight") and f"{tensor.removesuffix('.weight')}.qweight" not in stored:
                # Values that both F16 and BF16 hold.
                rounded = value.to(torch.bfloat16).to(torch.float16)
                stored[tensor] = rounded.numpy()
                state[tensor] = rounded.float()
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].tolist()
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        written = json.loads(config.to_json_string(use_diff=False))
        keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps",
                "hidden_act", "model_type")
        written = {key: written[key] for key in keep}
        written |= {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0, "torch_dtype": "float16"}
        quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
                        "desc_act": act_order, "damp_percent": 0.01, "true_sequential": True}
        if version == 2:
            quantization["checkpoint_format"] = "gptq_v2"
        written["quantization_config"] = quantization
        (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        (directory / "expected.json").write_text(json.dumps({"weights": hashes, "logits": logits}) + "\n")
        print(name, sum(p.stat().st_size for p in directory.iterdir()), "bytes")


if __name__ == "__main__":
    main()
