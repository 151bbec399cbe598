// Artifacts that a quality gate kept from being published, for a look at what went wrong.
//
// Each is a directory <root>/<job id>, outside the model store and the model roots: it is not
// listed, and can neither be loaded by its model's name nor named by its path. The last
// limits::kRejectedArtifactsMax are kept; an older one is removed when a newer one comes.
//
// Errors:  those of the file system
// Threads: used by the job runner's thread.
#pragma once

#include <string>
#include <utility>

#include "absl/status/status.h"

namespace walsh::service {

class RejectedArtifacts {
 public:
  explicit RejectedArtifacts(std::string root) : root_(std::move(root)) {}

  // Moves a finished artifact here; `from` is in the same file system.
  absl::Status Keep(const std::string& from, const std::string& job_id);
  std::string Directory(const std::string& job_id) const { return root_ + "/" + job_id; }

 private:
  absl::Status RemoveOldest();

  const std::string root_;
};

}  // namespace walsh::service
