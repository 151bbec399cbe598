#!/usr/bin/env python3
"""Writes gptq_packing.bin: small quantized matrices and their gptq_v2 tensors, packed by numpy.

Packing is done bit by bit (np.packbits over the stream of bits), so that it shares nothing with
worker/io/gptq_packing.cc. The numpy part of GPTQModel's own pack() is repeated for 2, 4 and 8 bits and
the published three-word pattern for 3 bits, and both must agree before anything is written.
Layout, little-endian, one record for each width:

    u32 bits, rows (out), cols (in), group_size
    u8 codes [rows, cols], u8 zeros [rows, groups], f16 scales [rows, groups]
    u32 qweight [cols/32*bits, rows], u32 qzeros [groups, rows/32*bits], f16 scales [groups, rows],
    i32 g_idx [cols]
"""

import pathlib
import struct

import numpy as np


def pack_stream(values, bits):
    """[n, k] values below 2^bits to [n*bits/32, k] words: a little-endian stream down each column."""
    n, k = values.shape
    stream = ((values[:, None, :] >> np.arange(bits)[None, :, None]) & 1).astype(np.uint8)
    stream = stream.reshape(n * bits, k)
    packed = np.packbits(stream, axis=0, bitorder="little")
    return np.ascontiguousarray(packed.T).view("<u4").T.copy()


def pack_as_gptqmodel(values, bits):
    """The loops of AutoGPTQ's and GPTQModel's QuantLinear.pack."""
    n, k = values.shape
    out = np.zeros((n // 32 * bits, k), dtype=np.uint32)
    v = values.astype(np.uint32)
    i = row = 0
    while row < out.shape[0]:
        if bits in (2, 4, 8):
            for j in range(i, i + 32 // bits):
                out[row] |= v[j] << (bits * (j - i))
            i += 32 // bits
            row += 1
        else:
            for j in range(i, i + 10):
                out[row] |= v[j] << (3 * (j - i))
            i += 10
            out[row] |= v[i] << 30
            row += 1
            out[row] |= (v[i] >> 2) & 1
            i += 1
            for j in range(i, i + 10):
                out[row] |= v[j] << (3 * (j - i) + 1)
            i += 10
            out[row] |= v[i] << 31
            row += 1
            out[row] |= (v[i] >> 1) & 0x3
            i += 1
            for j in range(i, i + 10):
                out[row] |= v[j] << (3 * (j - i) + 2)
            i += 10
            row += 1
    return out


def main():
    rng = np.random.default_rng(36)
    out = bytearray()
    for bits, rows, cols, group in ((2, 64, 96, 32), (3, 32, 128, 64), (4, 96, 64, 64), (8, 32, 64, 32)):
        groups = cols // group
        codes = rng.integers(0, 2**bits, (rows, cols), dtype=np.uint8)
        zeros = rng.integers(0, 2**bits, (rows, groups), dtype=np.uint8)
        scales = (rng.random((rows, groups)) * 0.1 + 1e-3).astype("<f2")
        qweight = pack_stream(codes.T, bits)
        qzeros = np.ascontiguousarray(pack_stream(zeros, bits).T)
        assert (qweight == pack_as_gptqmodel(codes.T, bits)).all()
        assert (qzeros == pack_as_gptqmodel(zeros, bits).T).all()
        g_idx = (np.arange(cols) // group).astype("<i4")
        out += struct.pack("<IIII", bits, rows, cols, group)
        for array in (codes, zeros, scales, qweight.astype("<u4"), qzeros.astype("<u4"),
                      np.ascontiguousarray(scales.T), g_idx):
            out += array.tobytes()
    pathlib.Path(__file__).with_name("gptq_packing.bin").write_bytes(out)
    print(f"{len(out)} bytes")


if __name__ == "__main__":
    main()
