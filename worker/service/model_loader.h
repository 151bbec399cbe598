// Reads an artifact into the memory of the device that is to serve it.
//
// What the CUDA kernels do not serve (engine/cuda/cuda_model.h: UNIMPLEMENTED) is served by the CPU
// of the same worker, with a warning that says why: slower, and the same answers.
//
// Errors: those of engine::LoadCudaModel and engine::LoadedModel::LoadArtifact
#pragma once

#include <functional>

#include "absl/status/status.h"
#include "common/kv_cache_dtype.h"
#include "worker/service/job_device.h"
#include "worker/service/model_store.h"

namespace walsh::service {

struct ModelLoaderOptions {
  int n_threads = 1;
  bool batch_invariant = false;  // as in engine::CudaModelOptions
  KvCacheDtype kv_cache_dtype = KvCacheDtype::kAuto;
};
// `device` outlives what is returned. `on_device_broken` is called with a status that
// IsDeviceBroken (worker/kernels/device_failure.h).
ModelStore::Loader MakeModelLoader(const JobDevice& device, const CudaDevices& cuda,
                                   const ModelLoaderOptions& options,
                                   std::function<void(const absl::Status&)> on_device_broken);

}  // namespace walsh::service
