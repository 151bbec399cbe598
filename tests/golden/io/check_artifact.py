#!/usr/bin/env python3
"""Reads an artifact with the Python package safetensors, as other projects do, and checks it.

    pip install safetensors numpy ml_dtypes
    check_artifact.py DIRECTORY [--source HF_DIRECTORY]

Every file against walsh.json's digests; every quantized linear unpacked bit by bit: codes and zeros in
range, group index in order. With --source (of a model that was rounded to nearest, without rotation) every
weight is within half a step of the original, but for clipped ones at the ends of the grid.
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--source", type=pathlib.Path)
    args = parser.parse_args()
    check_digests(args.directory, (args.directory / "walsh.json").read_text())
    config = json.loads((args.directory / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
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
        qweight, qzeros = tensors[name], tensors[linear + ".qzeros"]
        scales, g_idx = tensors[linear + ".scales"], tensors[linear + ".g_idx"]
        bits = qweight.shape[0] * 32 // g_idx.size
        codes = unpack(qweight.view(np.uint32), bits).T                    # [out, in]
        zeros = unpack(np.ascontiguousarray(qzeros.view(np.uint32).T), bits)   # [out, groups]
        groups = scales.shape[0]
        assert codes.shape == (scales.shape[1], g_idx.size) and zeros.shape == (scales.shape[1], groups)
        assert (g_idx == np.arange(g_idx.size) // (g_idx.size // groups)).all()
        assert np.isfinite(scales.astype(np.float32)).all()
        n_linears += 1
        if linear + ".weight" in source:
            s = scales.astype(np.float32).T[:, g_idx]
            weights = s * (codes.astype(np.float32) - zeros.astype(np.float32)[:, g_idx])
            inside = (codes > 0) & (codes < 2**bits - 1)
            steps = np.abs(weights - source[linear + ".weight"]) / s
            worst = max(worst, float(steps[inside].max()))
    assert n_linears > 0
    if source:
        assert worst <= 0.51, worst
    print(f"{args.directory.name}: {len(tensors)} tensors, {n_linears} quantized linears, "
          f"worst distance inside the grid {worst:.3f} steps")


if __name__ == "__main__":
    main()
