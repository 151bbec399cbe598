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

}  // namespace walsh::testing
