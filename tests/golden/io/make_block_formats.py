#!/usr/bin/env python3
"""Writes block_formats.bin: random blocks of each ggml format and what they mean as floats.

The floats come from the Python package gguf (pip install gguf==0.19.0 numpy), so they are independent
of worker/io/storage_type.cc. Layout, little-endian, one record for each format:

    u32 ggml type, u32 bytes, u32 floats, bytes, float32 values
"""

import pathlib
import struct

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

# Byte offsets of the half-precision fields (scales, minimums) in a block: random bytes there would be
# infinities and NaNs.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
}


def blocks_of(kind, rng):
    elements, size = GGML_QUANT_SIZES[kind]
    n = 96 // elements if elements == 32 else 2
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for offset in HALVES[kind]:
        values = (rng.standard_normal(n) * 0.05).astype(np.float16)
        blocks[:, offset:offset + 2] = values.view(np.uint8).reshape(n, 2)
    return blocks


def main():
    rng = np.random.default_rng(20250503)
    records = []
    for kind in HALVES:
        blocks = blocks_of(kind, rng)
        records.append((kind, blocks.tobytes(), dequantize(blocks, kind).astype(np.float32)))
    for kind, dtype in ((T.F32, np.float32), (T.F16, np.float16)):
        values = rng.standard_normal(64).astype(dtype)
        records.append((kind, values.tobytes(), values.astype(np.float32)))
    bf16 = rng.standard_normal(64).astype(np.float32).view(np.uint32) >> 16
    records.append((T.BF16, bf16.astype(np.uint16).tobytes(),
                    (bf16.astype(np.uint32) << 16).view(np.float32)))
    # Subnormal, largest and negative zero halves.
    edge = np.array([0x0001, 0x03ff, 0x0400, 0x7bff, 0x8000, 0x8001, 0xfbff, 0x3c00], np.uint16)
    records.append((T.F16, edge.tobytes(), edge.view(np.float16).astype(np.float32)))
    out = bytearray()
    for kind, stored, values in records:
        out += struct.pack("<III", int(kind), len(stored), values.size)
        out += stored + np.ascontiguousarray(values, dtype="<f4").tobytes()
    pathlib.Path(__file__).with_name("block_formats.bin").write_bytes(out)
    print(f"{len(records)} records, {len(out)} bytes")


if __name__ == "__main__":
    main()
