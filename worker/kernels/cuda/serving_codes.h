// Where a code lies in a block of the serving layout (worker/kernels/cuda/serving_layout.h).
//
// A block is 16 rows × 128 columns. Lane l of a warp holds the weights that the A fragments of four
// mma.m16n8k32 with 8-bit operands want from it. Step s has columns 32 s to 32 s + 31, and of it a
// lane four registers of four codes, a byte each:
//
//   registers 0, 2   row     l / 4      columns 32 s + 4 (l % 4) + {0, 1, 2, 3}, and 16 further
//   registers 1, 3   row     l / 4 + 8  the same columns
//
// A code is a number where it lies: (word & mask) is a register of codes times 2^p, with p the
// lowest bit of their field in each byte. That is one logic instruction for four weights, exact,
// and the sums of fields with different p are put together once for all rows. So codes lie in the
// bytes of a register's words such that few shifts are needed:
//
// clang-format off
//   2 bits  word a has register a of all four steps, step s at bits 2 s
//   3 bits  word a has register a of step 0 at bits 0 to 2, of step 1 at bits 3 to 5, and the low two
//           bits of step 3 at bits 6 and 7. Word 4 + a / 2 has registers a and a + 1 of step 2 and the
//           high bits of step 3: the even one at bits 3 to 5 and 2, the odd one where they are once
//           the word is rotated right by 4
//   4 bits  word 4 (s / 2) + a has register a of steps s and s + 1, the nibbles of its bytes
//   8 bits  word 4 s + a is register a of step s
// clang-format on
#pragma once

#ifdef __CUDACC__
#define WALSH_HOST_DEVICE __host__ __device__
#else
#define WALSH_HOST_DEVICE
#endif

namespace walsh::kernels::cuda {

inline constexpr int kServingTileRows = 16;
inline constexpr int kServingBlockCols = 128;
inline constexpr int kServingSteps = 4;  // of 32 columns each
inline constexpr int kServingLanes = 32;

// Words of a lane in a block, and bytes of a block's codes.
WALSH_HOST_DEVICE constexpr int ServingWords(int bits) { return 2 * bits; }
WALSH_HOST_DEVICE constexpr int ServingCodeBytes(int bits) { return 256 * bits; }

// Row of the tile, and column of the block of the first of the four bytes, of register `a` of step
// `s`; the other bytes have the next columns.
WALSH_HOST_DEVICE constexpr int ServingRow(int lane, int a) { return lane / 4 + a % 2 * 8; }
WALSH_HOST_DEVICE constexpr int ServingColumn(int lane, int s, int a) {
  return s * 32 + a / 2 * 16 + lane % 4 * 4;
}

struct CodePlace {
  int word;
  int position;
};

// Of bit `b` of the code of byte `i` of register `a` of step `s`.
WALSH_HOST_DEVICE constexpr CodePlace PlaceOf(int bits, int s, int a, int i, int b) {
  if (bits == 2) return {a, 8 * i + 2 * s + b};
  if (bits == 3) {
    if (s < 2) return {a, 8 * i + 3 * s + b};
    if (s == 3 && b < 2) return {a, 8 * i + 6 + b};
    const int position = 8 * i + (s == 2 ? 3 + b : 2);
    return {4 + a / 2, a % 2 == 0 ? position : (position + 4) % 32};
  }
  if (bits == 4) return {s / 2 * 4 + a, 8 * i + s % 2 * 4 + b};
  return {4 * s + a, 8 * i + b};
}

// Bytes from the block's begin to word `w` of a lane: the words of the lanes lie in pieces of 16
// bytes a lane, at 3 bits followed by one of 8.
WALSH_HOST_DEVICE constexpr int ServingWordOffset(int bits, int lane, int w) {
  if (bits == 3 && w >= 4) return kServingLanes * 16 + lane * 8 + (w - 4) * 4;
  return (w / 4 * kServingLanes + lane) * 16 + w % 4 * 4;
}

// Behind the codes lie the block's grids, one or, where a group has 32 or 64 columns, four or two:
// 16 pairs {scale, zero} of halves or 16 codebooks of four, those of rows i and i + 8 adjacent.
WALSH_HOST_DEVICE constexpr int ServingGridBytes(bool has_codebook) {
  return kServingTileRows * (has_codebook ? 8 : 4);
}
WALSH_HOST_DEVICE constexpr int ServingGridPlace(int row) { return row % 8 * 2 + row / 8; }
WALSH_HOST_DEVICE constexpr int ServingBlockBytes(int bits, bool has_codebook, int grids) {
  return ServingCodeBytes(bits) + grids * ServingGridBytes(has_codebook);
}

}  // namespace walsh::kernels::cuda
