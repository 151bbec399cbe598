// Models that a CUDA device serves.
//
// No CUDA header here; a build without CUDA has the same function, which says so.
//
// Errors:  those of ArtifactReader::Open
//          UNIMPLEMENTED        what the device's kernels cannot do for this artifact, by name, or
//          a
//                               device before compute 9.0; the CPU can (engine::LoadedModel)
//          FAILED_PRECONDITION  built without CUDA, no such device, no cuBLAS on this machine
//          RESOURCE_EXHAUSTED   with the bytes needed and free
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/kv_cache_dtype.h"
#include "worker/engine/served_model.h"

namespace walsh::engine {

struct CudaModelOptions {
  int device = 0;
  int n_threads = 1;   // that check digests
  bool verify = true;  // check walsh.json's digests
  // Rows have the same bits in any batch and however prompts are cut: many of them, too, are
  // multiplied as few are (worker/engine/cuda/products.h), which takes up to several times as long.
  bool batch_invariant = false;
  KvCacheDtype kv_cache_dtype = KvCacheDtype::kAuto;
  bool use_graphs = true;  // false launches every kernel of a step by itself, as tests compare
};
absl::StatusOr<std::shared_ptr<ServedModel>> LoadCudaModel(const std::string& directory,
                                                           const CudaModelOptions& options);

}  // namespace walsh::engine
