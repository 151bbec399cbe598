#include "worker/service/model_sources.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "tests/testing/scripted_http_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "tests/unit/worker/service/watched_store.h"
#include "worker/io/checkpoint.h"
#include "worker/objects/s3_object_store.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using objects::ObjectStore;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::walsh::testing::HasCode;
using ::walsh::testing::ScriptedHttpServer;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TinyModel;

class ModelSourcesTest : public ::testing::Test {
 protected:
  void SetUp() override { Open({"s3://bucket/models", "s3://bucket/text.txt", "s3://all"}); }
  void Open(std::vector<std::string> prefixes) {
    absl::StatusOr<std::unique_ptr<ModelSources>> sources = ModelSources::Open(
        {.prefixes = std::move(prefixes),
         .cache_directory = dir_ / "sources",
         .cache_bytes_max = cache_bytes_max_,
         .open_bucket =
             [this](const std::string& name) -> absl::StatusOr<std::unique_ptr<ObjectStore>> {
           if (server_ != nullptr) {
             return objects::OpenS3Store({.endpoint = server_->url(),
                                          .region = "us-east-1",
                                          .access_key_id = "id",
                                          .secret_access_key = "key",
                                          .bucket = name});
           }
           WALSH_ASSIGN_OR_RETURN(auto store, objects::OpenDirectoryStore(dir_ / name));
           return std::make_unique<WatchedStore>(std::move(store), &on_read_);
         }});
    ASSERT_OK(sources);
    sources_ = *std::move(sources);
  }
  // Answers for a bucket on a server.
  void Answer(std::vector<std::string> answers) {
    server_ = std::make_unique<ScriptedHttpServer>(std::move(answers));
    Open({"s3://bucket/models"});
  }

  static PathResolver Paths() {
    return [](std::string_view path) -> absl::StatusOr<std::string> {
      return absl::StrCat("/roots/", std::string(path));
    };
  }
  // Until the next one.
  absl::StatusOr<std::string> Resolve(const std::string& reference,
                                      FetchExtent extent = FetchExtent::kWhole) {
    references_.emplace(sources_.get(), Paths(), extent, progress_);
    return references_->ResolveModel(reference);
  }
  absl::StatusOr<std::string> ResolveText(const std::string& reference) {
    references_.emplace(sources_.get(), Paths(), FetchExtent::kWhole, progress_);
    return references_->ResolveText(reference);
  }
  absl::Status Status(const std::string& reference) { return Resolve(reference).status(); }
  void Write(const std::string& path, const std::string& contents) {
    ASSERT_OK(MakeDirectories(fs::path(dir_ / path).parent_path().string()));
    ASSERT_OK(PublishFile(dir_ / path, contents));
  }
  static std::vector<std::string> Names(const std::string& directory) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(directory)) {
      names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  static std::string Fingerprint(const std::string& path) {
    const auto checkpoint = Checkpoint::Open(path);
    EXPECT_OK(checkpoint);
    return checkpoint.ok() ? (*checkpoint)->Fingerprint(1).value() : "";
  }

  testing::TempDir dir_;
  int64_t cache_bytes_max_ = 10 << 20;
  WatchedStore::OnRead on_read_;
  CopyProgress progress_;
  std::unique_ptr<ScriptedHttpServer> server_;
  std::unique_ptr<ModelSources> sources_;
  std::optional<References> references_;
};

TEST_F(ModelSourcesTest, AFolderInABucketIsTheModelThatItIsOnDisk) {
  TinyModel({.n_shards = 3}).WriteHf(dir_ / "bucket/models/of/tiny");
  const std::vector<std::string> needed = Names(dir_ / "bucket/models/of/tiny");
  Write("bucket/models/of/tiny/pytorch_model.bin", "not read");
  Write("bucket/models/of/tiny/original/config.json", "neither");
  ASSERT_OK_AND_ASSIGN(const std::string path, Resolve("s3://bucket/models/of/tiny"));
  EXPECT_EQ(Names(path), needed);
  EXPECT_EQ(fs::path(path).filename(), "tiny") << "messages have it";
  EXPECT_EQ(Fingerprint(path), Fingerprint(dir_ / "bucket/models/of/tiny"));
  ASSERT_OK_AND_ASSIGN(const std::string again, Resolve("s3://bucket/models/of/tiny/"));
  EXPECT_EQ(path, again);
}

TEST_F(ModelSourcesTest, AnObjectIsAFile) {
  ASSERT_OK(MakeDirectories(dir_ / "all"));
  TinyModel({}).WriteGguf(dir_ / "all/tiny.gguf");
  Write("bucket/text.txt", "A text.");
  ASSERT_OK_AND_ASSIGN(const std::string model, Resolve("s3://all/tiny.gguf"));
  EXPECT_EQ(Fingerprint(model), Fingerprint(dir_ / "all/tiny.gguf"));
  ASSERT_OK_AND_ASSIGN(const std::string text, ResolveText("s3://bucket/text.txt"));
  EXPECT_EQ(*ReadFile(text, 100), "A text.");
  EXPECT_EQ(fs::path(text).filename(), "text.txt");
}

TEST_F(ModelSourcesTest, ModelsAndTextsAreToldApartBeforeTheyAreFetched) {
  int n_reads = 0;
  on_read_ = [&](const std::string&, size_t n_bytes, const KeepGoing&) {
    n_reads += n_bytes > 0 ? 1 : 0;
    return absl::OkStatus();
  };
  const TinyModel model({});
  model.WriteHf(dir_ / "all/tiny");
  model.WriteGguf(dir_ / "all/tiny.gguf");
  Write("all/text.txt", "A text.");
  Write("all/alone.safetensors", "weights");
  for (const char* text : {"s3://all/text.txt", "s3://all/alone.safetensors"}) {
    for (const FetchExtent extent : {FetchExtent::kWhole, FetchExtent::kHeaders}) {
      EXPECT_THAT(Resolve(text, extent),
                  StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is no model")));
    }
  }
  for (const char* reference : {"s3://all/tiny", "s3://all/tiny.gguf"}) {
    EXPECT_THAT(ResolveText(reference),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is a model")));
  }
  // Whatever it is called, it is as long as a text.
  fs::resize_file(dir_ / "all/alone.safetensors", limits::kCalibrationFileBytesMax + 1);
  EXPECT_THAT(ResolveText("s3://all/alone.safetensors"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most")));
  EXPECT_EQ(n_reads, 0);
}

TEST_F(ModelSourcesTest, PathsAreResolvedAsPaths) {
  EXPECT_EQ(*Resolve("a/b"), "/roots/a/b");
  EXPECT_EQ(*ResolveText("a/b"), "/roots/a/b");
  EXPECT_FALSE(references_->has_fetched());
  References without(nullptr, Paths(), FetchExtent::kWhole, {});
  EXPECT_EQ(*without.ResolveModel("s3://bucket/models/a"), "/roots/s3://bucket/models/a")
      << "for the model roots to refuse";
}

TEST_F(ModelSourcesTest, RefusesWhatLiesBeneathNoPrefix) {
  Write("bucket/models2/config.json", "{}");
  Write("bucket/secret/config.json", "{}");
  for (const char* reference :
       {"s3://bucket/models2", "s3://bucket/secret", "s3://bucket/model", "s3://other/models/a",
        "s3://bucket/text.txt.bak", "s3://bucket/Models/a"}) {
    EXPECT_THAT(Status(reference),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr(reference), HasSubstr("--model-url-prefix"))));
  }
  for (const char* reference :
       {"s3://bucket/models/../secret", "s3://bucket/models//a", "s3://bucket/models/./a",
        "s3://bucket/models/%2e%2e/secret", "s3://bucket/models/a?x", "s3://bucket/models/.hidden",
        "s3://bucket/models/a b", "s3://bucket", "s3://all", "s3://", "s3:///etc/passwd"}) {
    EXPECT_THAT(Status(reference), HasCode(absl::StatusCode::kInvalidArgument)) << reference;
  }
  EXPECT_THAT(Status(std::string("s3://bucket/models/a\0b", 22)),
              HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(ModelSourcesTest, TakesOnlyPrefixesThatItCanCompare) {
  for (const char* prefix : {"models", "file:/models", "s3://bucket/../x", "s3://bucket/a//b"}) {
    EXPECT_THAT(ModelSources::Open({.prefixes = {prefix}, .cache_directory = dir_ / "sources"}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(prefix)));
  }
}

TEST_F(ModelSourcesTest, SaysWhatIsMissing) {
  EXPECT_THAT(Status("s3://all/absent"),
              StatusIs(absl::StatusCode::kNotFound, "'s3://all/absent' does not exist"));
  TinyModel({.n_shards = 2}).WriteHf(dir_ / "all/tiny");
  fs::remove(dir_ / "all/tiny/model-00002-of-00002.safetensors");
  EXPECT_THAT(Status("s3://all/tiny"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("has no model-00002-of-00002")));
  fs::remove(dir_ / "all/tiny/model.safetensors.index.json");
  EXPECT_THAT(Status("s3://all/tiny"), StatusIs(absl::StatusCode::kNotFound,
                                                HasSubstr("has neither model.safetensors nor")));
  fs::remove(dir_ / "all/tiny/config.json");
  EXPECT_THAT(Status("s3://all/tiny"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("has no config.json")));
}

TEST_F(ModelSourcesTest, FetchesAgainOnlyWhatWasReplaced) {
  int n_reads = 0;
  on_read_ = [&](const std::string&, size_t n_bytes, const KeepGoing&) {
    n_reads += n_bytes > 0 ? 1 : 0;
    return absl::OkStatus();
  };
  Write("bucket/text.txt", "One.");
  EXPECT_EQ(*ReadFile(*ResolveText("s3://bucket/text.txt"), 100), "One.");
  EXPECT_EQ(*ReadFile(*ResolveText("s3://bucket/text.txt"), 100), "One.");
  EXPECT_EQ(n_reads, 1);
  Write("bucket/text.txt", "Two.");
  EXPECT_EQ(*ReadFile(*ResolveText("s3://bucket/text.txt"), 100), "Two.");
}

TEST_F(ModelSourcesTest, NoticesWhatIsReplacedMeanwhile) {
  TinyModel({}).WriteHf(dir_ / "all/tiny");
  on_read_ = [&](const std::string& key, size_t n_bytes, const KeepGoing&) {
    if (n_bytes > 0 && key.ends_with("model.safetensors")) Write("all/" + key, "another");
    return absl::OkStatus();
  };
  EXPECT_THAT(Status("s3://all/tiny"),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("was replaced")));
  EXPECT_THAT(Names(dir_ / "sources"), IsEmpty());
}

TEST_F(ModelSourcesTest, PlansFromHeadersAlone) {
  const TinyModel model({.hidden = 256, .intermediate = 512, .n_shards = 2});
  model.WriteHf(dir_ / "all/tiny");
  size_t n_bytes_read = 0;
  on_read_ = [&](const std::string& key, size_t n_bytes, const KeepGoing&) {
    if (key.ends_with(".safetensors")) n_bytes_read += n_bytes;
    return absl::OkStatus();
  };
  ASSERT_OK_AND_ASSIGN(const std::string path, Resolve("s3://all/tiny", FetchExtent::kHeaders));
  ASSERT_OK_AND_ASSIGN(const auto planned, Checkpoint::Open(path));
  ASSERT_OK_AND_ASSIGN(const auto whole, Checkpoint::Open(dir_ / "all/tiny"));
  EXPECT_EQ(planned->size_bytes(), whole->size_bytes());
  EXPECT_EQ(planned->format(), whole->format());
  EXPECT_LT(n_bytes_read, static_cast<size_t>(whole->size_bytes()) / 10);
  references_.reset();
  EXPECT_THAT(Names(dir_ / "sources"), IsEmpty()) << "it is no copy";

  model.WriteGguf(dir_ / "all/tiny.gguf");
  ASSERT_OK_AND_ASSIGN(const std::string gguf,
                       Resolve("s3://all/tiny.gguf", FetchExtent::kHeaders));
  EXPECT_OK(Checkpoint::Open(gguf));
  // Where there is a copy, it is looked at.
  ASSERT_OK_AND_ASSIGN(const std::string copy, Resolve("s3://all/tiny"));
  EXPECT_EQ(*Resolve("s3://all/tiny", FetchExtent::kHeaders), copy);
}

TEST_F(ModelSourcesTest, ShowsProgressAndEndsWithItsCaller) {
  TinyModel({}).WriteHf(dir_ / "all/tiny");
  int64_t last = 0, total = 0;
  progress_ = [&](int64_t done, int64_t bytes_total) {
    EXPECT_GE(done, last);
    last = done;
    total = bytes_total;
    return done > 0 && done == bytes_total ? absl::AbortedError("lost") : absl::OkStatus();
  };
  EXPECT_THAT(Status("s3://all/tiny"), StatusIs(absl::StatusCode::kAborted, "lost"));
  EXPECT_GT(total, 1000);
  EXPECT_THAT(Names(dir_ / "sources"), IsEmpty());
}

bool HasDetail(const absl::Status& status, const std::string& type) {
  return status.GetPayload("type.googleapis.com/google.rpc." + type).has_value();
}

TEST_F(ModelSourcesTest, SaysWhoseFaultItIs) {
  Write("bucket/text.txt", "A text.");
  const std::vector<std::pair<absl::StatusCode, absl::StatusCode>> codes = {
      {absl::StatusCode::kPermissionDenied, absl::StatusCode::kFailedPrecondition},
      {absl::StatusCode::kInvalidArgument, absl::StatusCode::kFailedPrecondition},
      {absl::StatusCode::kFailedPrecondition, absl::StatusCode::kFailedPrecondition},
      {absl::StatusCode::kUnavailable, absl::StatusCode::kUnavailable},
      {absl::StatusCode::kCancelled, absl::StatusCode::kUnavailable},
      {absl::StatusCode::kAborted, absl::StatusCode::kUnavailable},
      {absl::StatusCode::kNotFound, absl::StatusCode::kNotFound},
      {absl::StatusCode::kDataLoss, absl::StatusCode::kDataLoss}};
  for (const auto& [from, to] : codes) {
    on_read_ = [&](const std::string&, size_t, const KeepGoing&) {
      return absl::Status(from, "as told");
    };
    const absl::Status status = ResolveText("s3://bucket/text.txt").status();
    EXPECT_THAT(status, StatusIs(to, HasSubstr("'s3://bucket/text.txt'"))) << from;
    EXPECT_EQ(ErrorReason(status),
              to == absl::StatusCode::kFailedPrecondition ? "SOURCE_REFUSED" : "");
    EXPECT_EQ(HasDetail(status, "RetryInfo"), to == absl::StatusCode::kUnavailable);
    EXPECT_EQ(HasDetail(status, "ResourceInfo"), to == absl::StatusCode::kNotFound);
  }
}

TEST_F(ModelSourcesTest, FetchesNoMoreThanItMayKeep) {
  cache_bytes_max_ = 1000;
  Open({"s3://all"});
  TinyModel({}).WriteHf(dir_ / "all/tiny");
  for (const FetchExtent extent : {FetchExtent::kWhole, FetchExtent::kHeaders}) {
    const absl::Status status = Resolve("s3://all/tiny", extent).status();
    EXPECT_THAT(status, HasCode(absl::StatusCode::kFailedPrecondition));
    EXPECT_EQ(ErrorReason(status), "SOURCE_TOO_LARGE");
  }
  EXPECT_THAT(Names(dir_ / "sources"), IsEmpty());
}

TEST_F(ModelSourcesTest, TooManyObjectsAreNoModel) {
  TinyModel({}).WriteHf(dir_ / "all/tiny");
  on_read_ = [&](const std::string&, size_t, const KeepGoing&) {
    return absl::ResourceExhaustedError("too many");
  };
  EXPECT_THAT(Status("s3://all/tiny"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("too many")));
}

TEST_F(ModelSourcesTest, AnIndexThatLeadsAwayIsRefused) {
  TinyModel({}).WriteHf(dir_ / "all/tiny");
  fs::remove(dir_ / "all/tiny/model.safetensors");
  for (const char* shard : {"../../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors",
                            ".x.safetensors", "passwd"}) {
    Write("all/tiny/model.safetensors.index.json",
          absl::StrCat("{\"weight_map\": {\"t\": \"", shard, "\"}}"));
    EXPECT_THAT(Status("s3://all/tiny"), HasCode(absl::StatusCode::kInvalidArgument)) << shard;
  }
}

std::string Page(const std::string& entries) {
  return ScriptedHttpServer::Answer(200, "<ListBucketResult>" + entries + "</ListBucketResult>");
}
std::string Entry(const std::string& key, int64_t size_bytes,
                  const std::string& etag = "&quot;e&quot;") {
  return absl::StrCat("<Contents><Key>", key,
                      "</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified><ETag>", etag,
                      "</ETag><Size>", size_bytes, "</Size></Contents>");
}

TEST_F(ModelSourcesTest, NamesThatAListMakesUpBecomeNoFiles) {
  const std::string hostile = Entry("models/m/../x", 2) + Entry("models/m//config.json", 9) +
                              Entry("/etc/passwd", 2) + Entry("models/m/&#0;config.json", 2) +
                              Entry("models/m/./config.json", 9) + Entry("models/m/..", 2) +
                              Entry("models/m/", 0) + Entry("models/m/.gitattributes", 2);
  Answer({Page(""),
          Page(hostile + Entry("models/m/config.json", 2) + Entry("models/m/model.safetensors", 3)),
          ScriptedHttpServer::Answer(206, "{}"), ScriptedHttpServer::Answer(206, "abc")});
  ASSERT_OK_AND_ASSIGN(const std::string path, Resolve("s3://bucket/models/m"));
  EXPECT_THAT(Names(path), ElementsAre("config.json", "model.safetensors"));
  EXPECT_THAT(Names(fs::path(path).parent_path().string()), ElementsAre("m"));
  EXPECT_EQ(Names(dir_ / "sources").size(), 1u);
}

TEST_F(ModelSourcesTest, ListsThatCannotBeTrueAreRefused) {
  const std::string good = Entry("models/m/model.safetensors", 3);
  const std::string config = Entry("models/m/config.json", 2);
  const std::vector<std::pair<std::string, absl::StatusCode>> lists = {
      {config + config + good, absl::StatusCode::kDataLoss},
      {Entry("models/m/config.json", 2, "") + good, absl::StatusCode::kDataLoss},
      {Entry("models/m/config.json", 2, "&#13;&#10;Host: x") + good, absl::StatusCode::kDataLoss},
      {Entry("models/m/config.json", -1) + good, absl::StatusCode::kDataLoss},
      {Entry("models/m/config.json", int64_t{1} << 40) + good, absl::StatusCode::kInvalidArgument},
      {config + Entry("models/m/model.safetensors", int64_t{1} << 62),
       absl::StatusCode::kInvalidArgument}};
  for (const auto& [list, code] : lists) {
    Answer({Page(""), Page(list)});
    EXPECT_THAT(Status("s3://bucket/models/m"), HasCode(code)) << list;
  }
}

TEST_F(ModelSourcesTest, MessagesNameNoEndpoint) {
  Answer({ScriptedHttpServer::Answer(403, "<Error><Code>AccessDenied</Code></Error>")});
  EXPECT_THAT(Status("s3://bucket/models/m"),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("403 (AccessDenied)"), Not(HasSubstr("127.0.0.1")))));
}

}  // namespace
}  // namespace walsh::service
