#include "worker/io/model_root.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

namespace fs = std::filesystem;

// EAGAIN: something on the way was renamed meanwhile.
constexpr int kOpenAttempts = 100;

// "scheme://" and "file:". It would be read as a path all the same; who sends one should be told.
bool IsUrl(std::string_view reference) {
  const std::string_view scheme = reference.substr(0, reference.find(':'));
  if (scheme.size() == reference.size() || scheme.empty()) return false;
  const bool is_scheme = std::all_of(scheme.begin(), scheme.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '+' || c == '-' || c == '.';
  });
  return is_scheme && (reference.substr(scheme.size()).starts_with("://") ||
                       absl::EqualsIgnoreCase(std::string(scheme), "file"));
}

absl::Status CheckSpelling(std::string_view reference) {
  if (reference.empty()) return absl::InvalidArgumentError("the path is empty");
  if (reference.size() > static_cast<size_t>(limits::kPathBytesMax)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the path has ", reference.size(), " bytes, at most ", limits::kPathBytesMax));
  }
  const bool has_control = std::any_of(reference.begin(), reference.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
  if (has_control || !IsValidUtf8(reference)) {
    return absl::InvalidArgumentError("the path has control characters or is not UTF-8");
  }
  if (IsUrl(reference)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", std::string(reference),
                     "' is a URL; a worker reads its own files, and those beneath its URL prefixes "
                     "(s3://, --model-url-prefix)"));
  }
  return absl::OkStatus();
}

// Both canonical.
bool IsIn(const std::string& directory, const std::string& path) {
  if (directory == "/") return true;
  return path.compare(0, directory.size(), directory) == 0 &&
         (path.size() == directory.size() || path[directory.size()] == '/');
}

absl::Status Outside(std::string_view reference) {
  return absl::InvalidArgumentError(absl::StrCat("'", std::string(reference),
                                                 "' lies outside the folders that this worker may "
                                                 "read (--model-root)"));
}

}  // namespace

absl::StatusOr<ModelRoots> ModelRoots::Create(const std::vector<std::string>& roots,
                                              const std::vector<std::string>& excluded) {
  std::vector<std::string> canonical;
  for (const std::string& root : roots) {
    const Found found = Canonical(root);
    std::error_code error;
    if (found.error != 0 || !fs::is_directory(found.path, error)) {
      return absl::NotFoundError(absl::StrCat("model root '", root, "' is no directory"));
    }
    canonical.push_back(found.path);
  }
  std::vector<std::string> canonical_excluded;
  for (const std::string& folder : excluded) {
    std::error_code error;
    const fs::path path = fs::weakly_canonical(folder, error);
    if (error) {
      return absl::InvalidArgumentError(absl::StrCat("folder '", folder, "': ", error.message()));
    }
    canonical_excluded.push_back(path.string());
  }
  return ModelRoots(std::move(canonical), std::move(canonical_excluded));
}

bool ModelRoots::IsBeneathRoot(const std::string& canonical) const {
  return std::any_of(roots_.begin(), roots_.end(), [&](const std::string& root) {
    const bool is_excluded =
        std::any_of(excluded_.begin(), excluded_.end(), [&](const std::string& folder) {
          return folder != root && IsIn(root, folder) && IsIn(folder, canonical);
        });
    return IsIn(root, canonical) && !is_excluded;
  });
}

ModelRoots::Found ModelRoots::Open(int directory, const std::string& path, uint64_t resolve) {
  // O_PATH opens no device and waits for no FIFO.
  open_how how = {.flags = O_PATH | O_CLOEXEC, .mode = 0, .resolve = resolve};
  int fd = -1;
  for (int i = 0; i < kOpenAttempts && fd < 0; ++i) {
    fd = static_cast<int>(syscall(SYS_openat2, directory, path.c_str(), &how, sizeof how));
    if (fd < 0 && errno != EAGAIN && errno != EINTR) break;
  }
  // EPERM is what sandboxes that do not know the call say of it.
  if (fd < 0) return {.error = errno == EPERM ? ENOSYS : errno};
  std::error_code error;
  const fs::path name = fs::read_symlink(absl::StrCat("/proc/self/fd/", fd), error);
  close(fd);
  if (error) return {.error = ENOSYS};
  return {.path = name.string()};
}

ModelRoots::Found ModelRoots::Canonical(const std::string& path) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  const std::unique_ptr<char, Free> resolved(realpath(path.c_str(), nullptr));
  if (resolved == nullptr) return {.error = errno};
  return {.path = resolved.get()};
}

ModelRoots::Found ModelRoots::OpenBeneathRoot(const std::string& path, uint64_t resolve) const {
  const auto root = std::find_if(roots_.begin(), roots_.end(),
                                 [&](const std::string& known) { return IsIn(known, path); });
  if (root == roots_.end()) return {.error = EXDEV};
  const int directory = open(root->c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return {.error = errno};
  const size_t first = path.find_first_not_of('/', *root == "/" ? 0 : root->size());
  Found found = Open(directory, first == std::string::npos ? "." : path.substr(first),
                     resolve | RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS);
  close(directory);
  return found;
}

absl::StatusOr<std::string> ModelRoots::Find(const std::string& path) const {
  Found found = OpenBeneathRoot(path, /*resolve=*/0);
  if (found.error == EXDEV) {
    // Perhaps into a root by another name, or from one root to another.
    found = Open(AT_FDCWD, path, RESOLVE_NO_MAGICLINKS);
    if (found.error == 0) found = OpenBeneathRoot(found.path, RESOLVE_NO_SYMLINKS);
  }
  if (found.error == ENOSYS) found = Canonical(path);
  if (found.error == 0 && IsBeneathRoot(found.path)) return std::move(found.path);
  const bool leads_out = found.error == 0 || found.error == EXDEV || found.error == ELOOP;
  // Outside, "missing" would tell what exists there and what does not.
  if (leads_out || !IsBeneathRoot(fs::path(path).lexically_normal().string())) {
    return absl::InvalidArgumentError("");
  }
  return absl::NotFoundError("");
}

absl::Status ModelRoots::CheckEntries(std::string_view reference,
                                      const std::string& directory) const {
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    std::error_code ignored;
    if (!fs::is_symlink(it->symlink_status(ignored))) continue;
    // A dangling link can be opened by nobody; whoever needs the file reports it missing.
    if (absl::IsInvalidArgument(Find(it->path().string()).status())) {
      return Outside(absl::StrCat(std::string(reference), "/", it->path().filename().string()));
    }
  }
  if (!error) return absl::OkStatus();
  return absl::PermissionDeniedError(
      absl::StrCat("'", std::string(reference), "' cannot be listed"));
}

absl::StatusOr<std::string> ModelRoots::Resolve(std::string_view reference) const {
  WALSH_RETURN_IF_ERROR(CheckSpelling(reference));
  std::vector<std::string> candidates;
  if (reference.front() == '/') {
    candidates.emplace_back(reference);
  } else {
    for (const std::string& root : roots_) {
      candidates.push_back(absl::StrCat(root, "/", std::string(reference)));
    }
  }
  bool is_outside = false;
  for (const std::string& candidate : candidates) {
    const absl::StatusOr<std::string> path = Find(candidate);
    if (!path.ok()) {
      is_outside |= absl::IsInvalidArgument(path.status());
      continue;
    }
    std::error_code error;
    if (fs::is_directory(*path, error)) WALSH_RETURN_IF_ERROR(CheckEntries(reference, *path));
    return *path;
  }
  if (is_outside) return Outside(reference);
  return absl::NotFoundError(absl::StrCat("'", std::string(reference), "' does not exist"));
}

}  // namespace walsh
