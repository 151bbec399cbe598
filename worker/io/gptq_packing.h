// Quantized weights as GPTQ checkpoints store them (format gptq_v2).
//
//   qweight  [in/32·bits, out] u32      32 inputs of one output: `bits` words, one below the other
//   qzeros   [groups, out/32·bits] u32  32 outputs of one group: `bits` words, side by side
//   scales   [groups, out] half
//   g_idx    [in] i32                   the group of each input: input / group_size, unless
//   act-order
//                                       made groups of inputs that are no neighbours
//
// What GPTQ has no form for keeps qweight and g_idx, and has instead
//
//   zeros    [groups, out] half         zero points that are no codes, beside scales, for qzeros
//   levels   [groups, out, 2^bits] half a codebook, for qzeros and scales
//
// In those words the values follow each other as a stream of bits, the first in the lowest ones; at
// 3 bits a value may straddle two words. Version 2 of the format stores a zero as it is, version 1
// less one.
//
// Source:  AutoGPTQ's and GPTQModel's pack(); golden against numpy (tests/golden/io)
// Errors:  INVALID_ARGUMENT  sizes that do not pack (limit and value named), a code or zero beyond
//                            its bits, a scale, zero or level that half precision does not hold
//          DATA_LOSS         (packed already) one of those that is not finite
// Threads: safe.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh {

enum class StoredGrid { kGptq, kFloatZeros, kCodebook };

// Those that the grid has; the others are empty. 16-bit numbers are IEEE half.
struct GptqTensors {
  std::vector<uint32_t> qweight;
  std::vector<uint32_t> qzeros;
  std::vector<uint16_t> scales;
  std::vector<uint16_t> zeros;
  std::vector<uint16_t> levels;
  std::vector<int32_t> g_idx;
};

struct GptqShape {
  int64_t rows = 0;  // out; a multiple of 32
  int64_t cols = 0;  // in; a multiple of 32
  int bits = 0;      // 2, 3, 4 or 8
  int64_t group_size = 0;
  bool symmetric = false;
  StoredGrid grid = StoredGrid::kGptq;

  int64_t groups() const { return cols / group_size; }
  int64_t weight_words() const { return cols / 32 * bits; }  // rows of qweight
  int64_t zero_words() const { return rows / 32 * bits; }    // columns of qzeros
};

// Whether such a matrix can be stored at all.
absl::Status ValidateGptqShape(const GptqShape& shape);

// g_idx of columns that are in order.
std::vector<int32_t> GroupIndex(const GptqShape& shape);

GptqShape ShapeOf(const QuantizedMatrix& matrix);

// The inputs by their group, those of one group in their order: OrderedMatrix::input_order. Empty
// where that is the order that they have. INVALID_ARGUMENT when a group is out of range, or has
// more or fewer inputs than the others.
absl::StatusOr<std::vector<int32_t>> InputOrder(std::span<const int32_t> g_idx,
                                                const GptqShape& shape);

// DATA_LOSS names the first of `scales` or `zeros` [groups, rows] or `levels` [groups, rows,
// 2^bits] that is not finite.
absl::Status CheckScales(std::span<const uint16_t> scales, const GptqShape& shape);
absl::Status CheckZeros(std::span<const uint16_t> zeros, const GptqShape& shape);
absl::Status CheckLevels(std::span<const uint16_t> levels, const GptqShape& shape);

// Values that fill a whole number of words at every width.
inline constexpr int64_t kPackingRun = 32;
// The stream of bits of `values`, kPackingRun of them or a multiple, each below 2^bits; `words` has
// room for exactly that many bits.
void PackValues(std::span<const uint8_t> values, int bits, std::span<uint32_t> words);

// A matrix whose columns are not in the order of its inputs. Other programs' act-order makes groups
// of inputs that are no neighbours; ours never does.
struct OrderedMatrix {
  QuantizedMatrix matrix;
  // Column c multiplies input input_order[c]; empty: input c.
  std::vector<int32_t> input_order;
};

absl::StatusOr<GptqTensors> PackGptq(const QuantizedMatrix& matrix);
// INVALID_ARGUMENT also where the order is no permutation of the columns.
absl::StatusOr<GptqTensors> PackGptq(const OrderedMatrix& ordered);
// `tensors` have the sizes that `shape` implies; columns are taken as they stand, whatever g_idx
// says.
absl::StatusOr<QuantizedMatrix> UnpackGptq(const GptqTensors& tensors, const GptqShape& shape);
// The same with the columns brought into the order of their groups.
absl::StatusOr<OrderedMatrix> UnpackOrdered(const GptqTensors& tensors, const GptqShape& shape);
// What it stands for, [rows, cols], columns in the order of the inputs.
Matrix Dequantize(const OrderedMatrix& ordered);

}  // namespace walsh
