#include "worker/io/model_root.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

namespace fs = std::filesystem;

// realpath(3): every link followed, no "." or "..". nullopt when a component is missing.
std::optional<std::string> Canonical(const std::string& path) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  const std::unique_ptr<char, Free> resolved(realpath(path.c_str(), nullptr));
  if (resolved == nullptr) return std::nullopt;
  return std::string(resolved.get());
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
    const std::optional<std::string> path = Canonical(root);
    std::error_code error;
    if (!path.has_value() || !fs::is_directory(*path, error)) {
      return absl::NotFoundError(absl::StrCat("model root '", root, "' is no directory"));
    }
    canonical.push_back(*path);
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

absl::Status ModelRoots::CheckEntries(std::string_view reference,
                                      const std::string& directory) const {
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    std::error_code ignored;
    if (!fs::is_symlink(it->symlink_status(ignored))) continue;
    const std::optional<std::string> target = Canonical(it->path().string());
    // A dangling link can be opened by nobody; whoever needs the file reports it missing.
    if (target.has_value() && !IsBeneathRoot(*target)) {
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
    const std::optional<std::string> path = Canonical(candidate);
    if (!path.has_value()) {
      // Outside, "missing" would tell what exists there and what does not.
      is_outside |= !IsBeneathRoot(fs::path(candidate).lexically_normal().string());
      continue;
    }
    if (!IsBeneathRoot(*path)) {
      is_outside = true;
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
