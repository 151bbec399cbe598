#include "tests/bench/work_directory.h"

#include <cerrno>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/publish.h"

namespace walsh::bench {

absl::StatusOr<std::unique_ptr<WorkDirectory>> WorkDirectory::Create(const std::string& parent) {
  std::string path =
      absl::StrCat(parent.empty() ? std::filesystem::temp_directory_path().string() : parent,
                   "/walsh-bench-XXXXXX");
  if (mkdtemp(path.data()) == nullptr) {
    return ErrnoStatus(errno, absl::StrCat("creating a directory like ", path));
  }
  return std::unique_ptr<WorkDirectory>(new WorkDirectory(std::move(path)));
}

WorkDirectory::~WorkDirectory() { (void)RemoveTree(path_); }

}  // namespace walsh::bench
