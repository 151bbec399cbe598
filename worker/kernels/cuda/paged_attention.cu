#include <bit>
#include <limits>

#include "common/status_macros.h"
#include "worker/kernels/cuda/mma.cuh"
#include "worker/kernels/cuda/paged_attention.cuh"
#include "worker/kernels/cuda/paged_attention.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int64_t kAlignment = 16;

int GroupSizeLog2(const KvPoolShape& shape) {
  return std::countr_zero(
      static_cast<uint64_t>(shape.head_dim / shape.form.n_groups(shape.head_dim)));
}

absl::Status CheckRows(const char* name, const char* what, const bf16* rows, int64_t stride,
                       int64_t width) {
  const auto address = reinterpret_cast<uintptr_t>(rows);
  if (address % kAlignment != 0 || stride % 8 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", what, " and its rows (", stride,
                                                   " apart) must begin at multiples of 16 bytes"));
  }
  if (stride < width) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", what, "_stride ", stride, ", a row has ", width));
  }
  return absl::OkStatus();
}

}  // namespace

bool IsPagedHeadDim(int64_t head_dim) {
  return ForHeadDim("", head_dim, []<int kDim>() { return absl::OkStatus(); }).ok();
}

absl::Status CheckPool(const char* name, const KvBatch& batch, const KvPoolLayer& pool) {
  const KvPoolShape& shape = pool.shape;
  if (shape.n_blocks <= 0 || shape.n_kv_heads <= 0 || shape.head_dim <= 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": a pool of ", shape.n_blocks,
                                                   " blocks, ", shape.n_kv_heads,
                                                   " kv heads and a head_dim of ", shape.head_dim));
  }
  if (const absl::Status status = CheckKvForm(shape.form, shape.head_dim); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", status.message()));
  }
  if (!(shape.form.clip > 0 && shape.form.clip <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": clip ratio ", shape.form.clip, ", must be above 0 and at most 1"));
  }
  if (reinterpret_cast<uintptr_t>(pool.data) % kAlignment != 0 ||
      reinterpret_cast<uintptr_t>(batch.tables) % kAlignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": pool and tables must begin at multiples of 16 bytes"));
  }
  if (batch.n_sequences < 0 || batch.n_rows < 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": a batch of ", batch.n_sequences,
                                                   " sequences and ", batch.n_rows, " rows"));
  }
  const int64_t blocks_limit = std::numeric_limits<int32_t>::max() / kPoolBlockTokens;
  if (batch.max_blocks < 0 || batch.max_blocks > blocks_limit ||
      batch.max_blocks % kTableAlignment != 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": max_blocks ", batch.max_blocks,
                                                   ", must be a multiple of ", kTableAlignment,
                                                   " and at most ", blocks_limit));
  }
  return absl::OkStatus();
}

absl::Status CheckTransform(const char* name, const QkvTransform& transform,
                            const KvPoolShape& shape) {
  if (transform.heads != HeadTransform::kNone &&
      (!shape.form.is_quantized() || !std::has_single_bit(static_cast<uint64_t>(shape.head_dim)))) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": a Hadamard transform of heads of ", shape.head_dim, " in a pool of ",
        shape.form.bits, " bits, it is for heads of a power of two in quantized pools"));
  }
  for (const float* vector :
       {transform.bias, transform.q_norm, transform.k_norm, transform.inverse_frequencies}) {
    if (reinterpret_cast<uintptr_t>(vector) % sizeof(float2) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": vectors of the transform must begin at multiples of 8 bytes"));
    }
  }
  return absl::OkStatus();
}

absl::Status MakeArguments(const char* name, const PagedAttentionParams& p,
                           PagedAttentionArguments* arguments) {
  WALSH_RETURN_IF_ERROR(CheckPool(name, p.batch, p.pool));
  const KvPoolShape& shape = p.pool.shape;
  if (p.n_heads <= 0 || p.n_heads % shape.n_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": n_heads ", p.n_heads, " is not a multiple of n_kv_heads ", shape.n_kv_heads));
  }
  if (p.window < 0 || p.window > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": a window of ", p.window, " tokens"));
  }
  if (!(p.scale > 0)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": scale ", p.scale, ", must be above 0"));
  }
  const int64_t width = p.n_heads * shape.head_dim;
  const int64_t q_stride = p.q_stride == 0 ? width : p.q_stride;
  const int64_t y_stride = p.y_stride == 0 ? width : p.y_stride;
  WALSH_RETURN_IF_ERROR(CheckRows(name, "q", p.q, q_stride, width));
  WALSH_RETURN_IF_ERROR(CheckRows(name, "y", p.y, y_stride, width));
  *arguments = {.batch = p.batch,
                .pool = static_cast<const unsigned char*>(p.pool.data),
                .block_bytes = shape.block_bytes(),
                .head_bytes = shape.head_bytes(),
                .n_groups = static_cast<int>(shape.form.n_groups(shape.head_dim)),
                .group_size_log2 = GroupSizeLog2(shape),
                .n_kv_heads = static_cast<int>(shape.n_kv_heads),
                .queries_per_key = static_cast<int>(p.n_heads / shape.n_kv_heads),
                .window = static_cast<int>(p.window),
                .scale_log2 = p.scale * kLog2E,
                .q = p.q,
                .q_stride = q_stride,
                .y = p.y,
                .y_stride = y_stride};
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
