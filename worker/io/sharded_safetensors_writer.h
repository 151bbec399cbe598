// Writes tensors into a HF directory's weight files, model-0000N-of-0000M.safetensors, and their
// index.
//
// Tensors come one after the other and are never held in memory. How many shards there are is part
// of their names, so they are named last. Until Finish() the directory is incomplete; it is
// temporary until its owner publishes it (common/publish.h).
//
// Errors:  FAILED_PRECONDITION  a tensor that was written already
//          those of worker/io/safetensors_writer.h; after one of the disk's nothing can follow
// Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/recorded_tensors.h"
#include "worker/io/safetensors_writer.h"

namespace walsh {

// A shard is closed before it would grow beyond this; one larger tensor has a shard of its own.
inline constexpr int64_t kShardBytesMax = 2'000'000'000;

class ShardedSafetensorsWriter {
 public:
  // `header_bytes` is the room for the header of each shard; a shard whose room is used up is
  // closed as one that is full.
  ShardedSafetensorsWriter(std::string directory, int64_t header_bytes,
                           int64_t shard_bytes_max = kShardBytesMax);

  // The tensor's bytes, `n_bytes` in all, follow through Append.
  absl::Status Begin(const std::string& name, const char* dtype, const std::vector<int64_t>& shape,
                     int64_t n_bytes);
  absl::Status Append(std::span<const std::byte> bytes);
  absl::Status Write(const std::string& name, const char* dtype, const std::vector<int64_t>& shape,
                     std::span<const std::byte> bytes);

  // What is written from here on is appended to `recording` as well; null: to none.
  void Record(RecordedTensors* recording) { recording_ = recording; }

  // Names the shards and writes model.safetensors.index.json; the names of all those files.
  absl::StatusOr<std::vector<std::string>> Finish();

  // OK until a write failed.
  const absl::Status& failure() const { return failure_; }
  // Of tensors and of the index.
  int64_t bytes_written() const { return bytes_written_; }

 private:
  absl::Status CloseShard();

  const std::string directory_;
  const int64_t header_bytes_;
  const int64_t shard_bytes_max_;
  std::unique_ptr<SafetensorsWriter> shard_;
  std::vector<std::vector<std::string>> shards_;  // the tensors of each
  std::set<std::string> written_;
  RecordedTensors* recording_ = nullptr;
  absl::Status failure_;  // of the disk: a tensor is then there in part
  int64_t data_bytes_ = 0;
  int64_t bytes_written_ = 0;
};

}  // namespace walsh
