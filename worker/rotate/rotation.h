// Orthogonal rotations of the residual stream and of attention heads.
//
// R = diag(s) · H, with s optional random signs and H the orthonormal Hadamard or Walsh matrix of
// the whole width, or a block-diagonal one of equal blocks. It is never written out: a row is
// multiplied by butterflies, a small dense core where the width is no power of two, and a
// permutation.
//
// Source:  GSR (arXiv 2505.03810); QuaRot (arXiv 2404.00456); SpinQuant's offline R2
//          (arXiv 2405.16406)
// Symbols: R [n, n] orthogonal; b is the block of local rotations
// Errors:  INVALID_ARGUMENT  no such rotation for this width; the message recommends gsr
// Threads: const methods are safe from several threads
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/rotate/walsh_matrix.h"

namespace walsh::rotate {

enum class Kind { kNone, kHadamard, kWalsh, kLocalHadamard, kGsr };

absl::StatusOr<Kind> ParseKind(std::string_view name);  // "none", "hadamard", "walsh", …
std::string_view KindName(Kind kind);
// Block-diagonal: LOCAL_HADAMARD and GSR.
bool IsLocal(Kind kind);

// The block of GSR and LOCAL_HADAMARD: the largest power of two ≤ min(group, 128) that divides
// `width`. `group` −1 (per channel) counts as 128. INVALID_ARGUMENT below 16.
absl::StatusOr<int64_t> DefaultBlock(int64_t width, int64_t group);

class Rotation {
 public:
  struct Options {
    Kind kind = Kind::kGsr;
    int64_t block = 0;  // of local kinds: a power of two, at least 16, that divides the width
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
  // What R is made of, for a backend that applies it itself: `scale`, then the rows of H are
  // gathered, then the butterflies of H_core ⊗ H_2^k, over each block.
  struct Parts {
    int64_t block = 0;  // order of H = core · 2^k
    int64_t core = 1;
    std::span<const int8_t> core_matrix;  // [core, core], ±1; {1} when core is 1
    std::span<const int32_t> row_order;   // [block]: row s of H is this natural row; empty: natural
    std::span<const double> signs;        // [width] or empty
    double normalizer = 1;                // 1 / sqrt(block)
  };
  // Not of the identity.
  Parts parts() const;

  // R itself, [width, width] row-major, for tests and small widths.
  std::vector<double> Dense() const;

 private:
  // block ← block · H_core ⊗ H_{2^k}, or its transpose, unnormalized. `scratch` has the block's
  // size.
  void MultiplyHadamard(double* block, double* scratch, bool transposed) const;

  int64_t width_ = 0;
  Options options_;
  HadamardOrder order_;             // of one block
  std::vector<int8_t> core_;        // [core, core]
  std::vector<int32_t> row_order_;  // [block] row s of H is this natural row; empty: natural
  std::vector<double> signs_;       // [width] or empty
  double normalizer_ = 1;           // 1 / sqrt(block)
};

}  // namespace walsh::rotate
