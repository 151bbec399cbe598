// Where a code lies in a block of the serving layout (worker/kernels/cuda/serving_layout.h).
//
// A block is 16 rows × 128 columns. Lane l of a warp holds the weights that the A fragments of
// eight mma.m16n8k16 want from it: of step s four registers, of two codes each, in the low and the
// high half:
//
//   registers 0, 2   row     l / 4      columns 32 (s / 2) + 8 (l % 4) + 4 (s % 2) + {0, 1}, {2, 3}
//   registers 1, 3   row     l / 4 + 8  the same columns
//
// The k of a fragment is no column of its own order: any order does that the activations share, and
// this one makes what a lane needs of them 16 adjacent bytes for each two steps.
//
// bf16 has a mantissa of 7 bits, so that (half & mask) | exponent is the number
//   2^(7 − p) + code                                                                       (1)
// for a code whose lowest bit is bit p of the half and whose highest is below bit 7: one
// instruction, two weights. So the codes of a half are laid out such that few shifts bring all of
// them below bit 7, and such that registers 0 and 1, and 2 and 3, have one p, because the products
// take back 2^(7 − p) · Σ x for both rows at once:
//
// clang-format off
//   2 bits  8 codes a half: those of bits 0 to 5 as they are, 6 to 11 after >> 6, the rest after >> 12
//   3 bits  5 codes a half, and a sixth for three words, of their bits 15
//   4 bits  4 codes a half, each shifted to bit 0
//   8 bits  2 codes a half; a product of each nibble, the high one as 256 + 16 · nibble
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
inline constexpr int kServingSteps = 8;  // of 16 columns each
inline constexpr int kServingLanes = 32;

// Words of a lane in a block.
WALSH_HOST_DEVICE constexpr int ServingWords(int bits) { return 2 * bits; }
WALSH_HOST_DEVICE constexpr int ServingBlockBytes(int bits) { return 256 * bits; }

// Row of the tile and column of the block of the low half of register `a` of step `s`; the high
// half has the next column.
WALSH_HOST_DEVICE constexpr int ServingRow(int lane, int a) { return lane / 4 + a % 2 * 8; }
WALSH_HOST_DEVICE constexpr int ServingColumn(int lane, int s, int a) {
  return s / 2 * 32 + lane % 4 * 8 + s % 2 * 4 + a / 2 * 2;
}

struct CodePlace {
  int word;
  int position;  // in each half of the word
};

// Of bit `b` of the codes of register `a` of step `s`.
WALSH_HOST_DEVICE constexpr CodePlace PlaceOf(int bits, int s, int a, int b) {
  if (bits == 2) {
    const int first = s / 4 * 2;
    const int word = first + s % 4 / 2;
    if (s % 2 == 0) {
      constexpr int kField[] = {0, 3, 1, 4};
      return {word, 2 * kField[a] + b};
    }
    if (a < 2) return {word, 2 * (a == 0 ? 2 : 5) + b};
    return {first + a - 2, 2 * (s % 4 == 1 ? 6 : 7) + b};
  }
  if (bits == 3) {
    if (s < 6) {
      constexpr int kField[] = {0, 2, 1, 3};
      return {s, 3 * kField[a] + b};
    }
    const int triple = a % 2 * 3;
    if (s == 7 && a >= 2) return {triple + b, 15};
    return {triple + (s == 7 ? 2 : a / 2), 12 + b};
  }
  if (bits == 4) return {s, 4 * a + b};
  return {2 * s + a / 2, a % 2 * 8 + b};
}

// Bytes from the block's begin to word `w` of a lane: the words of the lanes lie in pieces of 16
// bytes a lane, at 3 bits followed by one of 8.
WALSH_HOST_DEVICE constexpr int ServingWordOffset(int bits, int lane, int w) {
  if (bits == 3 && w >= 4) return kServingLanes * 16 + lane * 8 + (w - 4) * 4;
  return (w / 4 * kServingLanes + lane) * 16 + w % 4 * 4;
}

}  // namespace walsh::kernels::cuda
