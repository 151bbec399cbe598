#include "worker/io/sharded_safetensors_writer.h"

#include <cerrno>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/io/hf_directory.h"

namespace walsh {
namespace {

using nlohmann::json;

std::string TemporaryShardName(size_t index) { return absl::StrCat("shard-", index, ".partial"); }

std::string ShardName(size_t index, size_t n_shards) {
  char name[64];
  std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", index + 1, n_shards);
  return name;
}

}  // namespace

ShardedSafetensorsWriter::ShardedSafetensorsWriter(std::string directory, int64_t header_bytes,
                                                   int64_t shard_bytes_max)
    : directory_(std::move(directory)),
      header_bytes_(header_bytes),
      shard_bytes_max_(shard_bytes_max) {}

absl::Status ShardedSafetensorsWriter::Begin(const std::string& name, const char* dtype,
                                             const std::vector<int64_t>& shape, int64_t n_bytes) {
  WALSH_RETURN_IF_ERROR(failure_);
  if (!written_.insert(name).second) {
    return absl::FailedPreconditionError(absl::StrCat("tensor '", name, "' was written already"));
  }
  const bool is_full = shard_ != nullptr && (shard_->data_bytes() + n_bytes > shard_bytes_max_ ||
                                             !shard_->HasRoom(name, shape));
  if (is_full) WALSH_RETURN_IF_ERROR(CloseShard());
  if (shard_ == nullptr) {
    WALSH_ASSIGN_OR_RETURN(
        shard_,
        SafetensorsWriter::Create(absl::StrCat(directory_, "/", TemporaryShardName(shards_.size())),
                                  header_bytes_));
  }
  shard_->Begin(name, dtype, shape);
  if (recording_ != nullptr) recording_->entries.push_back({name, dtype, shape});
  return absl::OkStatus();
}

absl::Status ShardedSafetensorsWriter::Append(std::span<const std::byte> bytes) {
  bytes_written_ += static_cast<int64_t>(bytes.size());
  failure_ = shard_->Append(bytes);
  if (recording_ != nullptr) {
    recording_->bytes.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  return failure_;
}

absl::Status ShardedSafetensorsWriter::Write(const std::string& name, const char* dtype,
                                             const std::vector<int64_t>& shape,
                                             std::span<const std::byte> bytes) {
  WALSH_RETURN_IF_ERROR(Begin(name, dtype, shape, static_cast<int64_t>(bytes.size())));
  return Append(bytes);
}

absl::StatusOr<std::vector<std::string>> ShardedSafetensorsWriter::Finish() {
  WALSH_RETURN_IF_ERROR(failure_);
  WALSH_RETURN_IF_ERROR(CloseShard());
  std::vector<std::string> files;
  json weight_map = json::object();
  for (size_t i = 0; i < shards_.size(); ++i) {
    const std::string name = ShardName(i, shards_.size());
    const std::string from = absl::StrCat(directory_, "/", TemporaryShardName(i));
    if (rename(from.c_str(), absl::StrCat(directory_, "/", name).c_str()) != 0) {
      return ErrnoStatus(errno, absl::StrCat("naming ", name));
    }
    files.push_back(name);
    for (const std::string& tensor : shards_[i]) weight_map[tensor] = name;
  }
  const json index = {{"metadata", {{"total_size", data_bytes_}}}, {"weight_map", weight_map}};
  const std::string text = index.dump(2) + "\n";
  WALSH_RETURN_IF_ERROR(PublishFile(absl::StrCat(directory_, "/", kWeightsIndexFile), text));
  bytes_written_ += static_cast<int64_t>(text.size());
  files.emplace_back(kWeightsIndexFile);
  return files;
}

absl::Status ShardedSafetensorsWriter::CloseShard() {
  if (shard_ == nullptr) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(shard_->Finish());
  shards_.push_back(shard_->tensors());
  data_bytes_ += shard_->data_bytes();
  shard_.reset();
  return absl::OkStatus();
}

}  // namespace walsh
