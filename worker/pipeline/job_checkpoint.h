// What a job keeps of itself after each layer, so that whoever runs it next goes on there.
//
// Of the finished layers it keeps the stored tensors and what the report says of them, as objects
// that are written once; of the activations only those that the next layer begins with (of the
// original model's, too, where the job follows it), for each generation anew; and calibration text
// that the model wrote itself. A job that goes on makes the same bytes as one that was never
// interrupted.
//
// A checkpoint belongs to its identity: the source's digest, the options as they acted, rotation,
// seed, calibration tokens, kernel family and versions. A generation that is damaged is passed over
// for the one before, and in the end for the start. A checkpoint that cannot be kept is given up
// and the job goes on without: both is said in the log and by TakeNotice().
//
// Errors:  FAILED_PRECONDITION  another identity; the message lists the fields that differ
//          ABORTED              the job is another worker's (worker/pipeline/checkpoint_store.h)
//          UNAVAILABLE          the checkpoint was damaged after it was opened, or its store is
//                               locked or away when it is: the job is tried again
// Threads: one.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/io/artifact.h"
#include "worker/io/recorded_tensors.h"
#include "worker/pipeline/checkpoint_store.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/tensor/matrix.h"

namespace walsh::pipeline {

// Of what is stored. Another version has another identity.
inline constexpr int kJobCheckpointVersion = 1;

class JobCheckpoint {
 public:
  // Both outlive the object; the first is what the checkpoint is kept in.
  JobCheckpoint(CheckpointStore& store, std::string job_name);

  // Finds what an earlier run has left.
  absl::Status Open(nlohmann::json identity);

  // Text that the model wrote itself; empty: none is kept.
  absl::StatusOr<std::vector<int32_t>> ReadOwnText() const;
  absl::Status KeepOwnText(std::span<const int32_t> ids);

  // The rest of the identity, once it is known. Before the layers.
  absl::Status SetCalibration(nlohmann::json calibration);
  // Layers that are finished.
  int64_t n_layers() const { return static_cast<int64_t>(layers_.size()); }
  // Writes their tensors, adds them to the report, and fills the activations that the next one
  // begins with, which have their sizes: none where it was the last. Before the first KeepLayer,
  // also without any layer.
  absl::Status Restore(ArtifactWriter& writer, std::span<Matrix* const> activations,
                       JobReport& report);
  // One layer more is finished, and the next begins with these activations: none after the last.
  // At least `bytes_spared` of the disk are left free.
  absl::Status KeepLayer(RecordedTensors tensors, std::span<const Matrix* const> activations,
                         const JobReport& report, int64_t bytes_spared);

  // False once it was given up.
  bool is_kept() const { return is_kept_; }
  // What has happened that watchers of the job should read, once; empty: nothing.
  std::string TakeNotice();

 private:
  using Object = CheckpointStore::Object;
  struct Layer {
    Object object;
    std::vector<RecordedTensors::Entry> tensors;
    std::vector<LinearReport> linears;
    std::vector<std::string> warnings;
  };

  nlohmann::json Manifest() const;
  // DATA_LOSS for what Manifest() did not make.
  absl::Status Parse(const std::string& manifest);
  absl::Status Take(const CheckpointStore::Generation& generation, const nlohmann::json& identity);
  void Clear();
  absl::Status Commit();
  // All that a generation needs.
  std::vector<Object> Objects() const;
  absl::Status TryKeepLayer(RecordedTensors tensors, std::span<const Matrix* const> activations,
                            const JobReport& report, int64_t bytes_spared);
  absl::Status Read(const Object& object, std::span<std::byte> into) const;
  // What the job must end with: OK where it can go on without the checkpoint.
  absl::Status GiveUp(const absl::Status& cause);

  CheckpointStore& store_;
  const std::string job_name_;
  bool is_kept_ = true;
  std::string notice_;
  // What the next generation says.
  nlohmann::json identity_, calibration_;
  std::vector<Object> own_text_;  // one or none
  std::vector<Layer> layers_;
  std::vector<Object> activations_;
  size_t n_warnings_ = 0;  // of the report, up to the last layer
};

}  // namespace walsh::pipeline
