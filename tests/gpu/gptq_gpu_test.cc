// GPTQ on the device against the algorithm written out in double.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "tests/gpu/gpu_fixture.h"
#include "worker/gptq/tile.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/tensor/half.h"
#include "worker/tensor/matrix.h"

namespace walsh::kernels::cuda {
namespace {

struct Problem {
  int64_t rows = 0;
  int64_t cols = 0;
  int bits = 4;
  int64_t group_size = 128;
  bool symmetric = false;
  bool mse_clip = true;
  bool permute = false;
};

std::ostream& operator<<(std::ostream& out, const Problem& p) {
  return out << p.rows << "x" << p.cols << " bits " << p.bits << " group " << p.group_size
             << (p.symmetric ? " symmetric" : "") << (p.mse_clip ? " clip" : "")
             << (p.permute ? " permuted" : "");
}

// Groups move as a whole and columns inside their group, as in group-aware ordering.
std::vector<int32_t> MakePermutation(const Problem& p, uint32_t seed) {
  std::vector<int32_t> perm(static_cast<size_t>(p.cols));
  std::iota(perm.begin(), perm.end(), 0);
  if (!p.permute) return perm;
  std::mt19937 generator(seed);
  std::vector<int64_t> groups(static_cast<size_t>(p.cols / p.group_size));
  std::iota(groups.begin(), groups.end(), 0);
  std::shuffle(groups.begin(), groups.end(), generator);
  size_t position = 0;
  for (const int64_t g : groups) {
    const auto begin = static_cast<int64_t>(position);
    for (int64_t c = 0; c < p.group_size; ++c) {
      perm[position++] = static_cast<int32_t>(g * p.group_size + c);
    }
    std::shuffle(perm.begin() + begin, perm.begin() + begin + p.group_size, generator);
  }
  return perm;
}

struct Grid {
  double scale;
  double zero;
};

Grid GridFromRange(double low, double high, double max_code, bool symmetric) {
  if (symmetric) {
    const double reach = std::max(-low, high);
    low = -reach;
    high = reach;
  }
  const double scale =
      static_cast<double>(HalfToFloat(FloatToHalf(static_cast<float>((high - low) / max_code))));
  if (!(scale > 0)) return {1.0, symmetric ? (max_code + 1) / 2 : 0.0};
  const double zero =
      symmetric ? (max_code + 1) / 2 : std::clamp(std::nearbyint(-low / scale), 0.0, max_code);
  return {scale, zero};
}
double ToCode(double w, const Grid& g, double max_code) {
  return std::clamp(std::nearbyint(w / g.scale) + g.zero, 0.0, max_code);
}
Grid FindGrid(const std::vector<double>& values, double max_code, const Problem& p) {
  double low = 0;
  double high = 0;
  for (const double v : values) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  Grid best = GridFromRange(low, high, max_code, p.symmetric);
  double best_error = INFINITY;
  for (int step = 0; p.mse_clip && step < 80; ++step) {
    const double shrink = 1.0 - step / 100.0;
    const Grid grid = GridFromRange(shrink * low, shrink * high, max_code, p.symmetric);
    double error = 0;
    for (const double v : values) {
      const double back = grid.scale * (ToCode(v, grid, max_code) - grid.zero);
      error += std::pow(std::abs(back - v), 2.4);
    }
    if (error < best_error) {
      best_error = error;
      best = grid;
    }
  }
  return best;
}

struct Reference {
  std::vector<double> dequantized;  // [rows, cols]
  double loss = 0;
};
// Algorithm 1 of the paper with lazy updates left out: every column updates all that follow.
// `u` [n, n] upper with H⁻¹ = UᵀU in processing order.
Reference ReferenceGptq(const Problem& p, const std::vector<float>& w, const std::vector<double>& u,
                        const std::vector<int32_t>& perm) {
  const double max_code = (1 << p.bits) - 1;
  Reference result;
  result.dequantized.resize(w.size());
  for (int64_t r = 0; r < p.rows; ++r) {
    std::vector<double> row(static_cast<size_t>(p.cols));
    for (int64_t c = 0; c < p.cols; ++c) row[c] = w[r * p.cols + perm[c]];
    Grid grid{};
    for (int64_t c = 0; c < p.cols; ++c) {
      if (c % p.group_size == 0) {
        grid = FindGrid({row.begin() + c, row.begin() + c + p.group_size}, max_code, p);
      }
      const double back = grid.scale * (ToCode(row[c], grid, max_code) - grid.zero);
      result.dequantized[r * p.cols + perm[c]] = back;
      const double error = (row[c] - back) / u[c * p.cols + c];
      result.loss += error * error;
      for (int64_t j = c; j < p.cols; ++j) row[j] -= error * u[c * p.cols + j];
    }
  }
  return result;
}

// U of a symmetric positive definite matrix, through the reversed Cholesky factor, in double.
std::vector<double> ReferenceFactor(const std::vector<double>& h, int64_t n) {
  std::vector<double> l(static_cast<size_t>(n * n), 0.0);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      double sum = h[(n - 1 - i) * n + n - 1 - j];
      for (int64_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
    }
  }
  std::vector<double> inverse(l.size(), 0.0);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (int64_t k = j; k < i; ++k) sum -= l[i * n + k] * inverse[k * n + j];
      inverse[i * n + j] = sum / l[i * n + i];
    }
  }
  std::reverse(inverse.begin(), inverse.end());
  return inverse;
}

struct Quantized {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<uint8_t> zeros;
  std::vector<float> loss;

  bool operator==(const Quantized& other) const {
    const auto same_bits = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return codes == other.codes && zeros == other.zeros && same_bits(scales, other.scales) &&
           same_bits(loss, other.loss);
  }
};

class GptqFixture : public GpuTest {
 protected:
  // Rounds to nearest without `u`.
  Quantized Quantize(const Problem& p, const std::vector<float>& w, const DeviceBuffer<float>* u,
                     const std::vector<int32_t>& perm, const std::vector<uint8_t>& dead = {}) {
    const int64_t groups = p.rows * (p.cols / p.group_size);
    const auto device_w = Upload(w);
    const auto device_perm = Upload(perm);
    DeviceBuffer<uint8_t> device_dead;
    if (!dead.empty()) device_dead = Upload(dead);
    auto codes = Poisoned<uint8_t>(p.rows * p.cols);
    auto scales = Poisoned<float>(groups);
    auto zeros = Poisoned<uint8_t>(groups);
    auto loss = Poisoned<float>(p.rows);
    EXPECT_OK(QuantizeColumns(context(), {.rows = p.rows,
                                          .cols = p.cols,
                                          .w = device_w.data(),
                                          .u = u == nullptr ? nullptr : u->data(),
                                          .perm = device_perm.data(),
                                          .dead = device_dead.data(),
                                          .bits = p.bits,
                                          .group_size = p.group_size,
                                          .symmetric = p.symmetric,
                                          .mse_clip = p.mse_clip,
                                          .codes = codes.data(),
                                          .scales = scales.data(),
                                          .zeros = zeros.data(),
                                          .loss = loss.data()}));
    return {Download(codes), Download(scales), Download(zeros), Download(loss)};
  }
  // An upper factor with a diagonal near 1, not one of any Hessian; NaN where none is read.
  DeviceBuffer<float> SomeFactor(int64_t cols, float off_diagonal) {
    std::vector<float> u = RandomNormal(cols * cols, 11);
    for (int64_t i = 0; i < cols; ++i) {
      for (int64_t j = 0; j < cols; ++j) u[i * cols + j] *= j < i ? NAN : off_diagonal;
      u[i * cols + i] = 1.0f + std::abs(u[i * cols + i]);
    }
    return Upload(u);
  }
};

class GptqGpuTest : public GptqFixture, public ::testing::WithParamInterface<Problem> {};

// Rounding differs between float and double near ties, so single codes may differ and then move
// their successors; what must agree is nearly all codes and the error that the method minimises.
TEST_P(GptqGpuTest, AgreesWithReference) {
  const Problem p = GetParam();
  const int64_t n_samples = 2 * p.cols;
  const std::vector<float> x = RandomNormal(n_samples * p.cols, 1);
  const std::vector<float> w = RandomNormal(p.rows * p.cols, 2, 0.02f);
  const std::vector<int32_t> perm = MakePermutation(p, 3);

  std::vector<double> h(static_cast<size_t>(p.cols * p.cols), 0.0);
  for (int64_t s = 0; s < n_samples; ++s) {
    for (int64_t i = 0; i < p.cols; ++i) {
      // A shared component makes the columns correlated, as activations are.
      const double xi = x[s * p.cols + i] + x[s * p.cols];
      for (int64_t j = 0; j < p.cols; ++j) {
        h[i * p.cols + j] += xi * (x[s * p.cols + j] + x[s * p.cols]);
      }
    }
  }
  const double damp = 0.01 * h[0] / 2;
  const std::vector<float> h_float(h.begin(), h.end());
  std::vector<double> h_ordered(h.size());
  for (int64_t i = 0; i < p.cols; ++i) {
    for (int64_t j = 0; j < p.cols; ++j) {
      h_ordered[i * p.cols + j] = h_float[perm[i] * p.cols + perm[j]];
    }
    h_ordered[i * p.cols + i] += static_cast<float>(damp);
  }
  const std::vector<double> u_expected = ReferenceFactor(h_ordered, p.cols);

  const auto device_h = Upload(h_float);
  const auto device_perm = Upload(perm);
  const auto device_add =
      Upload(std::vector<float>(static_cast<size_t>(p.cols), static_cast<float>(damp)));
  const auto device_w = Upload(w);
  auto u = Poisoned<float>(p.cols * p.cols);
  ASSERT_OK(FactorHessian(context(), {.dim = p.cols,
                                      .h = device_h.data(),
                                      .perm = device_perm.data(),
                                      .diagonal_add = device_add.data(),
                                      .u = u.data()}));
  std::vector<float> u_actual = Download(u);
  for (int64_t i = 0; i < p.cols; ++i) {
    for (int64_t j = 0; j < i; ++j) u_actual[i * p.cols + j] = 0;  // unspecified
  }
  EXPECT_LE(NormalizedSquaredError(u_actual, u_expected), 1e-8);

  const int64_t groups = p.cols / p.group_size;
  const Quantized actual = Quantize(p, w, &u, perm);
  const Reference expected = ReferenceGptq(p, w, u_expected, perm);

  const auto output_error = [&](auto&& dequantized) {
    double sum = 0.0;
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t i = 0; i < p.cols; ++i) {
        const double di = w[r * p.cols + i] - dequantized(r, i);
        for (int64_t j = 0; j < p.cols; ++j) {
          sum += di * h[i * p.cols + j] * (w[r * p.cols + j] - dequantized(r, j));
        }
      }
    }
    return sum;
  };
  const auto actual_weight = [&](int64_t r, int64_t c) {
    const int64_t g = r * groups + c / p.group_size;
    return static_cast<double>(actual.scales[g]) *
           (static_cast<int>(actual.codes[r * p.cols + c]) - static_cast<int>(actual.zeros[g]));
  };
  int64_t n_equal = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.cols; ++c) {
      ASSERT_LT(actual.codes[r * p.cols + c], 1 << p.bits);
      n_equal += std::abs(actual_weight(r, c) - expected.dequantized[r * p.cols + c]) <
                 1e-3 * actual.scales[r * groups + c / p.group_size];
    }
  }
  EXPECT_GE(static_cast<double>(n_equal) / static_cast<double>(p.rows * p.cols), 0.97);
  const double expected_error =
      output_error([&](int64_t r, int64_t c) { return expected.dequantized[r * p.cols + c]; });
  EXPECT_NEAR(output_error(actual_weight) / expected_error, 1.0, 0.01);
  const double loss = std::accumulate(actual.loss.begin(), actual.loss.end(), 0.0);
  EXPECT_NEAR(loss / expected.loss, 1.0, 0.01);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, GptqGpuTest,
    ::testing::Values(
        Problem{.rows = 1, .cols = 32, .bits = 2, .group_size = 32},
        Problem{.rows = 17, .cols = 128, .bits = 4, .group_size = 128},
        Problem{.rows = 33, .cols = 192, .bits = 3, .group_size = 64},
        Problem{.rows = 33, .cols = 192, .bits = 2, .group_size = 64, .permute = true},
        Problem{.rows = 31, .cols = 256, .bits = 2, .group_size = 128, .permute = true},
        Problem{.rows = 16, .cols = 256, .bits = 2, .group_size = 32, .permute = true},
        Problem{.rows = 16, .cols = 256, .bits = 4, .group_size = 256},
        Problem{.rows = 16, .cols = 288, .bits = 8, .group_size = 288},
        Problem{.rows = 16, .cols = 256, .bits = 4, .group_size = 64, .symmetric = true},
        Problem{.rows = 16, .cols = 256, .bits = 4, .group_size = 64, .mse_clip = false},
        // Last blocks of 32 and 96 columns, groups of one block that is none of the usual sizes.
        Problem{.rows = 37, .cols = 160, .bits = 2, .group_size = 32},
        Problem{.rows = 3, .cols = 224, .bits = 3, .group_size = 224, .permute = true},
        Problem{.rows = 5, .cols = 96, .bits = 4, .group_size = 96},
        Problem{.rows = 40, .cols = 256, .bits = 2, .group_size = 128, .symmetric = true}));

class RoundToNearestGpuTest : public GptqFixture, public ::testing::WithParamInterface<Problem> {};

// Ties of the clip search aside, whose powers are approximate on both sides, the arithmetic is that
// of the CPU.
TEST_P(RoundToNearestGpuTest, AgreesWithTheCpu) {
  const Problem p = GetParam();
  const std::vector<float> w = RandomNormal(p.rows * p.cols, 4, 0.02f);
  const Quantized actual = Quantize(p, w, nullptr, MakePermutation(p, 5));
  EXPECT_THAT(actual.loss, ::testing::Each(0.0f));

  const int64_t groups = p.cols / p.group_size;
  int64_t n_other_grids = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      // The row in lane 0 of a tile of zeros.
      Matrix tile(p.group_size, gptq::kTileRows), codes(p.group_size, gptq::kTileRows);
      for (int64_t c = 0; c < p.group_size; ++c) {
        tile(c, 0) = w[r * p.cols + g * p.group_size + c];
      }
      gptq::TileGrid grid;
      gptq::FindGrid({.bits = p.bits, .symmetric = p.symmetric, .mse_clip = p.mse_clip},
                     tile.data(), p.group_size, grid);
      if (actual.scales[r * groups + g] != grid.scales[0] ||
          static_cast<float>(actual.zeros[r * groups + g]) != grid.zeros[0]) {
        ++n_other_grids;
        continue;
      }
      gptq::QuantizeColumns({.bits = p.bits,
                             .n = p.group_size,
                             .first = 0,
                             .last = p.group_size,
                             .grid = &grid,
                             .weights = tile.data(),
                             .codes = codes.data()});
      for (int64_t c = 0; c < p.group_size; ++c) {
        ASSERT_EQ(static_cast<float>(actual.codes[r * p.cols + g * p.group_size + c]), codes(c, 0))
            << "row " << r << ", column " << g * p.group_size + c;
      }
    }
  }
  EXPECT_LE(n_other_grids, 1 + p.rows * groups / 100);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, RoundToNearestGpuTest,
    ::testing::Values(
        Problem{.rows = 33, .cols = 256, .bits = 2, .group_size = 128},
        Problem{.rows = 64, .cols = 192, .bits = 4, .group_size = 64, .permute = true},
        Problem{.rows = 7, .cols = 96, .bits = 8, .group_size = 32, .symmetric = true},
        Problem{.rows = 5, .cols = 1056, .bits = 3, .group_size = 1056, .permute = true},
        Problem{.rows = 5, .cols = 1024, .bits = 2, .group_size = 512, .symmetric = true},
        // More of a group than shared memory holds.
        Problem{.rows = 2, .cols = 65536, .bits = 4, .group_size = 65536},
        Problem{.rows = 17, .cols = 128, .bits = 3, .group_size = 128, .mse_clip = false}));

// Rows share a warp in the clip search and a CTA, of which there are two sizes; what one row holds,
// a NaN included, and how many there are changes no other.
TEST_F(GptqFixture, RowsDoNotDependOnEachOther) {
  const int64_t rows = 16 * context().properties().multiProcessorCount + 17;
  for (Problem p : {Problem{.cols = 128, .bits = 2, .group_size = 128},
                    Problem{.cols = 96, .bits = 4, .group_size = 32, .symmetric = true}}) {
    p.rows = rows;
    SCOPED_TRACE(p);
    std::vector<float> w = RandomNormal(rows * p.cols, 6, 0.02f);
    w[5 * p.cols + 40] = NAN;
    w[8 * p.cols + 3] = INFINITY;
    const std::vector<int32_t> perm = MakePermutation(p, 7);
    const auto u = SomeFactor(p.cols, 0.05f);
    const Quantized whole = Quantize(p, w, &u, perm);
    Quantized pieces;
    for (int64_t first = 0; first < rows;) {
      p.rows = std::min<int64_t>(first == 0 ? 7 : 1001, rows - first);
      const Quantized piece = Quantize(
          p, {w.begin() + first * p.cols, w.begin() + (first + p.rows) * p.cols}, &u, perm);
      pieces.codes.insert(pieces.codes.end(), piece.codes.begin(), piece.codes.end());
      pieces.scales.insert(pieces.scales.end(), piece.scales.begin(), piece.scales.end());
      pieces.zeros.insert(pieces.zeros.end(), piece.zeros.begin(), piece.zeros.end());
      pieces.loss.insert(pieces.loss.end(), piece.loss.begin(), piece.loss.end());
      first += p.rows;
    }
    EXPECT_TRUE(whole == pieces);
    EXPECT_EQ(std::count_if(whole.loss.begin(), whole.loss.end(),
                            [](float loss) { return !std::isfinite(loss); }),
              2);
  }
}

TEST_F(GptqFixture, RepeatsBitForBit) {
  const Problem p{.rows = 100, .cols = 384, .bits = 2, .group_size = 64, .permute = true};
  const std::vector<float> w = RandomNormal(p.rows * p.cols, 8, 0.02f);
  const auto u = SomeFactor(p.cols, 0.02f);
  const Quantized first = Quantize(p, w, &u, MakePermutation(p, 9));
  EXPECT_TRUE(first == Quantize(p, w, &u, MakePermutation(p, 9)));
}

// Zero rows, zero groups and groups of dead columns, with feedback that brings no error to them.
TEST_F(GptqFixture, GroupsOfZerosAreZeroOnTheGridOfScaleOne) {
  for (const int64_t group_size : {32, 128, 256}) {
    for (const bool symmetric : {false, true}) {
      const Problem p{.rows = 35, .cols = 512, .group_size = group_size, .symmetric = symmetric};
      SCOPED_TRACE(p);
      const int64_t groups = p.cols / group_size;
      std::vector<float> w = RandomNormal(p.rows * p.cols, 10, 0.02f);
      std::vector<uint8_t> dead(static_cast<size_t>(p.cols), 0);
      std::fill_n(dead.begin() + group_size, group_size, uint8_t{1});
      const auto is_zero = [&](int64_t r, int64_t g) { return g == 1 || r == 3; };
      std::fill_n(w.begin() + 3 * p.cols, p.cols, 0.0f);
      const auto u = SomeFactor(p.cols, 0.0f);
      for (const auto* factor : {static_cast<const DeviceBuffer<float>*>(nullptr), &u}) {
        const Quantized q = Quantize(p, w, factor, MakePermutation(p, 0), dead);
        for (int64_t r = 0; r < p.rows; ++r) {
          for (int64_t c = 0; c < p.cols; ++c) {
            const int64_t g = r * groups + c / group_size;
            if (!is_zero(r, c / group_size)) continue;
            ASSERT_EQ(q.scales[g], 1.0f) << "row " << r << ", column " << c;
            ASSERT_EQ(q.zeros[g], symmetric ? 8 : 0) << "row " << r << ", column " << c;
            ASSERT_EQ(q.codes[r * p.cols + c], q.zeros[g]) << "row " << r << ", column " << c;
          }
        }
      }
    }
  }
}

TEST_F(GptqFixture, TiesGoToTheEvenMultipleOfTheScale) {
  const Problem p{.rows = 3, .cols = 64, .group_size = 64, .mse_clip = false};
  std::vector<float> w(static_cast<size_t>(p.rows * p.cols), 0.0f);
  for (int64_t i = 0; i < p.rows * p.cols; ++i) w[i] = static_cast<float>(i % 15) - 7.5f;
  for (int64_t r = 0; r < p.rows; ++r) {  // from −8 to 7: scale 1, zero 8
    w[r * p.cols] = -8.0f;
    w[r * p.cols + 63] = 7.0f;
  }
  const auto u = SomeFactor(p.cols, 0.0f);
  for (const auto* factor : {static_cast<const DeviceBuffer<float>*>(nullptr), &u}) {
    const Quantized q = Quantize(p, w, factor, MakePermutation(p, 0));
    EXPECT_THAT(q.scales, ::testing::Each(1.0f));
    EXPECT_THAT(q.zeros, ::testing::Each(8));
    for (int64_t i = 0; i < p.rows * p.cols; ++i) {
      ASSERT_EQ(q.codes[i], std::clamp(std::nearbyint(w[i]) + 8, 0.0f, 15.0f)) << w[i];
    }
  }
}

// Diagonal plus a few outer products, so that it is made fast and every element counts.
std::vector<float> MakeHessian(int64_t n, uint32_t seed) {
  constexpr int64_t kTerms = 4;
  const std::vector<float> v = RandomNormal(kTerms * n, seed);
  std::vector<float> h(static_cast<size_t>(n * n), 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      float sum = 0;
      for (int64_t t = 0; t < kTerms; ++t) sum += v[t * n + i] * v[t * n + j];
      h[i * n + j] = h[j * n + i] = sum;
    }
    h[i * n + i] += 0.5f + static_cast<float>(i % 7);
  }
  return h;
}

struct FactorCase {
  int64_t n = 0;
  bool in_double = false;
};
class FactorGpuTest : public GpuTest, public ::testing::WithParamInterface<FactorCase> {};

// H⁻¹ = Uᵀ U is U H Uᵀ = I. A row of that product sees every element of U; some rows are taken.
TEST_P(FactorGpuTest, InvertsTheHessian) {
  const auto [n, in_double] = GetParam();
  const std::vector<float> h = MakeHessian(n, 21);
  std::vector<int32_t> perm(static_cast<size_t>(n));
  std::iota(perm.begin(), perm.end(), 0);
  std::shuffle(perm.begin(), perm.end(), std::mt19937(22));
  std::vector<float> add = RandomNormal(n, 23);
  for (float& x : add) x = 0.25f + std::abs(x);
  const auto device_h = Upload(h);
  const auto device_perm = Upload(perm);
  const auto device_add = Upload(add);
  auto u = Poisoned<float>(n * n);
  ResetDeviceMemoryPeak();
  const int64_t before = DeviceMemoryUse().bytes_now;
  ASSERT_OK(FactorHessian(context(), {.dim = n,
                                      .h = device_h.data(),
                                      .perm = device_perm.data(),
                                      .diagonal_add = device_add.data(),
                                      .u = u.data(),
                                      .in_double = in_double}));
  // A quarter of the matrix beside it, where that is more than a block of the factorization; in
  // double also the matrix itself.
  const int64_t float_bytes = std::max<int64_t>(n * n / 4, 128 * 128) * 4;
  const int64_t double_bytes = (n * n + std::max<int64_t>(n * n / 4, 64 * 64)) * 8;
  EXPECT_LE(DeviceMemoryUse().bytes_peak - before, (in_double ? double_bytes : float_bytes) + 4);
  const std::vector<float> actual = Download(u);
  int64_t n_below = 0;
  for (int64_t i = 0; i < n; ++i) {
    ASSERT_GT(actual[i * n + i], 0) << i;
    for (int64_t j = 0; j < i; ++j) n_below += actual[i * n + j] == 0 ? 0 : 1;
  }
  EXPECT_EQ(n_below, 0) << "what is not zero below the diagonal";
  for (int64_t r = 0; r < n; r += std::max<int64_t>(1, n / 11)) {
    std::vector<double> row(static_cast<size_t>(n), 0.0);  // of U H, in processing order
    for (int64_t i = r; i < n; ++i) {
      const double factor = actual[r * n + i];
      const float* h_row = h.data() + perm[i] * n;
      for (int64_t j = 0; j < n; ++j) row[j] += factor * h_row[perm[j]];
      row[i] += factor * add[perm[i]];
    }
    for (int64_t s = 0; s < n; ++s) {
      double product = 0;
      for (int64_t j = s; j < n; ++j) product += row[j] * actual[s * n + j];
      ASSERT_NEAR(product, r == s ? 1.0 : 0.0, 1e-4) << r << " " << s;
    }
  }
}

std::vector<FactorCase> Sizes(bool in_double, const std::vector<int64_t>& sizes) {
  std::vector<FactorCase> cases;
  for (const int64_t n : sizes) cases.push_back({n, in_double});
  return cases;
}
std::string FactorName(const ::testing::TestParamInfo<FactorCase>& info) {
  return absl::StrCat(info.param.n);
}
// Around the blocks of 128 (64 of double) and panels of 512 (256) of the factorization, and the
// levels of the inverse.
INSTANTIATE_TEST_SUITE_P(Float, FactorGpuTest,
                         ::testing::ValuesIn(Sizes(false,
                                                   {1, 2, 31, 64, 65, 127, 128, 129, 255, 257, 511,
                                                    512, 513, 641, 1023, 1024, 1088})),
                         FactorName);
INSTANTIATE_TEST_SUITE_P(Double, FactorGpuTest,
                         ::testing::ValuesIn(Sizes(true, {1, 2, 31, 63, 64, 65, 127, 128, 129, 255,
                                                          256, 257, 321, 513, 1023, 1088})),
                         FactorName);
// From 2048 on these take other products: a rest (2112, 3000), a pair (4224), two and a rest.
INSTANTIATE_TEST_SUITE_P(LargeFloat, FactorGpuTest,
                         ::testing::ValuesIn(Sizes(false,
                                                   {2047, 2048, 2112, 3000, 4224, 6211, 8320})),
                         FactorName);
INSTANTIATE_TEST_SUITE_P(LargeDouble, FactorGpuTest,
                         ::testing::ValuesIn(Sizes(true, {2048, 2112, 4224, 6211})), FactorName);

TEST_F(GptqFixture, FactorOfNothing) { EXPECT_OK(FactorHessian(context(), {.dim = 0})); }

class NotDefiniteGpuTest : public GptqFixture, public ::testing::WithParamInterface<bool> {
 protected:
  absl::Status FactorOf(int64_t n, const std::vector<float>& h, float add = 0.0f) {
    const auto device_h = Upload(h);
    std::vector<int32_t> perm(static_cast<size_t>(n));
    std::iota(perm.begin(), perm.end(), 0);
    const auto device_perm = Upload(perm);
    const auto device_add = Upload(std::vector<float>(static_cast<size_t>(n), add));
    auto u = Poisoned<float>(n * n);
    return FactorHessian(context(), {.dim = n,
                                     .h = device_h.data(),
                                     .perm = device_perm.data(),
                                     .diagonal_add = device_add.data(),
                                     .u = u.data(),
                                     .in_double = GetParam()});
  }
  static std::vector<float> Diagonal(int64_t n, float value) {
    std::vector<float> h(static_cast<size_t>(n * n), 0.0f);
    for (int64_t i = 0; i < n; ++i) h[i * n + i] = value;
    return h;
  }
  // A diagonal element that is zero, negative or not finite, wherever it stands: the one verdict is
  // read after all of the work.
  void RefusesBadDiagonals(int64_t n) {
    for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
      for (const float value : {0.0f, -1.0f, std::numeric_limits<float>::infinity(),
                                std::numeric_limits<float>::quiet_NaN()}) {
        std::vector<float> h = Diagonal(n, 2.0f);
        h[at * n + at] = value;
        EXPECT_THAT(FactorOf(n, h), testing::HasCode(absl::StatusCode::kFailedPrecondition))
            << n << " " << at << " " << value;
      }
    }
  }
  // Indefinite, though its diagonal is positive.
  void RefusesIndefinite(int64_t n, int64_t i, int64_t j) {
    std::vector<float> h = Diagonal(n, 1.0f);
    h[i * n + j] = h[j * n + i] = 1.5f;
    EXPECT_THAT(FactorOf(n, h), testing::HasCode(absl::StatusCode::kFailedPrecondition))
        << n << " " << i << " " << j;
  }
};

TEST_P(NotDefiniteGpuTest, BadDiagonalIsRefused) {
  for (const int64_t n : {1, 64, 300, 700}) RefusesBadDiagonals(n);
}
TEST_P(NotDefiniteGpuTest, LargeBadDiagonalIsRefused) { RefusesBadDiagonals(4224); }

// The pair in one panel, and in two.
TEST_P(NotDefiniteGpuTest, IndefiniteIsRefused) {
  RefusesIndefinite(300, 3, 290);
  RefusesIndefinite(700, 3, 600);
}
// Where the inverse goes on by triangular products.
TEST_P(NotDefiniteGpuTest, LargeIndefiniteIsRefused) {
  RefusesIndefinite(4224, 4200, 4220);
  RefusesIndefinite(4224, 5, 4000);
}

// Few directions that dominate, as of a text of few words: damping is lost in the rounding of
// float. The sums are of whole numbers, and exact.
TEST_P(NotDefiniteGpuTest, SmallDampingNeedsDouble) {
  constexpr int64_t kN = 900;
  constexpr int64_t kDirections = 4;
  std::vector<float> x = RandomNormal(kDirections * kN, 31);
  for (float& value : x) value = std::round(2 * value);
  std::vector<float> h(static_cast<size_t>(kN * kN), 0.0f);
  for (int64_t s = 0; s < kDirections; ++s) {
    for (int64_t i = 0; i < kN; ++i) {
      for (int64_t j = 0; j < kN; ++j) h[i * kN + j] += x[s * kN + i] * x[s * kN + j];
    }
  }
  EXPECT_EQ(FactorOf(kN, h, 1e-6f).ok(), GetParam());
}

std::string PrecisionName(const ::testing::TestParamInfo<bool>& precision) {
  return precision.param ? "Double" : "Float";
}
INSTANTIATE_TEST_SUITE_P(Precisions, NotDefiniteGpuTest, ::testing::Bool(), PrecisionName);

TEST_F(GptqFixture, RefusesGroupsThatDoNotFit) {
  EXPECT_THAT(QuantizeColumns(context(), {.rows = 1, .cols = 192, .group_size = 128}),
              testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                ::testing::HasSubstr("group_size: 128")));
  EXPECT_THAT(QuantizeColumns(context(), {.rows = 1, .cols = 137, .group_size = 137}),
              testing::HasCode(absl::StatusCode::kInvalidArgument));
}

class PackGpuTest : public GpuTest, public ::testing::WithParamInterface<int> {
 protected:
  void Check(int64_t rows, int64_t cols, int64_t group);
};

void PackGpuTest::Check(int64_t rows, int64_t cols, int64_t group) {
  const int bits = GetParam();
  const int64_t groups = cols / group;
  const bool packs_zeros = rows % 32 == 0;
  std::mt19937 generator(7);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * cols));
  std::vector<uint8_t> zeros(static_cast<size_t>(rows * groups));
  for (uint8_t& c : codes) c = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
  for (uint8_t& z : zeros) z = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
  std::vector<float> scales = RandomNormal(rows * groups, 9);
  for (float& s : scales) s = HalfToFloat(FloatToHalf(std::abs(s)));

  const auto device_codes = Upload(codes);
  const auto device_zeros = Upload(zeros);
  const auto device_scales = Upload(scales);
  auto qweight = Poisoned<uint32_t>(cols / 32 * bits * rows);
  auto qzeros = Poisoned<uint32_t>(packs_zeros ? groups * (rows / 32 * bits) : 0);
  auto half_scales = Poisoned<__half>(groups * rows);
  auto dequantized = Poisoned<__nv_bfloat16>(rows * cols);
  ASSERT_OK(Pack({.rows = rows,
                  .cols = cols,
                  .bits = bits,
                  .group_size = group,
                  .codes = device_codes.data(),
                  .scales = device_scales.data(),
                  .zeros = device_zeros.data(),
                  .qweight = qweight.data(),
                  .qzeros = packs_zeros ? qzeros.data() : nullptr,
                  .half_scales = half_scales.data(),
                  .dequantized = dequantized.data(),
                  .stream = context().stream()}));
  // Bit i·bits of a column's stream begins code i.
  std::vector<uint32_t> expected_weights(static_cast<size_t>(qweight.size()), 0);
  std::vector<uint32_t> expected_zeros(static_cast<size_t>(qzeros.size()), 0);
  const auto put = [&](std::vector<uint32_t>& words, auto word_index, int64_t i, uint32_t code) {
    for (int b = 0; b < bits; ++b) {
      const int64_t bit = i * bits + b;
      words[word_index(bit / 32)] |= ((code >> b) & 1u) << (bit % 32);
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      put(
          expected_weights, [&](int64_t m) { return m * rows + r; }, c, codes[r * cols + c]);
    }
    for (int64_t g = 0; packs_zeros && g < groups; ++g) {
      put(
          expected_zeros, [&](int64_t m) { return g * (rows / 32 * bits) + m; }, r,
          zeros[r * groups + g]);
    }
  }
  EXPECT_EQ(Download(qweight), expected_weights) << rows << "x" << cols;
  EXPECT_EQ(Download(qzeros), expected_zeros) << rows << "x" << cols;
  const std::vector<__half> host_scales = Download(half_scales);
  const std::vector<__nv_bfloat16> host_dequantized = Download(dequantized);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      ASSERT_EQ(__half2float(host_scales[g * rows + r]), scales[r * groups + g]);
    }
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t g = r * groups + c / group;
      const float w =
          scales[g] * static_cast<float>(static_cast<int>(codes[r * cols + c]) - zeros[g]);
      ASSERT_EQ(__bfloat162float(host_dequantized[r * cols + c]), Bf16ToFloat(FloatToBf16(w)));
    }
  }
}

TEST_P(PackGpuTest, WritesTheArtifactsBitStream) {
  struct Shape {
    int64_t rows, cols, group;
  };
  for (const Shape& s : std::vector<Shape>{{0, 32, 32},
                                           {32, 0, 32},
                                           {1, 32, 32},
                                           {37, 64, 32},
                                           {96, 160, 32},
                                           {131, 288, 288},
                                           {32, 96, 3},
                                           {576, 1536, 128}}) {
    Check(s.rows, s.cols, s.group);
    if (HasFatalFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Bits, PackGpuTest, ::testing::Values(2, 3, 4, 8));

TEST_F(GptqFixture, NothingToQuantize) {
  EXPECT_OK(QuantizeColumns(context(), {.rows = 0, .cols = 128}));
  EXPECT_OK(QuantizeColumns(context(), {.rows = 3, .cols = 0, .group_size = 128}));
}

TEST_F(GptqFixture, FailedAllocationLeavesNothingBehind) {
  const int64_t before = DeviceMemoryUse().bytes_now;
  {
    const auto w = Upload(RandomNormal(64 * 128, 1));
    std::vector<int32_t> perm(128);
    std::iota(perm.begin(), perm.end(), 0);
    const auto device_perm = Upload(perm);
    auto codes = Poisoned<uint8_t>(64 * 128);
    auto scales = Poisoned<float>(64);
    auto zeros = Poisoned<uint8_t>(64);
    const QuantizeColumnsParams params{.rows = 64,
                                       .cols = 128,
                                       .w = w.data(),
                                       .perm = device_perm.data(),
                                       .codes = codes.data(),
                                       .scales = scales.data(),
                                       .zeros = zeros.data()};
    for (int64_t nth = 1; nth <= 2; ++nth) {
      FailAllocationForTest(nth);
      EXPECT_THAT(QuantizeColumns(context(), params),
                  testing::StatusIs(absl::StatusCode::kResourceExhausted,
                                    ::testing::HasSubstr("bytes needed")));
    }
    FailAllocationForTest(0);
    EXPECT_OK(QuantizeColumns(context(), params));
  }
  ASSERT_OK(context().Synchronize());
  EXPECT_EQ(DeviceMemoryUse().bytes_now, before);
}

}  // namespace
}  // namespace walsh::kernels::cuda
