// Quantized matrices, their serving layout and activations of the tests of products with low-bit
// weights, and products in double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/gpu_fixture.h"
#include "worker/io/gptq_packing.h"
#include "worker/kernels/cuda/serving_layout.h"
#include "worker/tensor/half.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::kernels::cuda {

inline constexpr int64_t kWholeRow = 0;

struct Width {
  int bits;
  StoredGrid grid;
  bool symmetric = false;
};
inline std::string NameOf(const ::testing::TestParamInfo<Width>& info) {
  const Width& w = info.param;
  return absl::StrCat("Bits", w.bits,
                      w.grid == StoredGrid::kCodebook     ? "Codebook"
                      : w.grid == StoredGrid::kFloatZeros ? "FloatZeros"
                      : w.symmetric                       ? "Symmetric"
                                                          : "Asymmetric");
}

inline QuantizedMatrix RandomQuantized(int64_t rows, int64_t cols, int64_t group_size,
                                       const Width& width, uint32_t seed) {
  QuantizedMatrix m{.rows = rows,
                    .cols = cols,
                    .bits = width.bits,
                    .group_size = group_size == kWholeRow ? cols : group_size,
                    .symmetric = width.symmetric};
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(0.25f, 1.0f);
  const auto half = [](float v) { return HalfToFloat(FloatToHalf(v)); };
  const int n_codes = 1 << m.bits;
  m.codes.resize(static_cast<size_t>(rows * cols));
  for (uint8_t& c : m.codes) c = static_cast<uint8_t>(generator() % n_codes);
  const auto n_grids = static_cast<size_t>(rows * m.groups());
  const float step = 0.04f / static_cast<float>(n_codes);
  if (width.grid == StoredGrid::kCodebook) {
    m.levels.resize(n_grids * static_cast<size_t>(n_codes));
    for (float& level : m.levels) level = half(0.04f * (uniform(generator) - 0.625f));
    return m;
  }
  m.scales.resize(n_grids);
  for (float& scale : m.scales) scale = half(step * uniform(generator));
  if (width.grid == StoredGrid::kFloatZeros) {
    m.float_zeros.resize(n_grids);
    for (float& zero : m.float_zeros) {
      zero = half(static_cast<float>(n_codes) * (uniform(generator) - 0.25f));
    }
    return m;
  }
  m.zeros.resize(n_grids);
  for (uint8_t& zero : m.zeros) {
    zero = static_cast<uint8_t>(width.symmetric ? n_codes / 2 : generator() % n_codes);
  }
  return m;
}

// A matrix as the artifact has it, on the device.
struct Stored {
  DeviceBuffer<uint32_t> qweight;
  DeviceBuffer<uint32_t> qzeros;
  DeviceBuffer<uint16_t> scales;
  DeviceBuffer<uint16_t> zeros;
  DeviceBuffer<uint16_t> levels;
  StoredLinear linear;
};

class LowBitGpuTest : public GpuTest {
 protected:
  Stored Store(const QuantizedMatrix& m) {
    GptqTensors tensors;
    if (m.rows % 32 == 0) {
      tensors = *PackGptq(m);
    } else {
      // The artifact has no such matrix; the layout takes what needs no packed zeros.
      tensors.qweight.resize(static_cast<size_t>(m.cols / 32 * m.bits * m.rows));
      std::vector<uint32_t> words(static_cast<size_t>(m.bits));
      const auto transposed = [&](const std::vector<float>& values, int64_t width) {
        if (values.empty()) return std::vector<uint16_t>();
        std::vector<uint16_t> halves(values.size());
        for (int64_t r = 0; r < m.rows; ++r) {
          for (int64_t g = 0; g < m.groups(); ++g) {
            for (int64_t k = 0; k < width; ++k) {
              halves[static_cast<size_t>((g * m.rows + r) * width + k)] =
                  FloatToHalf(values[static_cast<size_t>((r * m.groups() + g) * width + k)]);
            }
          }
        }
        return halves;
      };
      for (int64_t r = 0; r < m.rows; ++r) {
        for (int64_t run = 0; run < m.cols / 32; ++run) {
          PackValues(std::span(m.codes).subspan(static_cast<size_t>(r * m.cols + run * 32), 32),
                     m.bits, words);
          for (int k = 0; k < m.bits; ++k) {
            tensors.qweight[static_cast<size_t>((run * m.bits + k) * m.rows + r)] =
                words[static_cast<size_t>(k)];
          }
        }
      }
      tensors.scales = transposed(m.scales, 1);
      tensors.zeros = transposed(m.float_zeros, 1);
      tensors.levels = transposed(m.levels, 4);
    }
    Stored stored;
    stored.linear.rows = m.rows;
    stored.qweight = Upload(tensors.qweight);
    stored.linear.qweight = stored.qweight.data();
    if (!tensors.qzeros.empty()) {
      stored.qzeros = Upload(tensors.qzeros);
      stored.linear.qzeros = stored.qzeros.data();
    }
    const auto upload = [&](const std::vector<uint16_t>& bits, DeviceBuffer<uint16_t>& buffer,
                            const __half*& pointer) {
      if (bits.empty()) return;
      buffer = Upload(bits);
      pointer = reinterpret_cast<const __half*>(buffer.data());
    };
    upload(tensors.scales, stored.scales, stored.linear.scales);
    upload(tensors.zeros, stored.zeros, stored.linear.zeros);
    upload(tensors.levels, stored.levels, stored.linear.levels);
    return stored;
  }

  // All of `matrices` stacked (or two interleaved).
  ServingMatrix Build(const std::vector<QuantizedMatrix>& matrices,
                      ServingRows order = ServingRows::kStacked) {
    std::vector<Stored> stored;
    std::vector<StoredLinear> linears;
    for (const QuantizedMatrix& m : matrices) {
      stored.push_back(Store(m));
      linears.push_back(stored.back().linear);
    }
    absl::StatusOr<ServingMatrix> built =
        ServingMatrix::Build({.linears = linears,
                              .cols = matrices[0].cols,
                              .bits = matrices[0].bits,
                              .group_size = matrices[0].group_size,
                              .order = order},
                             context().stream());
    EXPECT_OK(built.status());
    EXPECT_OK(context().Synchronize());
    return *std::move(built);
  }

  // A matrix whose rows and columns are taken in another order.
  ServingMatrix BuildOrdered(const QuantizedMatrix& m, const std::vector<int32_t>& row_order,
                             const std::vector<int32_t>& column_order) {
    Stored stored = Store(m);
    const auto rows = Upload(row_order);
    const auto columns = Upload(column_order);
    stored.linear.row_order = rows.data();
    absl::StatusOr<ServingMatrix> built = ServingMatrix::Build({.linears = {&stored.linear, 1},
                                                                .cols = m.cols,
                                                                .bits = m.bits,
                                                                .group_size = m.group_size,
                                                                .column_order = columns.data()},
                                                               context().stream());
    EXPECT_OK(built.status());
    EXPECT_OK(context().Synchronize());
    return *std::move(built);
  }

  struct Activations {
    DeviceBuffer<__nv_bfloat16> device;
    std::vector<float> host;
  };
  // Normal, with a column that is much larger, as models have them.
  Activations RandomActivations(int64_t n_tokens, int64_t cols, uint32_t seed, float outlier = 50) {
    Activations x;
    x.host = RandomNormal(n_tokens * cols, seed);
    std::vector<__nv_bfloat16> bf16(x.host.size());
    for (size_t i = 0; i < bf16.size(); ++i) {
      if (static_cast<int64_t>(i) % cols == cols / 3) x.host[i] *= outlier;
      bf16[i] = __float2bfloat16(x.host[i]);
      x.host[i] = __bfloat162float(bf16[i]);
    }
    x.device = Upload(bf16);
    return x;
  }
};

// x · Wᵀ in double.
inline std::vector<double> Reference(const std::vector<float>& weights, int64_t rows, int64_t cols,
                                     const std::vector<float>& x, int64_t n_tokens) {
  std::vector<double> y(static_cast<size_t>(n_tokens * rows));
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* w = weights.data() + r * cols;
      const float* a = x.data() + t * cols;
      double sum = 0;
      for (int64_t c = 0; c < cols; ++c)
        sum += static_cast<double>(w[c]) * static_cast<double>(a[c]);
      y[static_cast<size_t>(t * rows + r)] = sum;
    }
  }
  return y;
}
inline std::vector<double> Reference(const QuantizedMatrix& m, const std::vector<float>& x,
                                     int64_t n_tokens) {
  const Matrix dense = Dequantize(m);
  std::vector<float> weights;
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) weights.push_back(dense(r, c));
  }
  return Reference(weights, m.rows, m.cols, x, n_tokens);
}

inline std::vector<int32_t> RandomOrder(int64_t n, uint32_t seed) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

// Rows of `cols` with columns in that order (empty: theirs), then each block of them (0: none)
// times the orthonormal Hadamard matrix, whose entry (i, j) has the sign of the parity of i & j.
inline std::vector<double> TransformedRows(const std::vector<float>& x, int64_t cols,
                                           const std::vector<int32_t>& order, int64_t block) {
  std::vector<double> y(x.begin(), x.end());
  for (size_t row = 0; row < x.size(); row += static_cast<size_t>(cols)) {
    for (size_t c = 0; c < order.size(); ++c) y[row + c] = x[row + static_cast<size_t>(order[c])];
  }
  if (block == 0) return y;
  const auto n = static_cast<size_t>(block);
  for (size_t first = 0; first < y.size(); first += n) {
    const std::vector<double> in(y.begin() + static_cast<std::ptrdiff_t>(first),
                                 y.begin() + static_cast<std::ptrdiff_t>(first + n));
    for (size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (size_t j = 0; j < n; ++j) sum += std::popcount(i & j) % 2 != 0 ? -in[j] : in[j];
      y[first + i] = sum / std::sqrt(static_cast<double>(n));
    }
  }
  return y;
}

inline double RelativeError(const std::vector<float>& actual, const std::vector<double>& expected) {
  return std::sqrt(NormalizedSquaredError(actual, expected));
}

struct Shape {
  int64_t rows, cols, group_size;
};
// What the grid can have: packed zeros need rows in multiples of 32.
inline std::vector<Shape> ShapesOf(const Width& width) {
  std::vector<Shape> shapes = {{32, 32, 32},     {32, 64, kWholeRow}, {64, 576, 64},
                               {96, 896, 128},   {96, 896, 32},       {32, 1536, kWholeRow},
                               {160, 1536, 64},  {96, 1536, 256},     {64, 4864, 128},
                               {32, 11008, 128}, {32, 11008, 32},     {64, 576, kWholeRow},
                               {4352, 256, 128}};
  if (width.grid != StoredGrid::kGptq) {
    shapes.push_back({1, 64, 32});
    shapes.push_back({17, 896, 128});
    shapes.push_back({33, 1536, 64});
  }
  return shapes;
}

}  // namespace walsh::kernels::cuda
