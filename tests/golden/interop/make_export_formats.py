#!/usr/bin/env python3
"""Writes export_formats.bin: small quantized matrices as other programs store them.

    pip install torch compressed-tensors gguf numpy
    make_export_formats.py

weight_packed and weight_zero_point come from compressed-tensors' own pack_to_int32, of signed integers,
and its own unpack_from_int32 and dequantize give the weights back exactly. The blocks of ggml are put
together by numpy after ggml-common.h, and gguf's own dequantize gives the weights back exactly. The
qzeros of GPTQ's first version come from the loops of AutoGPTQ's pack, of zeros less one.
Layout, little-endian, one record for each matrix:

    u32 bits, rows (out), cols (in), group_size
    u8 codes [rows, cols], u8 zeros [rows, groups], f16 scales [rows, groups]
    u32 n, n bytes of weight_packed; u32 n, n bytes of weight_zero_point
    u32 n, n bytes of qzeros of version 1
    u32 ggml type, u32 n, n bytes of blocks (n is 0 where no type holds the matrix)
"""

import pathlib
import struct

import gguf
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32


def compressed_tensors(codes, zeros, scales, bits):
    """weight_packed and weight_zero_point, after a round trip through the library."""
    middle = 1 << (bits - 1)
    signed = torch.from_numpy((codes.astype(np.int16) - middle).astype(np.int8))
    signed_zeros = torch.from_numpy((zeros.astype(np.int16) - middle).astype(np.int8))
    packed = pack_to_int32(signed, bits)
    packed_zeros = pack_to_int32(signed_zeros, bits, packed_dim=0).contiguous()
    assert (unpack_from_int32(packed, bits, signed.shape) == signed).all()
    assert (unpack_from_int32(packed_zeros, bits, signed_zeros.shape, packed_dim=0) == signed_zeros).all()
    return packed.numpy().tobytes(), packed_zeros.numpy().tobytes()


def v1_qzeros(zeros, bits):
    """[groups, rows/32*bits] words: AutoGPTQ's loops for 2, 4 and 8 bits."""
    values = (zeros.T.astype(np.int64) - 1).astype(np.uint32)   # [groups, rows]
    per_word = 32 // bits
    out = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for i in range(values.shape[1]):
        out[:, i // per_word] |= values[:, i] << (bits * (i % per_word))
    return out.tobytes()


def nibbles(codes):
    """[n, 32] codes: low nibbles are the first half."""
    return (codes[:, :16] | (codes[:, 16:] << 4)).astype(np.uint8)


def ggml_blocks(kind, codes, zeros, scales, group):
    blocks = codes.reshape(-1, 32)
    per_block = np.repeat(np.arange(zeros.size), group // 32)
    d = scales.reshape(-1)[per_block][:, None]
    z = zeros.reshape(-1)[per_block][:, None]
    if kind == gguf.GGMLQuantizationType.Q4_0:
        assert (z == 8).all()
        parts = [d.view(np.uint8), nibbles(blocks)]
    elif kind == gguf.GGMLQuantizationType.Q4_1:
        m32 = -d.astype(np.float32) * z
        m = m32.astype(np.float16)
        assert (m.astype(np.float32) == m32).all()
        parts = [d.view(np.uint8), m.view(np.uint8), nibbles(blocks)]
    else:
        steps = blocks.astype(np.int16) - z
        assert (steps >= -128).all() and (steps <= 127).all()
        parts = [d.view(np.uint8), steps.astype(np.int8).view(np.uint8)]
    raw = np.concatenate([np.ascontiguousarray(p).reshape(blocks.shape[0], -1) for p in parts], axis=1)
    weights = gguf.dequantize(np.ascontiguousarray(raw), kind).reshape(codes.shape)
    expected = (np.repeat(scales.astype(np.float32), group, axis=1)
                * (codes.astype(np.float32) - np.repeat(zeros.astype(np.float32), group, axis=1)))
    assert (weights == expected).all()
    return raw.tobytes()


def main():
    rng = np.random.default_rng(37)
    q = gguf.GGMLQuantizationType
    out = bytearray()
    for bits, rows, cols, group, kind in ((4, 64, 128, 64, None), (4, 32, 96, 32, q.Q4_0), (4, 32, 128, 128, q.Q4_1),
                                          (8, 32, 64, 32, q.Q8_0), (8, 64, 64, 64, None)):
        codes = rng.integers(0, 2**bits, (rows, cols), dtype=np.uint8)
        zeros = rng.integers(1, 2**bits, (rows, cols // group), dtype=np.uint8)
        scales = (rng.random((rows, cols // group)) * 0.1 + 1e-3).astype("<f2")
        if kind in (q.Q4_0, q.Q8_0):
            zeros[:] = 1 << (bits - 1)
        if kind == q.Q4_1:   # powers of two times anything are exact
            zeros = rng.choice(np.array([1, 2, 4, 8], dtype=np.uint8), zeros.shape)
        packed, packed_zeros = compressed_tensors(codes, zeros, scales, bits)
        blocks = b"" if kind is None else ggml_blocks(kind, codes, zeros, scales, group)
        out += struct.pack("<IIII", bits, rows, cols, group)
        out += codes.tobytes() + zeros.tobytes() + scales.tobytes()
        for field in (packed, packed_zeros, v1_qzeros(zeros, bits)):
            out += struct.pack("<I", len(field)) + field
        out += struct.pack("<II", 0 if kind is None else kind.value, len(blocks)) + blocks
    pathlib.Path(__file__).with_name("export_formats.bin").write_bytes(out)
    print(f"{len(out)} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
