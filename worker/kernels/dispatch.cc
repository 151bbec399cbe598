// Validates, then runs an operation on the stream's device.
#include "common/status_macros.h"
#include "worker/kernels/kernels.h"
#include "worker/kernels/validate.h"

namespace walsh::kernels {

#define WALSH_DEFINE_KERNEL(Op)                                     \
  absl::Status Op(const Op##Params& params, const Stream& stream) { \
    WALSH_RETURN_IF_ERROR(Validate(params));                        \
    switch (stream.backend) {                                       \
      case Backend::kRef:                                           \
        return ref::Op(params, stream);                             \
      case Backend::kCpu:                                           \
        return cpu::Op(params, stream);                             \
    }                                                               \
    return absl::InternalError(#Op ": unknown backend");            \
  }
WALSH_FOR_EACH_KERNEL(WALSH_DEFINE_KERNEL)
#undef WALSH_DEFINE_KERNEL

#define WALSH_DEFINE_BATCH(Op)                                                             \
  absl::Status Op##Batch(std::span<const Op##Params> items, const Stream& stream) {        \
    WALSH_RETURN_IF_ERROR(ValidateBatch(items));                                           \
    if (stream.backend == Backend::kCpu) return cpu::Op##Batch(items, stream);             \
    for (const Op##Params& params : items) WALSH_RETURN_IF_ERROR(ref::Op(params, stream)); \
    return absl::OkStatus();                                                               \
  }
WALSH_DEFINE_BATCH(Attention)
WALSH_DEFINE_BATCH(PackedMatmul)
#undef WALSH_DEFINE_BATCH

}  // namespace walsh::kernels
