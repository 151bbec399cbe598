// Calibrates and quantizes a model layer by layer, in one forward pass.
//
// Within a layer the sublayers follow one another: all calibration windows run up to the inputs of
// some linears, whose Hessian is summed on the way; those linears are quantized; and it is their
// quantized weights that compute what follows. So every linear is fitted to the inputs that it will
// really get, each part of the layer runs once, and only one layer's floats and one Hessian are in
// memory. Linears with one input (q, k, v and gate, up) share the Hessian and its factor.
//
// Outputs of a sublayer wait for their linear's quantization in a buffer of bounded size; windows
// that do not fit are computed a second time.
//
// Source:  worker/gptq/quantize_linear.h, worker/model/decoder_layer.h
// Errors:  DATA_LOSS  a non-finite weight, activation or result; the message names layer and linear
//          and those of the source, the writer and the observer
// Memory:  hidden states of all calibration tokens, one layer, one Hessian with its factor
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "worker/calibrate/token_windows.h"
#include "worker/evaluate/layer_source.h"
#include "worker/gptq/hessian.h"
#include "worker/io/artifact.h"
#include "worker/kernels/thread_pool.h"
#include "worker/model/decoder_layer.h"
#include "worker/pipeline/plan.h"
#include "worker/pipeline/progress.h"

namespace walsh::pipeline {

class LayerQuantizer {
 public:
  // All outlive the object.
  LayerQuantizer(const ResolvedJob& job, evaluate::LayerSource& source,
                 const calibrate::TokenWindows& windows, ArtifactWriter& writer, ThreadPool& pool,
                 Progress& progress);

  // Every tensor of the model to the writer; linears, warnings, sizes and forward_seconds to the
  // report.
  absl::Status Run(JobReport& report);

 private:
  // One linear's place in a layer.
  struct Part {
    std::string_view suffix;
    std::unique_ptr<Linear>* linear;
  };
  // Rows of some whole windows, and where their sublayer output is kept or null.
  struct Batch {
    int64_t first_row = 0;
    int64_t n_rows = 0;
    float* kept = nullptr;
  };
  using Step = std::function<absl::Status(const Batch&)>;

  // Also makes the hidden states before the first layer.
  absl::Status WriteEmbedding();
  absl::Status QuantizeAttention(int64_t index, DecoderLayer& layer, JobReport& report);
  absl::Status QuantizeMlp(int64_t index, DecoderLayer& layer, JobReport& report);
  absl::Status WriteLayer(int64_t index, const DecoderLayer& layer);
  absl::Status WriteHead();

  // Runs `step` over all windows, a batch at a time. Batches keep `kept_width` floats a row from
  // one pass to the next while there is room. `work_share` is the step's share of the layer's
  // forward.
  absl::Status ForEachBatch(int64_t kept_width, double work_share, const Step& step);
  absl::Status AddToHessian(const float* x, int64_t n_rows, Matrix& hessian);
  absl::Status Quantize(int64_t layer_index, const std::vector<Part>& parts, Matrix hessian,
                        JobReport& report);

  // The norm, q, k, v and attention of one batch; the norm, gate and up of one.
  absl::Status Attended(const DecoderLayer& layer, const Batch& batch, float* attended);
  absl::Status Activation(const DecoderLayer& layer, const Batch& batch, float* activation);
  // Adds the time of `forward` to that of the passes that calibration cannot avoid.
  absl::Status Timed(const std::function<absl::Status()>& forward);

  const ResolvedJob& job_;
  evaluate::LayerSource& source_;
  const calibrate::TokenWindows& windows_;
  ArtifactWriter& writer_;
  ThreadPool& pool_;
  Progress& progress_;
  const ForwardContext context_;

  Matrix hidden_;            // [tokens, hidden]
  std::vector<float> kept_;  // sublayer outputs of the first batches
  ForwardScratch scratch_;
  std::vector<int32_t> positions_;
  std::vector<QuantizedMatrix> quantized_;  // of the running layer, in LinearShapes' order
  double forward_seconds_ = 0;
};

// Work of Run() in the units of Progress.
double QuantizationWork(const ModelConfig& config, int64_t n_tokens);

}  // namespace walsh::pipeline
