#include "worker/pipeline/cuda/cuda_backend.h"

namespace walsh::pipeline {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int) {
  return absl::FailedPreconditionError(
      "built without CUDA (WALSH_CUDA=OFF, or no CUDA compiler was found)");
}

}  // namespace walsh::pipeline
