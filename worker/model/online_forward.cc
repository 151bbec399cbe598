#include "worker/model/online_forward.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "common/status_macros.h"

namespace walsh {
namespace {

using BlockRotation = OnlineTransforms::BlockRotation;
using Rounding = OnlineTransforms::Rounding;

// Rows of a tile in double: some hundred kilobytes.
constexpr int64_t kTileElements = 32768;

absl::StatusOr<rotate::Rotation> MakeRotation(const BlockRotation& rotation, int64_t width) {
  rotate::Rotation::Options options{rotate::Kind::kNone, 0, false, 0};
  if (rotation.block == width) {
    options.kind = rotation.sequency ? rotate::Kind::kWalsh : rotate::Kind::kHadamard;
  } else if (rotation.block != 0) {
    options.kind = rotation.sequency ? rotate::Kind::kGsr : rotate::Kind::kLocalHadamard;
    options.block = rotation.block;
  }
  return rotate::Rotation::Create(width, options);
}

// x ← x · R for each piece of rotation.width() values.
absl::Status Rotate(const BlockRotation& how, const rotate::Rotation& rotation, float* x,
                    int64_t rows, int64_t cols, const kernels::Stream& stream) {
  if (rotation.is_identity()) return absl::OkStatus();
  if (std::has_single_bit(static_cast<uint64_t>(how.block))) {
    return kernels::BlockWalsh({.rows = rows,
                                .cols = cols,
                                .block = how.block,
                                .sequency = how.sequency,
                                .x = x,
                                .x_stride = cols},
                               stream);
  }
  const int64_t width = rotation.width();
  const int64_t n_vectors = rows * (cols / width);
  const int64_t per_tile = std::max<int64_t>(1, kTileElements / width);
  const auto tile = [&](int64_t index) {
    const int64_t first = index * per_tile;
    const int64_t count = std::min(per_tile, n_vectors - first);
    float* values = x + first * width;
    std::vector<double> work(values, values + count * width);
    rotation.ApplyRight(work.data(), count, width);
    std::transform(work.begin(), work.end(), values,
                   [](double v) { return static_cast<float>(v); });
  };
  const int64_t n_tiles = (n_vectors + per_tile - 1) / per_tile;
  if (stream.pool != nullptr) {
    stream.pool->ParallelFor(n_tiles, tile);
  } else {
    for (int64_t i = 0; i < n_tiles; ++i) tile(i);
  }
  return absl::OkStatus();
}

absl::Status Round(const Rounding& rounding, float* x, int64_t rows, int64_t cols,
                   const kernels::Stream& stream) {
  if (!rounding.is_on()) return absl::OkStatus();
  const bool is_whole_row = rounding.group_size == OnlineTransforms::kWholeRow;
  return kernels::FakeQuantize({.rows = rows,
                                .cols = cols,
                                .group = is_whole_row ? cols : rounding.group_size,
                                .bits = rounding.bits,
                                .symmetric = rounding.symmetric,
                                .clip = static_cast<float>(rounding.clip_ratio),
                                .x = x,
                                .x_stride = cols},
                               stream);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const OnlineForward>> OnlineForward::Create(
    const OnlineTransforms& transforms, const ModelConfig& config) {
  if (transforms.empty()) return std::shared_ptr<const OnlineForward>();
  WALSH_RETURN_IF_ERROR(CheckOnlineTransforms(transforms, config));
  OnlineForward forward;
  forward.transforms_ = transforms;
  forward.intermediate_ = config.intermediate;
  forward.q_width_ = config.q_width();
  forward.kv_width_ = config.kv_width();
  forward.head_dim_ = config.head_dim;
  WALSH_ASSIGN_OR_RETURN(forward.down_, MakeRotation(transforms.down_input, config.intermediate));
  WALSH_ASSIGN_OR_RETURN(forward.head_, MakeRotation(transforms.query_key, config.head_dim));
  return std::make_shared<const OnlineForward>(std::move(forward));
}

absl::Status OnlineForward::PrepareInput(float* x, int64_t n_tokens, int64_t width,
                                         const kernels::Stream& stream) const {
  return Round(transforms_.activations, x, n_tokens, width, stream);
}

absl::Status OnlineForward::PrepareDownInput(float* x, int64_t n_tokens,
                                             const kernels::Stream& stream) const {
  WALSH_RETURN_IF_ERROR(Rotate(transforms_.down_input, down_, x, n_tokens, intermediate_, stream));
  return Round(transforms_.activations, x, n_tokens, intermediate_, stream);
}

absl::Status OnlineForward::PrepareHeads(float* q, float* k, float* v, int64_t n_tokens,
                                         const kernels::Stream& stream) const {
  WALSH_RETURN_IF_ERROR(Rotate(transforms_.query_key, head_, q, n_tokens, q_width_, stream));
  WALSH_RETURN_IF_ERROR(Rotate(transforms_.query_key, head_, k, n_tokens, kv_width_, stream));
  WALSH_RETURN_IF_ERROR(Round(transforms_.kv_cache, k, n_tokens, kv_width_, stream));
  return Round(transforms_.kv_cache, v, n_tokens, kv_width_, stream);
}

}  // namespace walsh
