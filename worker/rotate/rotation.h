// Orthogonal rotations of the residual stream, and their folding into weights.
//
// Source:  GSR (arXiv 2505.03810); QuaRot (arXiv 2404.00456) for the folding; SpinQuant's offline
// R2
//          (arXiv 2405.16406).
// Symbols: R [n, n] orthogonal; a linear that reads the residual stream becomes W R, one that
// writes it
//          Rᵀ W; b is the block of local rotations.
// Errors:  INVALID_ARGUMENT  no such rotation for this width; the message recommends gsr
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace walsh::rotate {

enum class Kind { kNone, kHadamard, kWalsh, kLocalHadamard, kGsr };

absl::StatusOr<Kind> ParseKind(std::string_view name);  // "none", "hadamard", "walsh", …
std::string_view KindName(Kind kind);

// The block of GSR and LOCAL_HADAMARD: the largest power of two ≤ min(group, 128) that divides
// `width`. `group` −1 (per channel) counts as 128. INVALID_ARGUMENT below 16.
absl::StatusOr<int64_t> DefaultBlock(int64_t width, int64_t group);

class Rotation {
 public:
  struct Options {
    Kind kind = Kind::kGsr;
    int64_t block = 0;  // of local kinds
    bool random_signs = false;
    uint64_t seed = 0;
  };
  static absl::StatusOr<Rotation> Create(int64_t width, const Options& options);

  int64_t width() const { return width_; }
  bool is_identity() const { return options_.kind == Kind::kNone; }
  // x[i, :] ← x[i, :] · R for each of `rows` rows, in place, in double.
  void ApplyRight(double* x, int64_t rows, int64_t stride) const;
  // x[i, :] ← x[i, :] · Rᵀ.
  void ApplyRightTransposed(double* x, int64_t rows, int64_t stride) const;
  // R itself, [width, width] row-major, for tests and small widths.
  std::vector<double> Dense() const;

 private:
  int64_t width_ = 0;
  Options options_;
  std::vector<double> signs_;  // [width] or empty
  std::vector<double> block_;  // [b, b] or [width, width], orthonormal
  int64_t block_width_ = 0;
};

// Hadamard matrix (entries ±1) of order n, rows in natural order: 2^k and 2^k·36 (Paley's second
// construction, q = 17).
absl::StatusOr<std::vector<int8_t>> HadamardMatrix(int64_t n);
// The rows of HadamardMatrix(n) sorted stably by sign changes; for n = 2^k row s has s of them.
absl::StatusOr<std::vector<int8_t>> WalshMatrix(int64_t n);
// Sign changes along a row.
int64_t Sequency(std::span<const int8_t> row);

}  // namespace walsh::rotate
