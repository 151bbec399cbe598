#include "worker/rotate/rotation.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/rotate/hadamard_core.h"

namespace walsh::rotate {
namespace {

constexpr std::pair<Kind, std::string_view> kKindNames[] = {
    {Kind::kNone, "none"},   {Kind::kHadamard, "hadamard"},
    {Kind::kWalsh, "walsh"}, {Kind::kLocalHadamard, "local-hadamard"},
    {Kind::kGsr, "gsr"},
};
constexpr int64_t kBlockMin = 16;
constexpr int64_t kBlockDefaultMax = 128;

// SplitMix64 (Steele et al. 2014): one multiplication chain per value, the same on every machine.
uint64_t NextRandom(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Fast Walsh-Hadamard transform in Sylvester's order, unnormalized.
void Butterflies(double* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t start = 0; start < n; start += 2 * half) {
      double* low = x + start;
      double* high = low + half;
      for (int64_t i = 0; i < half; ++i) {
        const double a = low[i];
        const double b = high[i];
        low[i] = a + b;
        high[i] = a - b;
      }
    }
  }
}

absl::Status CheckBlock(int64_t width, int64_t block) {
  if (block < kBlockMin || !std::has_single_bit(static_cast<uint64_t>(block))) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rotation block ", block, ": must be a power of two and at least ", kBlockMin));
  }
  if (width % block != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rotation block ", block, " does not divide the width ", width));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Kind> ParseKind(std::string_view name) {
  for (const auto& [kind, kind_name] : kKindNames) {
    if (kind_name == name) return kind;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "rotation '", std::string(name), "': must be none, hadamard, walsh, local-hadamard or gsr"));
}

std::string_view KindName(Kind kind) {
  for (const auto& [candidate, name] : kKindNames) {
    if (candidate == kind) return name;
  }
  return "unknown";
}

bool IsLocal(Kind kind) { return kind == Kind::kLocalHadamard || kind == Kind::kGsr; }

absl::StatusOr<int64_t> DefaultBlock(int64_t width, int64_t group) {
  const int64_t limit = group < 0 ? kBlockDefaultMax : std::min(group, kBlockDefaultMax);
  int64_t block = 1;
  while (2 * block <= limit && width % (2 * block) == 0) block *= 2;
  if (block < kBlockMin) {
    return absl::InvalidArgumentError(
        absl::StrCat("no rotation block for width ", width, " and group ", group,
                     ": the largest power of two that divides the width is ", block, ", at least ",
                     kBlockMin, " is needed; use rotation none"));
  }
  return block;
}

absl::StatusOr<Rotation> Rotation::Create(int64_t width, const Options& options) {
  if (width <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("rotation width ", width, " is not positive"));
  }
  Rotation r;
  r.width_ = width;
  r.options_ = options;
  if (options.kind == Kind::kNone) return r;

  int64_t block = width;
  if (IsLocal(options.kind)) {
    WALSH_RETURN_IF_ERROR(CheckBlock(width, options.block));
    block = options.block;
  }
  WALSH_ASSIGN_OR_RETURN(r.order_, FactorHadamardOrder(block));
  r.core_ = HadamardCore(r.order_.core);
  r.normalizer_ = 1.0 / std::sqrt(static_cast<double>(block));
  if (options.kind == Kind::kWalsh || options.kind == Kind::kGsr) {
    r.row_order_ = WalshRowOrder(r.order_);
  }
  if (options.random_signs) {
    uint64_t state = options.seed;
    r.signs_.resize(static_cast<size_t>(width));
    for (double& sign : r.signs_) sign = (NextRandom(state) >> 63) != 0 ? -1.0 : 1.0;
  }
  return r;
}

void Rotation::MultiplyHadamard(double* block, double* scratch, bool transposed) const {
  const int64_t sylvester = int64_t{1} << order_.log2_sylvester;
  for (int64_t i = 0; i < order_.core; ++i) Butterflies(block + i * sylvester, sylvester);
  if (order_.core == 1) return;
  std::fill_n(scratch, order_.n(), 0.0);
  for (int64_t i = 0; i < order_.core; ++i) {
    double* out = scratch + i * sylvester;
    for (int64_t j = 0; j < order_.core; ++j) {
      const double* in = block + j * sylvester;
      const double sign =
          core_[static_cast<size_t>(transposed ? i * order_.core + j : j * order_.core + i)];
      for (int64_t a = 0; a < sylvester; ++a) out[a] += sign * in[a];
    }
  }
  std::copy_n(scratch, order_.n(), block);
}

void Rotation::ApplyRight(double* x, int64_t rows, int64_t stride) const {
  if (is_identity()) return;
  const int64_t block = order_.n();
  std::vector<double> work(static_cast<size_t>(block)), scratch(static_cast<size_t>(block));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t start = 0; start < width_; start += block) {
      double* v = x + row * stride + start;
      if (!signs_.empty()) {
        for (int64_t i = 0; i < block; ++i) v[i] *= signs_[static_cast<size_t>(start + i)];
      }
      if (row_order_.empty()) {
        MultiplyHadamard(v, scratch.data(), false);
        for (int64_t i = 0; i < block; ++i) v[i] *= normalizer_;
      } else {
        for (int64_t s = 0; s < block; ++s) {
          work[static_cast<size_t>(row_order_[static_cast<size_t>(s)])] = v[s];
        }
        MultiplyHadamard(work.data(), scratch.data(), false);
        for (int64_t i = 0; i < block; ++i) v[i] = work[static_cast<size_t>(i)] * normalizer_;
      }
    }
  }
}

void Rotation::ApplyRightTransposed(double* x, int64_t rows, int64_t stride) const {
  if (is_identity()) return;
  const int64_t block = order_.n();
  std::vector<double> work(static_cast<size_t>(block)), scratch(static_cast<size_t>(block));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t start = 0; start < width_; start += block) {
      double* v = x + row * stride + start;
      MultiplyHadamard(v, scratch.data(), true);
      if (!row_order_.empty()) {
        std::copy_n(v, block, work.data());
        for (int64_t s = 0; s < block; ++s) {
          v[s] = work[static_cast<size_t>(row_order_[static_cast<size_t>(s)])];
        }
      }
      for (int64_t i = 0; i < block; ++i) {
        v[i] *= signs_.empty() ? normalizer_ : normalizer_ * signs_[static_cast<size_t>(start + i)];
      }
    }
  }
}

Rotation::Parts Rotation::parts() const {
  return {order_.n(), order_.core, core_, row_order_, signs_, normalizer_};
}

std::vector<double> Rotation::Dense() const {
  std::vector<double> r(static_cast<size_t>(width_ * width_), 0.0);
  for (int64_t i = 0; i < width_; ++i) r[static_cast<size_t>(i * width_ + i)] = 1.0;
  ApplyRight(r.data(), width_, width_);
  return r;
}

}  // namespace walsh::rotate
