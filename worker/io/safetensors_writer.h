// Writes one safetensors file, tensor after tensor, without holding it in memory.
//
// The header stands before the data and is known last, so its room is reserved at the start and
// filled with spaces, which the format allows. The same calls give the same bytes, all of them
// written by this class.
//
// Errors:  RESOURCE_EXHAUSTED no space; PERMISSION_DENIED; INTERNAL other failures of the system
// Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/output_file.h"

namespace walsh {

class SafetensorsWriter {
 public:
  // Creates `path`, which must not exist, with room for a header of `header_bytes`. Without Finish
  // the file is left incomplete; its folder is temporary.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(const std::string& path,
                                                                   int64_t header_bytes);
  // False when the header has no room left for this tensor: the caller begins another file.
  bool HasRoom(const std::string& name, const std::vector<int64_t>& shape) const;

  // The tensor's bytes follow through Append, all of them before the next Begin or Finish.
  void Begin(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape);
  absl::Status Append(std::span<const std::byte> bytes);

  // Writes the header and syncs.
  absl::Status Finish();

  int64_t data_bytes() const { return data_bytes_; }
  const std::vector<std::string>& tensors() const { return tensors_; }

 private:
  SafetensorsWriter(std::unique_ptr<OutputFile> file, int64_t header_bytes)
      : file_(std::move(file)), header_bytes_(header_bytes) {}

  const std::unique_ptr<OutputFile> file_;
  int64_t header_bytes_;
  nlohmann::json header_ = nlohmann::json::object();
  int64_t header_bytes_used_ = 2;  // "{}"
  int64_t data_bytes_ = 0;
  int64_t expected_end_ = 0;  // of the tensor that is being written
  std::vector<std::string> tensors_;
};

}  // namespace walsh
