#include "worker/engine/cuda/kv_storage.h"

#include <bit>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::engine::cuda {
namespace {

namespace ops = kernels::cuda;

absl::Status NotServed(const std::string& what) {
  return absl::UnimplementedError(absl::StrCat("no CUDA kernels for ", what));
}

}  // namespace

absl::StatusOr<KvStorage> KvStorageOf(const OnlineTransforms& online, const ModelConfig& config) {
  KvStorage storage;
  const OnlineTransforms::BlockRotation& rotation = online.query_key;
  if (!online.kv_cache.is_on()) {
    if (rotation.block != 0) return NotServed("R3 without a quantized KV cache");
    return storage;
  }
  const OnlineTransforms::Rounding& rounding = online.kv_cache;
  if (rounding.symmetric) return NotServed("a KV cache of symmetric grids");
  const int64_t group =
      rounding.group_size == OnlineTransforms::kWholeRow ? config.kv_width() : rounding.group_size;
  storage.form = {.bits = rounding.bits,
                  .group_size = group == config.head_dim ? ops::KvForm::kHead : group,
                  .clip = static_cast<float>(rounding.clip_ratio)};
  if (const absl::Status status = ops::CheckKvForm(storage.form, config.head_dim); !status.ok()) {
    return NotServed(std::string(status.message()));
  }
  if (rotation.block == 0) return storage;
  if (rotation.block != config.head_dim ||
      !std::has_single_bit(static_cast<uint64_t>(config.head_dim))) {
    return NotServed(absl::StrCat("R3 in blocks of ", rotation.block, " with heads of ",
                                  config.head_dim, ", they take heads of a power of two"));
  }
  storage.heads = rotation.sequency ? ops::HeadTransform::kWalsh : ops::HeadTransform::kHadamard;
  return storage;
}

}  // namespace walsh::engine::cuda
