#include "worker/kernels/cuda/libraries.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/status_macros.h"

namespace walsh::kernels::cuda {
namespace {

// Each before those that need it: these find it by its name then, wherever it lies.
std::vector<std::string> LibraryNames() {
  return {absl::StrCat("libcublasLt.so.", CUBLAS_VER_MAJOR),
          absl::StrCat("libcublas.so.", CUBLAS_VER_MAJOR)};
}

std::string PathOf(void* handle) {
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return "";
  return map->l_name;
}

absl::StatusOr<LoadedLibrary> Open(const std::string& name, std::span<const std::string> folders) {
  std::vector<std::string> looked_in;
  for (const std::string& folder : folders) {
    const std::string file = folder.empty() ? name : absl::StrCat(folder, "/", name);
    // Global: what is loaded later takes its symbols from here.
    if (void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL); handle != nullptr) {
      return LoadedLibrary{.name = name, .path = PathOf(handle), .handle = handle};
    }
    const char* reason = dlerror();
    std::error_code error;
    if (folder.empty()) {
      looked_in.emplace_back("the loader's search path");
    } else if (std::filesystem::exists(file, error) && reason != nullptr) {
      looked_in.push_back(absl::StrCat(folder, " (", reason, ")"));
    } else {
      looked_in.push_back(folder);
    }
  }
  return absl::FailedPreconditionError(
      absl::StrCat(name, " of CUDA ", CUDART_VERSION / 1000, " cannot be loaded; looked in: ",
                   looked_in.empty() ? "no folder" : absl::StrJoin(looked_in, ", "), "; ",
                   kLibraryPathVariable, " may name the folders that hold CUDA's libraries"));
}

// Not destroyed: threads may still call into the libraries while the process exits.
std::atomic<const std::vector<LoadedLibrary>*> loaded{nullptr};

absl::Status LoadOnce() {
  WALSH_ASSIGN_OR_RETURN(std::vector<LoadedLibrary> libraries, OpenLibraries(LibraryFolders()));
  loaded = new std::vector<LoadedLibrary>(std::move(libraries));
  return absl::OkStatus();
}

}  // namespace

std::vector<std::string> LibraryFolders() {
  std::vector<std::string> folders;
  if (const char* named = std::getenv(kLibraryPathVariable); named != nullptr) {
    folders = absl::StrSplit(named, ':', absl::SkipEmpty());
  }
  folders.emplace_back();
  if (const char* home = std::getenv("CUDA_HOME"); home != nullptr && *home != '\0') {
    folders.push_back(absl::StrCat(home, "/lib64"));
  }
  folders.emplace_back("/usr/local/cuda/lib64");
  std::vector<std::string> toolkits;
  std::error_code error;
  for (std::filesystem::directory_iterator entry("/usr/local", error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string path = entry->path().string();
    if (path.starts_with("/usr/local/cuda-")) toolkits.push_back(absl::StrCat(path, "/lib64"));
  }
  std::sort(toolkits.begin(), toolkits.end(), std::greater<>());  // the newest first
  folders.insert(folders.end(), toolkits.begin(), toolkits.end());
  return folders;
}

absl::StatusOr<std::vector<LoadedLibrary>> OpenLibraries(std::span<const std::string> folders) {
  std::vector<LoadedLibrary> libraries;
  for (const std::string& name : LibraryNames()) {
    WALSH_ASSIGN_OR_RETURN(LoadedLibrary library, Open(name, folders));
    libraries.push_back(std::move(library));
  }
  return libraries;
}

absl::Status LoadLibraries() {
  static const absl::Status status = LoadOnce();
  return status;
}

std::vector<LoadedLibrary> LoadedLibraries() {
  const std::vector<LoadedLibrary>* libraries = loaded;
  return libraries == nullptr ? std::vector<LoadedLibrary>() : *libraries;
}

void* LibraryFunction(const char* name) {
  const std::vector<LoadedLibrary>* libraries = loaded;
  if (libraries == nullptr) return nullptr;
  for (const LoadedLibrary& library : *libraries) {
    if (void* function = dlsym(library.handle, name); function != nullptr) return function;
  }
  return nullptr;
}

}  // namespace walsh::kernels::cuda
