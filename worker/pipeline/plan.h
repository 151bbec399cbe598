// A job's options against its checkpoint: everything that can be told or refused before any work.
//
// Errors:  INVALID_ARGUMENT  an option that is out of range or does not fit the model's shape; the
//                            message names the option, the limit and the value
//          and those of the tasks' files (worker/evaluate/tasks/task_file.h)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/evaluate/tasks/task_file.h"
#include "worker/gptq/options.h"
#include "worker/io/checkpoint.h"
#include "worker/io/online_transforms.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/rotate/rotation.h"

namespace walsh::pipeline {

// At most this much memory.
struct MemoryNeeds {
  int64_t host_bytes = 0;
  int64_t device_bytes = 0;  // of a backend with memory of its own
};

struct ResolvedJob {
  gptq::Options quantizer;  // but for the group and the overrides: OptionsFor() has them
  // [layers][linears of LinearShapes()]; empty: quantizer.bits for all.
  std::vector<std::vector<int>> bits;
  int64_t group_size = 0;      // 32, 64 or 128; −1 per channel
  int64_t rotation_block = 0;  // 0 for none and global rotations
  rotate::Rotation r1, r2;     // of the residual stream and of a head
  OnlineTransforms online;
  int64_t online_block = 0;     // of R4; 0 for none and global
  int64_t sequence_length = 0;  // reduced to the model's context
  int64_t evaluation_length = 0;
  int64_t evaluation_stride = 0;
  // At most: JobSpec's, or as many as the evaluation's file can have; 0: not evaluated.
  int64_t n_evaluation_windows = 0;
  std::vector<evaluate::Task> tasks;  // of the evaluation, read
  int64_t disk_bytes = 0;
  std::vector<std::string> warnings;

  // Whether anything is rotated, in the weights or at run time.
  bool rotates() const {
    return !r1.is_identity() || !r2.is_identity() || !online.rotations().empty();
  }
  // What linears with `in` inputs share.
  gptq::Options OptionsFor(int64_t in) const;
  // Of one of them: the linear at `index` of LinearShapes(). A codebook is of linears of 2 bits.
  gptq::Options OptionsFor(int64_t layer, size_t index, int64_t in) const;
};

// Asks `keep_going` between the items of tasks, the only files that are read.
absl::StatusOr<ResolvedJob> Resolve(const JobSpec& spec, const Checkpoint& checkpoint,
                                    const KeepGoing& keep_going = {});

// Bits that all linears take on disk.
int64_t StoredBits(const ModelConfig& config, const ResolvedJob& job);

// Of the CPU backend.
int64_t HostMemoryNeeded(const JobSpec& spec, const ModelConfig& config, const ResolvedJob& job);
// The part of it that is there before the layers and is no backend's: texts, token ids, and the
// model that writes its own calibration text.
int64_t PreparationMemoryNeeded(const JobSpec& spec, const ModelConfig& config,
                                const ResolvedJob& job);

// Of the zero-shot tasks, after everything else and on the CPU whatever the backend; 0 without any.
int64_t TaskMemoryNeeded(const ModelConfig& config, const ResolvedJob& job);

// Code, libraries, token ids and tasks, which are there all the time.
int64_t ProcessMemory(const JobSpec& spec, const ResolvedJob& job);

// Tokens of a text that the evaluation's windows take.
int64_t EvaluationTextTokens(const ResolvedJob& job);

// Sublayer outputs that wait for their linear's quantization: those of all calibration tokens, as
// far as there is room.
inline constexpr int64_t kKeptBytesMax = int64_t{2} << 30;
int64_t KeptBytes(const ModelConfig& config, int64_t n_tokens);

// Floating-point operations of one token's way through the layers.
double LayerFlopsPerToken(const ModelConfig& config);
// Of one token's way through the whole model, head included.
double ModelFlopsPerToken(const ModelConfig& config);
// Reading all weights once, in the units of Progress.
double ReadWork(const ModelConfig& config);

}  // namespace walsh::pipeline
