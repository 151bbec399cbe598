// A directory of its own for what a benchmark writes: two of them may run at once.
//
// Errors:  of the system, see common/publish.h
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace walsh::bench {

// Removed with all that is in it when the object goes.
class WorkDirectory {
 public:
  // Inside `parent`; empty: where the system keeps temporary files.
  static absl::StatusOr<std::unique_ptr<WorkDirectory>> Create(const std::string& parent);
  ~WorkDirectory();
  WorkDirectory(const WorkDirectory&) = delete;
  WorkDirectory& operator=(const WorkDirectory&) = delete;

  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  explicit WorkDirectory(std::string path) : path_(std::move(path)) {}

  const std::string path_;
};

}  // namespace walsh::bench
