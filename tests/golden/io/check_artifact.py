#!/usr/bin/env python3
"""Reads an artifact with the Python package safetensors, as other projects do, and checks it.

    pip install safetensors numpy ml_dtypes
    check_artifact.py DIRECTORY [--source HF_DIRECTORY]

Every file against walsh.json's digests; every quantized linear unpacked bit by bit: codes and zeros in
range, group index in order. With --source (of a model that was rounded to nearest, without rotation) every
weight is stored as the value of its group's grid that is nearest to the original. Knows the grids of
docs/artifact-format.md: GPTQ's, float zero points, codebooks.
"""

import argparse
import hashlib
import json
import pathlib
import re

import ml_dtypes  # noqa: F401, teaches numpy bfloat16
import numpy as np
from safetensors.numpy import load_file

CHUNK_BYTES = 64 << 20


def unpack(words, bits):
    """[n*bits/32, k] words to [n, k] values, as a little-endian stream of bits down each column."""
    raw = np.ascontiguousarray(words.T).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little")
    stream = stream.reshape(words.shape[1], -1, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint32).T


def check_digests(directory, text):
    manifest = json.loads(text)
    for name, entry in manifest["files"].items():
        data = (directory / name).read_bytes()
        assert len(data) == entry["size_bytes"], name
        chunks = [hashlib.sha256(data[i:i + CHUNK_BYTES]).hexdigest()
                  for i in range(0, len(data), CHUNK_BYTES)]
        assert chunks == entry["sha256"], name
    # The digest covers the text without its own line (members are sorted, and "files" follows).
    body = re.sub(r'^  "digest": "[0-9a-f]{64}",\n', "", text, flags=re.MULTILINE)
    assert hashlib.sha256(body.encode()).hexdigest() == manifest["digest"], "walsh.json's own digest"


def levels_of(tensors, linear, bits):
    """The values that codes stand for, [out, groups, 2^bits]."""
    if linear + ".levels" in tensors:
        assert linear + ".scales" not in tensors and linear + ".qzeros" not in tensors
        return tensors[linear + ".levels"].astype(np.float64).transpose(1, 0, 2)
    scales = tensors[linear + ".scales"].astype(np.float64).T              # [out, groups]
    if linear + ".zeros" in tensors:
        assert linear + ".qzeros" not in tensors
        zeros = tensors[linear + ".zeros"].astype(np.float64).T
    else:
        qzeros = tensors[linear + ".qzeros"]
        zeros = unpack(np.ascontiguousarray(qzeros.view(np.uint32).T), bits).astype(np.float64)
    assert zeros.shape == scales.shape
    return scales[:, :, None] * (np.arange(2**bits) - zeros[:, :, None])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--source", type=pathlib.Path)
    args = parser.parse_args()
    check_digests(args.directory, (args.directory / "walsh.json").read_text())
    config = json.loads((args.directory / "config.json").read_text())
    form = config["quantization_config"]["checkpoint_format"]
    assert form in ("gptq_v2", "walsh") and ("bits" in config["quantization_config"]) == (form == "gptq_v2")
    index = json.loads((args.directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors.update(load_file(args.directory / shard))
    assert set(tensors) == set(index["weight_map"])
    source = load_file(args.source / "model.safetensors") if args.source else {}
    n_linears = worst = 0
    for name in sorted(tensors):
        if not name.endswith(".qweight"):
            continue
        linear = name.removesuffix(".qweight")
        qweight, g_idx = tensors[name], tensors[linear + ".g_idx"]
        bits = qweight.shape[0] * 32 // g_idx.size
        codes = unpack(qweight.view(np.uint32), bits).T                    # [out, in]
        levels = levels_of(tensors, linear, bits)                          # [out, groups, 2^bits]
        groups = levels.shape[1]
        assert codes.shape == (levels.shape[0], g_idx.size)
        assert (g_idx == np.arange(g_idx.size) // (g_idx.size // groups)).all()
        assert np.isfinite(levels).all()
        n_linears += 1
        if linear + ".weight" in source:
            wanted = source[linear + ".weight"].astype(np.float64)
            spread = (levels.max(axis=2) - levels.min(axis=2))[:, g_idx]
            distances = np.stack([np.abs(levels[:, g_idx, k] - wanted) for k in range(2**bits)])
            stored = np.take_along_axis(distances, codes[None].astype(np.int64), axis=0)[0]
            excess = (stored - distances.min(axis=0)) / np.maximum(spread, 1e-30)
            worst = max(worst, float(excess.max()))
    assert n_linears > 0
    assert worst <= 1e-5, worst
    print(f"{args.directory.name}: {len(tensors)} tensors, {n_linears} quantized linears, "
          f"no weight is nearer to another value of its grid by more than {worst:.1e} of its range")


if __name__ == "__main__":
    main()
