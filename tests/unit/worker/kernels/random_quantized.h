// Random quantized matrices for tests.
#pragma once

#include <cmath>
#include <random>

#include "tests/testing/tensor_compare.h"
#include "worker/tensor/half.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::testing {

// Codes over the whole range, scales that make a sum of `cols` products about 1, and zeros over the
// whole range unless symmetric.
inline QuantizedMatrix RandomQuantized(int64_t rows, int64_t cols, int bits, int64_t group_size,
                                       bool symmetric, uint64_t stream = 0) {
  std::seed_seq sequence{TestSeed(), stream, uint64_t{77}};
  std::mt19937_64 generator(sequence);
  QuantizedMatrix m;
  m.rows = rows;
  m.cols = cols;
  m.bits = bits;
  m.group_size = group_size;
  m.symmetric = symmetric;
  const int end = 1 << bits;
  std::uniform_int_distribution<int> code(0, end - 1);
  std::uniform_real_distribution<float> scale(0.5f, 1.5f);
  const float unit = 1.0f / (static_cast<float>(end) * std::sqrt(static_cast<float>(cols) + 1.0f));
  m.codes.resize(static_cast<size_t>(rows * cols));
  for (uint8_t& value : m.codes) value = static_cast<uint8_t>(code(generator));
  m.scales.resize(static_cast<size_t>(rows * m.groups()));
  for (float& value : m.scales) value = HalfToFloat(FloatToHalf(unit * scale(generator)));
  m.zeros.resize(m.scales.size());
  for (uint8_t& value : m.zeros) {
    value = static_cast<uint8_t>(symmetric ? end / 2 : code(generator));
  }
  return m;
}

// With zeros around the middle of the codes that are no codes.
inline QuantizedMatrix RandomFloatZeros(int64_t rows, int64_t cols, int bits, int64_t group_size) {
  QuantizedMatrix m = RandomQuantized(rows, cols, bits, group_size, false);
  const auto end = static_cast<float>(1 << bits);
  const auto zeros = RandomFloats(static_cast<int64_t>(m.zeros.size()), 5);
  m.zeros.clear();
  for (const float zero : zeros)
    m.float_zeros.push_back(HalfToFloat(FloatToHalf(end * (0.5f + zero))));
  return m;
}

// Four levels for each group, in no order.
inline QuantizedMatrix RandomCodebook(int64_t rows, int64_t cols, int64_t group_size) {
  QuantizedMatrix m = RandomQuantized(rows, cols, 2, group_size, false);
  const float unit = 1.0f / std::sqrt(static_cast<float>(cols) + 1.0f);
  const auto levels = RandomFloats(4 * static_cast<int64_t>(m.scales.size()), 6);
  m.scales.clear();
  m.zeros.clear();
  for (const float level : levels) m.levels.push_back(HalfToFloat(FloatToHalf(unit * level)));
  return m;
}

}  // namespace walsh::testing
