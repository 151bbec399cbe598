// Files that are either absent or whole, also after a power cut.
//
// write to a temporary name in the same directory, fsync, rename, fsync of the directory. A rename
// without the last step can be undone by a crash, one without the first can leave an empty file
// (both seen on ext4).
//
// Errors:  RESOURCE_EXHAUSTED no space (names bytes needed and free), PERMISSION_DENIED, NOT_FOUND,
//          INTERNAL for other failures of the system.
// Threads: safe on distinct paths.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh {

// errno as a status: ENOSPC and EDQUOT RESOURCE_EXHAUSTED, EACCES and EROFS PERMISSION_DENIED,
// ENOENT NOT_FOUND, … `what` names the operation and the thing, without a path of the server.
absl::Status ErrnoStatus(int error, std::string_view what);

// Replaces `path` by `contents`.
absl::Status PublishFile(const std::string& path, std::string_view contents);

// Replaces `to` by the file `from`, which is synced and in the same directory.
absl::Status ReplaceFile(const std::string& from, const std::string& to);

// A name beside `path` for what is to replace it, like that of no other call in any process.
std::string TemporaryName(const std::string& path);

// Renames the finished directory `from` to `to`, which must not exist; both in one file system.
// Syncs every file in `from`, `from` itself and the parent of `to`. ALREADY_EXISTS when `to`
// exists.
absl::Status PublishDirectory(const std::string& from, const std::string& to);
// The same for a directory whose contents need no syncing.
absl::Status MoveDirectory(const std::string& from, const std::string& to);

// Reads a whole file of at most `bytes_max` bytes; INVALID_ARGUMENT names limit and size beyond it.
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t bytes_max);

// Creates `path` and its parents.
absl::Status MakeDirectories(const std::string& path);
absl::Status RemoveTree(const std::string& path);
absl::StatusOr<int64_t> FreeBytes(const std::string& path);
absl::StatusOr<int64_t> TreeBytes(const std::string& path);

}  // namespace walsh
