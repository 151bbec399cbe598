// A new file that is written front to back, and its header where that is known last.
//
// Errors:  RESOURCE_EXHAUSTED no space; PERMISSION_DENIED; INTERNAL other failures of the system.
//          Messages carry the last component of the path only.
// Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh {

class OutputFile {
 public:
  // Creates `path`, which must not exist. Without Finish the file is left incomplete; its folder is
  // temporary.
  static absl::StatusOr<std::unique_ptr<OutputFile>> Create(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // After the last byte, or after Skip.
  absl::Status Append(std::span<const std::byte> bytes);
  // Leaves room, for WriteAt to fill.
  void Skip(int64_t n_bytes) { end_ += n_bytes; }
  absl::Status WriteAt(int64_t offset, std::span<const std::byte> bytes);
  // Syncs and closes.
  absl::Status Finish();

  int64_t size() const { return end_; }

 private:
  OutputFile(int fd, std::string name);
  void StartWriteback();

  int fd_;
  const std::string name_;
  int64_t end_ = 0;
  int64_t handed_over_ = 0;  // bytes, to the system for writing
};

}  // namespace walsh
