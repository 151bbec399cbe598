// cuBLAS, loaded at run time, so that a machine without it still runs the CPU worker.
//
// Nothing links to it: library_calls.cc defines those of its functions that we call and forwards
// each to what is loaded here. See docs/adr/0011-cuda-libraries-by-dlopen.md.
//
// No CUDA header here, and a build without CUDA has the same functions.
//
// Errors:  FAILED_PRECONDITION  built without CUDA; a library that is in none of the places or does
//                               not load: the message names it and the places
// Threads: safe
#pragma once

#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh::kernels::cuda {

// Folders that hold the libraries, separated by colons: searched before all others.
inline constexpr char kLibraryPathVariable[] = "WALSH_CUDA_LIBRARY_PATH";

struct LoadedLibrary {
  std::string name;  // "libcublas.so.13"
  std::string path;  // where it was found
  void* handle = nullptr;
};

// Where LoadLibraries looks, in this order: the folders of WALSH_CUDA_LIBRARY_PATH, the loader's
// own search path (an empty name), $CUDA_HOME/lib64, /usr/local/cuda/lib64,
// /usr/local/cuda-*/lib64.
std::vector<std::string> LibraryFolders();

// Loads each library of the CUDA version that this was compiled with from the first of `folders`
// that has it. What is loaded stays loaded, after an error too.
absl::StatusOr<std::vector<LoadedLibrary>> OpenLibraries(std::span<const std::string> folders);

// From LibraryFolders(); the first call decides, later ones give the same answer.
absl::Status LoadLibraries();

// What LoadLibraries has loaded; empty before its first call and after an error.
std::vector<LoadedLibrary> LoadedLibraries();

// Null before LoadLibraries, after its error, and where no library has the function.
void* LibraryFunction(const char* name);

}  // namespace walsh::kernels::cuda
