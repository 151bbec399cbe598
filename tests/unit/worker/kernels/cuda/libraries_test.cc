#include "worker/kernels/cuda/libraries.h"

#include <cublas_v2.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/testing/scoped_environment.h"
#include "tests/testing/status_matchers.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;
using ::walsh::testing::ScopedEnvironment;
using ::walsh::testing::StatusIs;

// Before main, and so before any test has loaded the libraries.
const std::string text_before_loading = cublasGetStatusString(CUBLAS_STATUS_SUCCESS);
const cublasStatus_t status_before_loading = cublasDestroy(nullptr);

std::string CublasName() { return absl::StrCat("libcublas.so.", CUBLAS_VER_MAJOR); }

bool HasToolkit() {
  const std::vector<std::string> folders = LibraryFolders();
  return std::any_of(folders.begin(), folders.end(), [](const std::string& folder) {
    return !folder.empty() && std::filesystem::exists(absl::StrCat(folder, "/", CublasName()));
  });
}

std::string EmptyFolder() {
  const std::string folder = absl::StrCat(::testing::TempDir(), "walsh_no_cuda_libraries");
  std::filesystem::create_directories(folder);
  return folder;
}

TEST(LibrariesTest, ErrorNamesTheLibraryAndThePlaces) {
  const std::vector<std::string> folders = {EmptyFolder()};
  EXPECT_THAT(OpenLibraries(folders).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr(absl::StrCat("libcublasLt.so.", CUBLAS_VER_MAJOR)),
                             HasSubstr(folders[0]), HasSubstr(kLibraryPathVariable))));
  EXPECT_THAT(OpenLibraries({}).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no folder")));
}

TEST(LibrariesTest, ErrorSaysWhyAFileDoesNotLoad) {
  const std::string folder = absl::StrCat(::testing::TempDir(), "walsh_broken_cuda_libraries");
  std::filesystem::create_directories(absl::StrCat(folder, "/libcublasLt.so.", CUBLAS_VER_MAJOR));
  const std::vector<std::string> folders = {folder};
  EXPECT_THAT(OpenLibraries(folders).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("cannot read file data")));
}

TEST(LibrariesTest, TheVariableComesFirst) {
  const ScopedEnvironment path(kLibraryPathVariable, "/first:/second:");
  const ScopedEnvironment home("CUDA_HOME", "/third");
  std::vector<std::string> folders = LibraryFolders();
  ASSERT_GE(folders.size(), 5u);
  folders.resize(5);
  EXPECT_THAT(folders,
              ElementsAre("/first", "/second", "", "/third/lib64", "/usr/local/cuda/lib64"));
}

TEST(LibrariesTest, LoadsWhatTheToolkitHas) {
  const absl::Status status = LoadLibraries();
  if (!status.ok() && !HasToolkit()) {
    EXPECT_THAT(LoadedLibraries(), IsEmpty());
    GTEST_SKIP() << "no CUDA toolkit: " << status.message();
  }
  ASSERT_OK(status);
  std::vector<std::string> names;
  for (const LoadedLibrary& library : LoadedLibraries()) {
    names.push_back(library.name);
    EXPECT_THAT(library.path, AllOf(StartsWith("/"), HasSubstr(library.name)));
  }
  EXPECT_THAT(names, ElementsAre(absl::StrCat("libcublasLt.so.", CUBLAS_VER_MAJOR), CublasName()));
  EXPECT_NE(LibraryFunction("cublasCreate_v2"), nullptr);
  EXPECT_EQ(LibraryFunction("cublasNoSuchFunction"), nullptr);
}

TEST(LibraryCallsTest, AreForwardedOnceLoaded) {
  EXPECT_EQ(text_before_loading, "cuBLAS is not loaded");
  EXPECT_EQ(status_before_loading, CUBLAS_STATUS_NOT_INITIALIZED);
  const absl::Status status = LoadLibraries();
  if (!status.ok()) GTEST_SKIP() << status.message();
  EXPECT_NE(cublasGetStatusString(CUBLAS_STATUS_SUCCESS), text_before_loading);
  // Without a handle every function has a definite answer, with and without a GPU.
  EXPECT_EQ(cublasSetStream(nullptr, nullptr), CUBLAS_STATUS_NOT_INITIALIZED);
}

}  // namespace
}  // namespace walsh::kernels::cuda
