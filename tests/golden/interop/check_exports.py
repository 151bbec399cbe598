#!/usr/bin/env python3
"""Loads exports of an artifact with the programs that they are made for, and compares.

    pip install gptqmodel compressed-tensors gguf transformers safetensors
    check_exports.py ARTIFACT EXPORT_DIRECTORY...

Which format a directory has, its walsh-export.json says. What each weight must be is computed here from
the artifact's own tensors, bit by bit, in float32.

dequantized         transformers.AutoModelForCausalLM; weights equal (rounded as the dtype says)
gptq_v2, gptq       GPTQModel's TorchLinear: its own conversion of version 1, its own dequantization,
                    with scales raised to float32 so that nothing is rounded; weights equal
compressed-tensors  PackedQuantizationCompressor.decompress under the scheme that config.json says;
                    weights equal
gguf                gguf.GGUFReader and gguf.dequantize, Q and K rows put back; weights equal

With the weights that each reader gives, transformers' logits in float32 are compared with those of the
artifact's own weights: at most 1e-2 of the largest logit (exact weights give 0).
"""

import argparse
import importlib.metadata
import json
import pathlib

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

TOLERANCE = 1e-2


def load_shards(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors.update(load_file(directory / shard))
    assert set(tensors) == set(index["weight_map"])
    return tensors


def unpack(words, bits):
    """[n*bits/32, k] words to [n, k] values, as a little-endian stream of bits down each column."""
    raw = np.ascontiguousarray(words.T).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little").reshape(words.shape[1], -1, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint32).T


def artifact_weights(directory):
    """Every weight of the artifact, float32."""
    tensors = load_shards(directory)
    weights = {}
    for name, value in tensors.items():
        linear, _, part = name.rpartition(".")
        if part in ("qzeros", "scales", "g_idx"):
            continue
        if part != "qweight":
            weights[name] = value.float()
            continue
        g_idx = tensors[f"{linear}.g_idx"].numpy()
        bits = value.shape[0] * 32 // g_idx.size
        codes = unpack(value.numpy().view(np.uint32), bits).T.astype(np.float32)
        qzeros = np.ascontiguousarray(tensors[f"{linear}.qzeros"].numpy().view(np.uint32).T)
        zeros = unpack(qzeros, bits).astype(np.float32)
        scales = tensors[f"{linear}.scales"].float().numpy().T
        weights[f"{linear}.weight"] = torch.from_numpy(scales[:, g_idx] * (codes - zeros[:, g_idx]))
    return weights


def gptq_weights(directory, version):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == version
    tensors = load_shards(directory)
    weights = {}
    for name, value in tensors.items():
        linear, _, part = name.rpartition(".")
        if part in ("qzeros", "scales", "g_idx"):
            continue
        if part != "qweight":
            weights[name] = value.float()
            continue
        cols, rows = tensors[f"{linear}.g_idx"].numel(), value.shape[1]
        bits = value.shape[0] * 32 // cols
        layer = TorchLinear(bits=bits, group_size=cols // tensors[f"{linear}.scales"].shape[0], sym=config["sym"],
                            desc_act=config["desc_act"], in_features=cols, out_features=rows, bias=False,
                            format=FORMAT(version))
        for buffer in ("qweight", "qzeros", "scales", "g_idx"):
            assert getattr(layer, buffer).shape == tensors[f"{linear}.{buffer}"].shape, (linear, buffer)
            setattr(layer, buffer, tensors[f"{linear}.{buffer}"].clone())
        if version == "gptq":
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer.scales = layer.scales.float()
        weights[f"{linear}.weight"] = layer.dequantize_weight().T.contiguous().float()
    return weights


def compressed_tensors_weights(directory):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    config = QuantizationConfig.model_validate(
        json.loads((directory / "config.json").read_text())["quantization_config"])
    assert config.format == "pack-quantized" and "lm_head" in config.ignore
    tensors = load_shards(directory)
    weights = {}
    for name, value in tensors.items():
        linear, _, part = name.rpartition(".")
        if not part.startswith("weight_"):
            weights[name] = value.float()
        if part != "weight_packed":
            continue
        scheme, = [s for s in config.config_groups.values() if linear in s.targets or s.targets == ["Linear"]]
        state = {key.removeprefix(f"{linear}."): tensor for key, tensor in tensors.items()
                 if key.startswith(f"{linear}.")}
        state["weight_scale"] = state["weight_scale"].float()
        weights[f"{linear}.weight"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].float()
    return weights


def gguf_weights(directory, config):
    import gguf
    path, = directory.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == config.vocab_size
    names = {f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}"
             for layer in range(config.num_hidden_layers)
             for theirs, ours in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
                                  ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
                                  ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                                  ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
                                  ("ffn_down", "mlp.down_proj"))}
    names |= {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    weights, types = {}, set()
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        types.add(tensor.tensor_type.name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        n_heads = heads.get(stem.rpartition(".")[2])
        if n_heads:   # the inverse of convert_hf_to_gguf's permute
            values = (values.reshape(n_heads, values.shape[0] // n_heads // 2, 2, *values.shape[1:])
                      .swapaxes(1, 2).reshape(values.shape))
        weights[f"{names[stem]}.{kind}"] = torch.from_numpy(np.array(values, dtype=np.float32))
    print("    types of the file:", ", ".join(sorted(types)))
    return weights


def logits_of(config, weights):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(weights)
    ids = torch.tensor([[(i * 37 + 5) % config.vocab_size for i in range(64)]])
    with torch.no_grad():
        return model(ids).logits


def check(directory, expected, config, expected_logits):
    manifest = json.loads((directory / "walsh-export.json").read_text())
    kind, dtype = manifest["format"], manifest["dtype"]
    if kind == "dequantized":
        model = AutoModelForCausalLM.from_pretrained(directory)
        weights = {name: value.float() for name, value in model.state_dict().items()}
        rounding = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
        expected = {name: value.to(rounding).float() for name, value in expected.items()}
    elif kind in ("gptq", "gptq_v2"):
        weights = gptq_weights(directory, kind)
    elif kind == "compressed-tensors":
        weights = compressed_tensors_weights(directory)
    else:
        weights = gguf_weights(directory, config)
    assert set(weights) == set(expected), set(weights) ^ set(expected)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    difference = (logits_of(config, weights) - expected_logits).abs().max() / expected_logits.abs().max()
    assert difference <= TOLERANCE, difference
    print(f"{directory.name}: {kind} {dtype}: {len(weights)} tensors equal, logits differ by {difference:.1e}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=pathlib.Path)
    parser.add_argument("exports", type=pathlib.Path, nargs="+")
    args = parser.parse_args()
    versions = {p: importlib.metadata.version(p)
                for p in ("torch", "transformers", "gptqmodel", "compressed-tensors", "gguf")}
    print(", ".join(f"{package} {version}" for package, version in versions.items()))
    config = AutoConfig.from_pretrained(args.artifact)
    del config.quantization_config
    expected = artifact_weights(args.artifact)
    expected_logits = logits_of(config, expected)
    for directory in args.exports:
        check(directory, expected, config, expected_logits)


if __name__ == "__main__":
    main()
