// Hadamard and Walsh matrices: orders, entries and row order.
//
// A Hadamard matrix of order n = m · 2^k is the Kronecker product H_m ⊗ H_{2^k} of a core and
// Sylvester's matrix. The core is the smallest that the order leaves open: 1 for a power of two,
// else four times the odd part of n (worker/rotate/hadamard_core.h says which there are). The Walsh
// matrix has the same rows, sorted, stably, by sequency (sign changes along the row). For n = 2^k
// row s of it is Sylvester's row bitreverse_k(s ^ (s >> 1)), and the matrix is symmetric; with
// another core it is not.
//
// Source:  GSR (arXiv 2505.03810) for the use of the order
// Errors:  INVALID_ARGUMENT  an order that has no such matrix here, or too large to write out
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace walsh::rotate {

// n = core · 2^log2_sylvester.
struct HadamardOrder {
  int64_t core = 1;
  int log2_sylvester = 0;
  int64_t n() const { return core << log2_sylvester; }
};
absl::StatusOr<HadamardOrder> FactorHadamardOrder(int64_t n);

// Element s is the row of the Hadamard matrix that row s of the Walsh matrix is.
std::vector<int32_t> WalshRowOrder(const HadamardOrder& order);

// The whole matrices with entries ±1, [n, n]; n at most 8,192.
absl::StatusOr<std::vector<int8_t>> HadamardMatrix(int64_t n);
absl::StatusOr<std::vector<int8_t>> WalshMatrix(int64_t n);

// Sign changes along a row.
int64_t Sequency(std::span<const int8_t> row);

}  // namespace walsh::rotate
