// Bytes at an offset: the only way in which the parsers of this folder see a file.
//
// Files of tenants are read with pread into owned memory, never mapped: a map of a file that
// shrinks ends the process with SIGBUS. Size, modification time and inode are taken at opening and
// compared again by CheckUnchanged. The in-memory form serves tests and fuzzers.
//
// Errors:  NOT_FOUND no such file; INVALID_ARGUMENT not a regular file, or a read past its end;
//          DATA_LOSS the file shrank or changed; messages carry the last component of the path only
// Threads: safe from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh {

class RandomAccessFile {
 public:
  virtual ~RandomAccessFile() = default;
  // For messages.
  virtual const std::string& name() const = 0;
  virtual int64_t size() const = 0;
  // Fills all of `out` or fails.
  virtual absl::Status ReadAt(int64_t offset, std::span<std::byte> out) const = 0;
  // DATA_LOSS when the file is no longer the one that was opened.
  virtual absl::Status CheckUnchanged() const = 0;
};

absl::StatusOr<std::unique_ptr<RandomAccessFile>> OpenRandomAccessFile(const std::string& path);

// Views `bytes`, which must outlive the object.
std::unique_ptr<RandomAccessFile> MemoryFile(std::string name, std::span<const std::byte> bytes);

// All of a small file. INVALID_ARGUMENT names limit and size beyond `bytes_max`.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t bytes_max);

// The last component of a path.
std::string BaseName(const std::string& path);

}  // namespace walsh
