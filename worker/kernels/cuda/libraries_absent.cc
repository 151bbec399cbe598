// Stands for libraries.cc in builds without CUDA.
#include "worker/kernels/cuda/libraries.h"

namespace walsh::kernels::cuda {

std::vector<std::string> LibraryFolders() { return {}; }

absl::StatusOr<std::vector<LoadedLibrary>> OpenLibraries(std::span<const std::string>) {
  return absl::FailedPreconditionError("this build has no CUDA backend (WALSH_CUDA=OFF)");
}

absl::Status LoadLibraries() { return OpenLibraries({}).status(); }

std::vector<LoadedLibrary> LoadedLibraries() { return {}; }

void* LibraryFunction(const char*) { return nullptr; }

}  // namespace walsh::kernels::cuda
