// Calibrates and quantizes a model layer by layer, in one forward pass.
//
// Within a layer the sublayers follow one another: all calibration windows run up to the inputs of
// some linears, whose Hessian is summed on the way; those linears are quantized; and it is their
// quantized weights that compute what follows. So every linear is fitted to the inputs that it will
// really get, each part of the layer runs once, and only one layer's floats and one Hessian are in
// memory. Linears with one input (q, k, v and gate, up) share the Hessian and its factor.
//
// With error propagation and with GPTAQ the windows run through the original layer as well, one
// step beside the other, and each linear's target, or the updates of its columns, make up for the
// difference of the two inputs. Online rotations are done in both, rounding of activations and of
// keys and values in the quantized model only, so that this is made up for, too.
//
// Outputs of a sublayer wait for their linear's quantization in a buffer of bounded size; windows
// that do not fit are computed a second time.
//
// Source:  worker/gptq/quantize_linear.h, worker/gptq/error_propagation.h,
//          worker/gptq/asymmetric_calibration.h, worker/model/decoder_layer.h
// Errors:  DATA_LOSS  a non-finite weight, activation or result; the message names layer and linear
//          and those of the source, the writer and the observer
// Memory:  hidden states of all calibration tokens, one layer, one Hessian with its factor; with
//          the original's inputs the first two twice and the sums of the input differences
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
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
#include "worker/pipeline/backend.h"
#include "worker/pipeline/plan.h"
#include "worker/pipeline/progress.h"

namespace walsh::pipeline {

class LayerQuantizer {
 public:
  // All outlive the object.
  LayerQuantizer(const JobInputs& inputs, evaluate::LayerSource& source,
                 const calibrate::TokenWindows& windows, ArtifactWriter& writer,
                 Progress& progress);

  // Every tensor of the model to the writer; linears, warnings and the seconds of forward passes to
  // the report.
  absl::Status Run(JobReport& report);

 private:
  // One linear's place in a layer.
  struct Part {
    std::string_view name;
    std::unique_ptr<Linear>* linear;
  };
  // Rows of some whole windows.
  struct Batch {
    int64_t first_row = 0;
    int64_t n_rows = 0;
  };
  // All calibration tokens on their way through one form of the model.
  struct Flow {
    const DecoderLayer* layer = nullptr;
    Matrix hidden;            // [tokens, hidden]
    std::vector<float> kept;  // outputs of a sublayer for the first batches
    double seconds = 0;       // of the passes that it cannot do without
  };
  // Sums over the calibration tokens; x in the rounded model.
  struct InputStatistics {
    Matrix hessian;  // Σ x xᵀ
    Matrix cross;    // Σ x (x_original − x)ᵀ; empty where only x is needed
  };
  using Step = std::function<absl::Status(const Batch&)>;
  // Rows that are inputs of some linears, in a buffer that the next call may overwrite.
  using Inputs = absl::StatusOr<const float*> (LayerQuantizer::*)(Flow& flow, const Batch& batch);

  // Also makes the hidden states before the first layer.
  absl::Status WriteEmbedding();
  // Takes the layers that an earlier run has kept; the number of the next.
  absl::StatusOr<int64_t> Resume(JobReport& report);
  absl::Status QuantizeAttention(int64_t index, DecoderLayer& layer, JobReport& report);
  absl::Status QuantizeMlp(int64_t index, DecoderLayer& layer, JobReport& report);
  absl::Status WriteLayer(int64_t index, const DecoderLayer& layer);
  // The same, for a run that goes on where this one may end.
  absl::Status WriteAndKeepLayer(int64_t index, const DecoderLayer& layer, const JobReport& report);
  absl::Status WriteHead();

  // Runs `step` over all windows, a batch at a time. `work_share` is the step's share of the
  // layer's forward.
  absl::Status ForEachBatch(double work_share, const Step& step);
  absl::StatusOr<InputStatistics> Collect(Inputs inputs, int64_t dim, double work_share);
  absl::Status Quantize(int64_t layer_index, const std::vector<Part>& parts, InputStatistics inputs,
                        JobReport& report);

  // Of q, k, v; of o; of gate, up; of down. Those of o and down are kept while there is room.
  absl::StatusOr<const float*> AttentionInputs(Flow& flow, const Batch& batch);
  absl::StatusOr<const float*> Attended(Flow& flow, const Batch& batch);
  absl::StatusOr<const float*> MlpInputs(Flow& flow, const Batch& batch);
  absl::StatusOr<const float*> Activations(Flow& flow, const Batch& batch);
  // Where the batch's rows of a sublayer's output are kept, or null.
  float* Kept(Flow& flow, const Batch& batch, int64_t width) const;
  std::span<Flow* const> Flows() const;
  // Adds the time of `forward` to the flow's.
  static absl::Status Timed(Flow& flow, const std::function<absl::Status()>& forward);
  // Calls piece(first, end) for ranges that make up 0 … n − 1, in parallel.
  void ForEachPiece(int64_t n, const std::function<void(int64_t, int64_t)>& piece);

  const ResolvedJob& job_;
  evaluate::LayerSource& source_;
  const calibrate::TokenWindows& windows_;
  ArtifactWriter& writer_;
  ThreadPool& pool_;
  Progress& progress_;
  JobCheckpoint* const saved_;
  const bool follows_original_;
  const ForwardContext context_;
  std::shared_ptr<const OnlineForward> online_;  // of the quantized model

  Flow rounded_;   // every linear that has had its turn is quantized
  Flow original_;  // empty unless its inputs are needed
  const std::array<Flow*, 2> flows_ = {&rounded_, &original_};
  ForwardScratch scratch_;
  std::vector<float> difference_;  // [batch rows, widest]: the original's inputs, then less x
  int64_t batch_rows_ = 0;         // whole windows
  std::vector<int32_t> positions_;
  std::vector<QuantizedMatrix> quantized_;  // of the running layer, in LinearShapes' order
};

// Work of Run() in the units of Progress.
double QuantizationWork(const ModelConfig& config, const gptq::Options& options, int64_t n_tokens);

}  // namespace walsh::pipeline
