#include "worker/engine/cuda/cuda_model.h"

namespace walsh::engine {

absl::StatusOr<std::shared_ptr<ServedModel>> LoadCudaModel(const std::string&,
                                                           const CudaModelOptions&) {
  return absl::FailedPreconditionError("this worker was built without CUDA");
}

}  // namespace walsh::engine
