#include "worker/service/model_conversions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "common/grpc_status.h"
#include "common/publish.h"
#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "tests/unit/worker/service/store_fixture.h"
#include "worker/interop/export.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::UnorderedElementsAre;
using v1::ExportModelRequest;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TinyModel;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

absl::Status GoOn(int64_t, int64_t) { return absl::OkStatus(); }

std::vector<std::string> Names(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

class ModelConversionsTest : public StoreFixture {
 protected:
  void SetUp() override {
    TinyModel({}).WriteHf(dir_ / "source");
    ASSERT_OK_AND_ASSIGN(const auto source, Checkpoint::Open(dir_ / "source"));
    ASSERT_OK(MakeDirectories(root_));
    ASSERT_OK(testing::WriteTinyArtifact(*source, root_ + "/m", {.bits = 4, .group_size = 32}));
    OpenStore();
    ASSERT_OK(MakeDirectories(exports()));
    exports_ = fs::canonical(exports()).string();
    OpenConversions();
  }

  void OpenConversions() {
    auto conversions = ModelConversions::Open(
        {.export_root = dir_ / "exports",
         .worker_id = "w-1",
         .resolve = [this](std::string_view path) -> absl::StatusOr<std::string> {
           if (path == "known") return known_;
           return absl::NotFoundError("no such model");
         },
         .sources = sources_.get()},
        store_.get());
    ASSERT_OK(conversions);
    conversions_ = *std::move(conversions);
  }

  absl::StatusOr<v1::ModelExport> Export(
      const std::string& output = "",
      ExportModelRequest::Format format = ExportModelRequest::GPTQ_V2,
      const ConversionProgress& progress = GoOn) {
    ExportModelRequest request;
    request.set_name("models/m");
    request.set_format(format);
    request.set_output(output);
    return conversions_->Export(request, progress);
  }

  absl::StatusOr<v1::Model> Import(const std::string& source, const std::string& name,
                                   const ConversionProgress& progress = GoOn) {
    v1::ImportModelRequest request;
    request.set_source_model(source);
    request.set_model_name(name);
    return conversions_->Import(request, progress);
  }

  std::string exports() const { return exports_.empty() ? dir_ / "exports" : exports_; }

  std::string exports_;  // canonical
  std::string known_;    // what "known" resolves to
  std::unique_ptr<ModelSources> sources_;
  std::unique_ptr<ModelConversions> conversions_;
};

TEST_F(ModelConversionsTest, ExportsBeneathTheRootByTheNameOfModelAndFormat) {
  int64_t last = 0;
  ASSERT_OK_AND_ASSIGN(const v1::ModelExport done,
                       Export("", ExportModelRequest::GPTQ_V2, [&](int64_t n, int64_t total) {
                         EXPECT_LE(n, total);
                         last = n;
                         return absl::OkStatus();
                       }));
  EXPECT_EQ(last, 21);
  EXPECT_EQ(done.directory(), exports() + "/m-gptq_v2");
  EXPECT_EQ(done.worker(), "workers/w-1");
  EXPECT_THAT(done.files(), Contains("model-00001-of-00001.safetensors"));
  EXPECT_THAT(Names(done.directory()),
              ::testing::UnorderedElementsAreArray(done.files().begin(), done.files().end()));
  ASSERT_OK_AND_ASSIGN(const int64_t bytes, TreeBytes(done.directory()));
  EXPECT_EQ(done.size_bytes(), bytes);
  EXPECT_THAT(Names(exports()), UnorderedElementsAre("m-gptq_v2"));
}

TEST_F(ModelConversionsTest, ExportsToTheFolderThatIsNamed) {
  ASSERT_OK_AND_ASSIGN(const v1::ModelExport relative, Export("team/for-vllm/"));
  EXPECT_EQ(relative.directory(), exports() + "/team/for-vllm");
  ASSERT_OK_AND_ASSIGN(const v1::ModelExport absolute, Export(exports() + "/absolute"));
  EXPECT_EQ(absolute.directory(), exports() + "/absolute");
}

TEST_F(ModelConversionsTest, RefusesFoldersOutsideTheRoot) {
  fs::create_directory(dir_ / "elsewhere");
  fs::create_directory_symlink(dir_ / "elsewhere", exports() + "/link");
  for (const char* output : {"..", "../x", "a/../../x", "/tmp/x", ".", "link/x", "/"}) {
    EXPECT_THAT(Export(output), StatusIs(kInvalid, HasSubstr("--export-root"))) << output;
  }
  EXPECT_THAT(Export(".hidden"), StatusIs(kInvalid, HasSubstr("begins with a dot")));
  EXPECT_THAT(Export("a/.tmp-x"), StatusIs(kInvalid, HasSubstr("begins with a dot")));
  EXPECT_THAT(Export("a\nb"), StatusIs(kInvalid, HasSubstr("control characters")));
  EXPECT_THAT(Export(std::string(5000, 'a')), StatusIs(kInvalid, HasSubstr("5000 bytes")));
  EXPECT_THAT(Names(dir_ / "elsewhere"), IsEmpty());
  EXPECT_THAT(Names(exports()), UnorderedElementsAre("link"));
}

// Before the conversion, not after it.
TEST_F(ModelConversionsTest, RefusesFoldersThatCannotBeMade) {
  ASSERT_OK(Export("first"));
  testing::WriteFile(exports() + "/file", "");
  EXPECT_THAT(Export("first/inside"), StatusIs(kInvalid, HasSubstr("'first' is an export itself")));
  EXPECT_THAT(Export("first/deep/inside"), StatusIs(kInvalid, HasSubstr("'first' is an export")));
  EXPECT_THAT(Export("file/x"), StatusIs(kInvalid, HasSubstr("'file' is no folder")));
  EXPECT_THAT(Export(std::string(256, 'a') + "/x"), StatusIs(kInvalid, HasSubstr("256 bytes")));
  EXPECT_THAT(Names(exports()), UnorderedElementsAre("first", "file"));
}

TEST_F(ModelConversionsTest, DoesNotReplaceWhatIsThere) {
  ASSERT_OK(Export());
  const absl::Status again = Export().status();
  EXPECT_THAT(again, StatusIs(absl::StatusCode::kAlreadyExists,
                              AllOf(HasSubstr("'m-gptq_v2'"), Not(HasSubstr(exports())))));
  EXPECT_EQ(ErrorReason(again), "EXPORT_EXISTS");
}

TEST_F(ModelConversionsTest, RefusesUnknownModelsAndFormats) {
  ExportModelRequest request;
  request.set_name("models/nobody");
  request.set_format(ExportModelRequest::GPTQ);
  EXPECT_THAT(conversions_->Export(request, GoOn), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Export("", ExportModelRequest::FORMAT_UNSPECIFIED),
              StatusIs(kInvalid, HasSubstr("format: 0")));
  EXPECT_THAT(Export("", static_cast<ExportModelRequest::Format>(99)),
              StatusIs(kInvalid, HasSubstr("format: 99")));
  request.set_name("models/m");
  request.set_data_type(static_cast<ExportModelRequest::DataType>(7));
  EXPECT_THAT(conversions_->Export(request, GoOn), StatusIs(kInvalid, HasSubstr("data_type: 7")));
}

TEST_F(ModelConversionsTest, WhatFailsOrIsCancelledLeavesNothing) {
  EXPECT_THAT(Export("", ExportModelRequest::GGUF), HasCode(absl::StatusCode::kFailedPrecondition));
  const auto stop = [](int64_t done, int64_t) {
    return done == 5 ? absl::CancelledError("the client has gone") : absl::OkStatus();
  };
  EXPECT_THAT(Export("", ExportModelRequest::GPTQ_V2, stop), HasCode(absl::StatusCode::kCancelled));
  EXPECT_THAT(Names(exports()), IsEmpty());
}

TEST_F(ModelConversionsTest, OneRunsAtATime) {
  absl::Status second;
  const auto start_another = [&](int64_t done, int64_t) {
    if (done == 1) std::thread([&] { second = Export("other").status(); }).join();
    return absl::OkStatus();
  };
  ASSERT_OK(Export("", ExportModelRequest::GPTQ_V2, start_another));
  EXPECT_THAT(second, HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(ErrorReason(second), "CONVERSION_RUNNING");
}

TEST_F(ModelConversionsTest, RemovesWhatADeadProcessLeft) {
  fs::create_directory(exports() + "/.tmp-w-1@m");
  fs::create_directory(exports() + "/.tmp-w-10@m");  // another worker's
  fs::create_directory(exports() + "/kept");
  OpenConversions();
  EXPECT_THAT(Names(exports()), UnorderedElementsAre("kept", ".tmp-w-10@m"));
}

// It is not published with what comes after it.
TEST_F(ModelConversionsTest, AnExportBeginsWithAnEmptyFolder) {
  fs::create_directory(exports() + "/.tmp-w-1@m");
  testing::WriteFile(exports() + "/.tmp-w-1@m/old", "");
  ASSERT_OK_AND_ASSIGN(const v1::ModelExport exported, Export());
  EXPECT_FALSE(fs::exists(exported.directory() + "/old"));
}

TEST_F(ModelConversionsTest, AnImportBecomesAModel) {
  ASSERT_OK_AND_ASSIGN(const v1::ModelExport exported, Export());
  known_ = exported.directory();
  ASSERT_OK_AND_ASSIGN(const v1::Model model, Import("known", "imported"));
  EXPECT_EQ(model.name(), "models/imported");
  EXPECT_EQ(model.state(), v1::Model::UNLOADED);
  EXPECT_EQ(model.bits(), 4);
  EXPECT_EQ(model.method(), "gptq (imported)");
  EXPECT_EQ(model.quantization_job(), "");
  ASSERT_OK(store_->Get("imported"));
  EXPECT_THAT(Import("known", "imported"), HasCode(absl::StatusCode::kAlreadyExists));
}

TEST_F(ModelConversionsTest, AnImportMayLieInABucket) {
  ASSERT_OK_AND_ASSIGN(const v1::ModelExport exported, Export());
  ASSERT_OK_AND_ASSIGN(sources_,
                       ModelSources::Open({.prefixes = {"s3://bucket"},
                                           .cache_directory = dir_ / "sources",
                                           .cache_bytes_max = 10 << 20,
                                           .open_bucket = [this](const std::string&) {
                                             return objects::OpenDirectoryStore(exports());
                                           }}));
  OpenConversions();
  const std::string name = fs::path(exported.directory()).filename().string();
  ASSERT_OK_AND_ASSIGN(const v1::Model model, Import("s3://bucket/" + name, "imported"));
  EXPECT_EQ(model.bits(), 4);
  EXPECT_THAT(Import("s3://bucket/absent", "n"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Import("s3://other/" + name, "n"), HasCode(kInvalid));
}

TEST_F(ModelConversionsTest, RefusesImportsOfWhatIsNoGptqCheckpoint) {
  EXPECT_THAT(Import("unknown", "n"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Import("known", "No Name"), HasCode(kInvalid));
  known_ = dir_ / "source";
  EXPECT_THAT(Import("known", "n"), StatusIs(kInvalid, HasSubstr("quantization_config")));
  EXPECT_THAT(Names(root_), UnorderedElementsAre("m", ".origins"));
}

}  // namespace
}  // namespace walsh::service
