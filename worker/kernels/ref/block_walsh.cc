#include <bit>
#include <cmath>
#include <vector>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {
namespace {

// Entry (row, col) of the natural-order Hadamard matrix: the sign of the common bits' parity.
double Hadamard(uint64_t row, uint64_t col) {
  return std::popcount(row & col) % 2 == 0 ? 1.0 : -1.0;
}

uint64_t ReverseBits(uint64_t value, int n_bits) {
  uint64_t reversed = 0;
  for (int bit = 0; bit < n_bits; ++bit) reversed |= ((value >> bit) & 1) << (n_bits - 1 - bit);
  return reversed;
}

}  // namespace

absl::Status BlockWalsh(const BlockWalshParams& p, const Stream& /*stream*/) {
  const auto block = static_cast<uint64_t>(p.block);
  const int n_bits = std::countr_zero(block);
  const double norm = 1.0 / std::sqrt(static_cast<double>(p.block));
  std::vector<double> y(static_cast<size_t>(p.block));
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t first = 0; first < p.cols; first += p.block) {
      float* x = p.x + row * p.x_stride + first;
      for (uint64_t s = 0; s < block; ++s) {
        // The Walsh row of sequency s is the natural row that its bit-reversed Gray code names.
        const uint64_t natural = p.sequency ? ReverseBits(s ^ (s >> 1), n_bits) : s;
        double sum = 0;
        for (uint64_t j = 0; j < block; ++j) sum += Hadamard(natural, j) * x[j];
        y[s] = sum * norm;
      }
      for (uint64_t s = 0; s < block; ++s) x[s] = static_cast<float>(y[s]);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
