#include "worker/service/rejected_artifacts.h"

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh::service {

namespace fs = std::filesystem;

absl::Status RejectedArtifacts::Keep(const std::string& from, const std::string& job_id) {
  WALSH_RETURN_IF_ERROR(MakeDirectories(root_));
  // Of a run whose outcome the coordinator never had.
  WALSH_RETURN_IF_ERROR(RemoveTree(Directory(job_id)));
  WALSH_RETURN_IF_ERROR(PublishDirectory(from, Directory(job_id)));
  // A rename leaves the directory's own time alone, which tells when its last file was written.
  std::error_code error;
  fs::last_write_time(Directory(job_id), fs::file_time_type::clock::now(), error);
  return RemoveOldest();
}

absl::Status RejectedArtifacts::RemoveOldest() {
  std::vector<std::pair<fs::file_time_type, fs::path>> kept;
  std::error_code error;
  for (fs::directory_iterator it(root_, error), end; !error && it != end; it.increment(error)) {
    std::error_code unknown;
    kept.emplace_back(it->last_write_time(unknown), it->path());
  }
  if (error) return ErrnoStatus(error.value(), "list the rejected artifacts");
  std::sort(kept.begin(), kept.end());
  const auto n_kept = static_cast<int64_t>(kept.size());
  for (int64_t i = 0; i + limits::kRejectedArtifactsMax < n_kept; ++i) {
    WALSH_RETURN_IF_ERROR(RemoveTree(kept[static_cast<size_t>(i)].second));
  }
  return absl::OkStatus();
}

}  // namespace walsh::service
