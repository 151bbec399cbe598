#include "worker/service/model_loader.h"

#include <memory>
#include <string>
#include <utility>

#include "common/log.h"
#include "worker/engine/loaded_model.h"
#include "worker/kernels/device_failure.h"

namespace walsh::service {
namespace {

using LoadResult = absl::StatusOr<std::shared_ptr<engine::ServedModel>>;

}  // namespace

ModelStore::Loader MakeModelLoader(const JobDevice& device, const CudaDevices& cuda,
                                   const ModelLoaderOptions& options,
                                   std::function<void(const absl::Status&)> on_device_broken) {
  return [&device, load = cuda.load, options, on_device_broken = std::move(on_device_broken)](
             const std::string& directory) -> LoadResult {
    if (device.cuda_device.has_value() && load) {
      LoadResult model = load(directory, {.device = *device.cuda_device,
                                          .n_threads = options.n_threads,
                                          .batch_invariant = options.batch_invariant,
                                          .kv_cache_dtype = options.kv_cache_dtype});
      if (IsDeviceBroken(model.status())) {
        on_device_broken(model.status());
        return DeviceBrokenError(device.name, model.status());
      }
      if (!absl::IsUnimplemented(model.status())) return model;
      WALSH_LOG(Warning, "the CPU serves a model that the device cannot", {"device", device.name},
                {"reason", model.status()});
    }
    if (options.kv_cache_dtype == KvCacheDtype::kInt8 ||
        options.kv_cache_dtype == KvCacheDtype::kInt4) {
      WALSH_LOG(Warning,
                "the CPU rounds keys and values as --kv-cache-dtype says, and keeps them as 32-bit "
                "floats: no memory is saved",
                {"artifact", directory.substr(directory.rfind('/') + 1)});
    }
    return engine::LoadedModel::LoadArtifact(
        directory, {.n_threads = options.n_threads, .kv_cache_dtype = options.kv_cache_dtype});
  };
}

}  // namespace walsh::service
