// Runs the steps of a model on the device.
//
// A step has two passes. Sequences with one row decode together: their pass has one of a few sizes
// and is a CUDA graph, replayed with other lengths and tables (paged_kv.h), since a launch for each
// kernel would cost more than the kernels. Sequences with more rows follow in one pass of whatever
// size. So what else a step holds does not change the bits of a sequence that decodes.
//
// Errors:  as ModelRunner's
// Threads: as ModelRunner's
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "worker/engine/cuda/device_weights.h"
#include "worker/engine/cuda/kv_storage.h"
#include "worker/engine/served_model.h"

namespace walsh::engine::cuda {

struct DeviceRunnerOptions {
  bool use_graphs = true;
  bool batch_invariant = false;  // as in CudaModelOptions
  KvStorage kv;
};
// Device memory of such a runner, but for its KV cache.
int64_t DeviceRunnerStepBytes(const ModelConfig& config, const DeviceWeights& weights,
                              const ServedModel::RunnerLimits& limits,
                              const DeviceRunnerOptions& options);
// All but limits and options outlive the runner.
absl::StatusOr<std::unique_ptr<ModelRunner>> MakeDeviceRunner(
    Context* context, const ModelConfig* config, const DeviceWeights* weights,
    const ServedModel::RunnerLimits& limits, const DeviceRunnerOptions& options);

}  // namespace walsh::engine::cuda
