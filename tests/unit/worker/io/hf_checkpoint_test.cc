#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/checkpoint.h"
#include "worker/io/random_access_file.h"

namespace walsh {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using walsh::testing::Damage;
using walsh::testing::FloatBytes;
using walsh::testing::StatusIs;
using walsh::testing::TempDir;
using walsh::testing::TinyModel;
using walsh::testing::TinyTensor;
using walsh::testing::WriteFile;

void ExpectTensorsEqual(const Checkpoint& checkpoint, const TinyModel& model) {
  for (const TinyTensor& tensor : model.tensors()) {
    ASSERT_OK_AND_ASSIGN(const Matrix read, checkpoint.Read(tensor.name));
    EXPECT_EQ(read.rows(), tensor.shape.size() == 1 ? 1 : tensor.shape[0]) << tensor.name;
    EXPECT_EQ(read.cols(), tensor.shape.back()) << tensor.name;
    ASSERT_EQ(read.size(), static_cast<int64_t>(tensor.values.size()));
    EXPECT_TRUE(std::equal(tensor.values.begin(), tensor.values.end(), read.data())) << tensor.name;
  }
}

// The bytes of a tensor by FormOf and ReadStored; empty with a failure.
std::string StoredBytes(const Checkpoint& checkpoint, std::string_view tensor) {
  const absl::StatusOr<StoredForm> form = checkpoint.FormOf(tensor);
  EXPECT_OK(form);
  if (!form.ok()) return "";
  std::string bytes(static_cast<size_t>(form->size_bytes), '?');
  const absl::Status status =
      checkpoint.ReadStored(tensor, 0, form->rows, std::as_writable_bytes(std::span(bytes)));
  EXPECT_OK(status);
  return status.ok() ? bytes : "";
}

class HfCheckpointTest : public ::testing::TestWithParam<std::tuple<std::string, int>> {};

TEST_P(HfCheckpointTest, ReadsWhatWasWritten) {
  const auto& [dtype, n_shards] = GetParam();
  const TempDir dir;
  const TinyModel model({.dtype = dtype, .n_shards = n_shards});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  ExpectTensorsEqual(*checkpoint, model);
  EXPECT_EQ(checkpoint->format(), "safetensors " + dtype);
  EXPECT_EQ(checkpoint->config().hidden, 64);
  EXPECT_EQ(checkpoint->config().eos_tokens, std::vector<int32_t>{317});
  EXPECT_FALSE(checkpoint->Has("model.layers.2.input_layernorm.weight"));
  EXPECT_EQ(checkpoint->tokenizer().tokenizer_json, model.TokenizerJson());
  EXPECT_TRUE(checkpoint->tokenizer().sentencepiece_model.empty());
  EXPECT_FALSE(checkpoint->tokenizer().gguf.has_value());
  EXPECT_THAT(checkpoint->tokenizer().chat_template, StartsWith("{{ bos_token }}"));
}

INSTANTIATE_TEST_SUITE_P(Formats, HfCheckpointTest,
                         ::testing::Combine(::testing::Values("F32", "F16", "BF16"),
                                            ::testing::Values(1, 3)));

TEST_P(HfCheckpointTest, ReadsWhatIsStored) {
  const auto& [dtype, n_shards] = GetParam();
  const TempDir dir;
  const TinyModel model({.has_attention_bias = true, .dtype = dtype, .n_shards = n_shards});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  for (const TinyTensor& tensor : model.tensors()) {
    ASSERT_OK_AND_ASSIGN(const StoredForm form, checkpoint->FormOf(tensor.name));
    EXPECT_EQ(Info(form.type).name, dtype);
    EXPECT_EQ(form.rows, tensor.shape.size() == 1 ? 1 : tensor.shape[0]) << tensor.name;
    EXPECT_EQ(form.cols, tensor.shape.back()) << tensor.name;
    EXPECT_EQ(StoredBytes(*checkpoint, tensor.name), FloatBytes(tensor.values, dtype))
        << tensor.name;
  }
}

TEST(HfCheckpointTest, RefusesToReadWhatIsNotStored) {
  const TempDir dir;
  TinyModel({}).WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  std::vector<std::byte> bytes(256);
  EXPECT_OK(checkpoint->ReadStored(kFinalNormTensor, 0, 1, bytes));
  EXPECT_THAT(checkpoint->FormOf("x"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no tensor 'x'")));
  EXPECT_THAT(checkpoint->ReadStored("x", 0, 1, bytes),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no tensor 'x'")));
  bytes.pop_back();
  EXPECT_THAT(
      checkpoint->ReadStored(kFinalNormTensor, 0, 1, bytes),
      StatusIs(absl::StatusCode::kInvalidArgument,
               HasSubstr("'model.norm.weight': a buffer of 255 bytes, rows 0 to 1 have 256")));
}

TEST(HfCheckpointTest, ReadsFromSeveralThreads) {
  const TempDir dir;
  const TinyModel model({.dtype = "BF16", .n_shards = 2});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  std::vector<std::thread> threads;
  for (size_t first = 0; first < 4; ++first) {
    threads.emplace_back([&, first] {
      const size_t n = model.tensors().size();
      for (size_t i = 0; i < n; ++i) {
        const TinyTensor& tensor = model.tensors()[(first + i) % n];
        EXPECT_EQ(StoredBytes(*checkpoint, tensor.name), FloatBytes(tensor.values, "BF16"));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(HfCheckpointTest, ReadsRows) {
  const TempDir dir;
  const TinyModel model({});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  ASSERT_OK_AND_ASSIGN(const Matrix rows, checkpoint->ReadRows(kEmbeddingTensor, 17, 3));
  const TinyTensor& embedding = model.tensor("model.embed_tokens.weight");
  ASSERT_EQ(rows.rows(), 3);
  EXPECT_TRUE(std::equal(rows.data(), rows.data() + rows.size(),
                         embedding.values.begin() + 17 * model.options().hidden));
  EXPECT_THAT(checkpoint->ReadRows(kEmbeddingTensor, 318, 3),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 rows from row 318")));
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  EXPECT_THAT(checkpoint->ReadRows(kEmbeddingTensor, 1, kMax),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr(std::to_string(kMax) + " rows from row 1 ")));
  EXPECT_THAT(checkpoint->ReadRows(kEmbeddingTensor, -1, 1),
              walsh::testing::HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(checkpoint->Read("model.layers.9.x"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("'model.layers.9.x'")));
}

TEST(HfCheckpointTest, TiedHeadAnswersToBothNames) {
  const TempDir dir;
  const TinyModel model({.is_tied = true});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  EXPECT_TRUE(checkpoint->Has(kLmHeadTensor));
  ASSERT_OK_AND_ASSIGN(const Matrix head, checkpoint->Read(kLmHeadTensor));
  ASSERT_OK_AND_ASSIGN(const Matrix embedding, checkpoint->Read(kEmbeddingTensor));
  EXPECT_TRUE(std::equal(head.data(), head.data() + head.size(), embedding.data()));
  EXPECT_EQ(StoredBytes(*checkpoint, kLmHeadTensor),
            FloatBytes(model.tensor("model.embed_tokens.weight").values, "F32"));
}

TEST(HfCheckpointTest, ReadsBiases) {
  const TempDir dir;
  const TinyModel model({.has_attention_bias = true, .has_mlp_bias = true});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  EXPECT_TRUE(checkpoint->Has("model.layers.0.self_attn.q_proj.bias"));
  ExpectTensorsEqual(*checkpoint, model);
}

// Left out silently, a bias that the configuration denies would change the model.
TEST(HfCheckpointTest, RefusesParametersThatTheConfigurationDenies) {
  const TempDir dir;
  TinyModel({.has_attention_bias = true, .config_overrides = R"({"attention_bias": false})"})
      .WriteHf(dir / "bias");
  EXPECT_THAT(Checkpoint::Open(dir / "bias"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("'model.layers.0.self_attn.k_proj.bias' is not part")));
  TinyModel({.config_overrides = R"({"num_hidden_layers": 1})"}).WriteHf(dir / "layers");
  EXPECT_THAT(Checkpoint::Open(dir / "layers"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model.layers.1.")));
}

TEST(HfCheckpointTest, AddsEndTokensOfTheGenerationConfig) {
  const TempDir dir;
  TinyModel({}).WriteHf(dir / "tiny");
  WriteFile(dir / "tiny/generation_config.json", R"({"eos_token_id":[317,7]})");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  EXPECT_THAT(checkpoint->config().eos_tokens, ElementsAre(317, 7));
  EXPECT_EQ(checkpoint->side_files().count("generation_config.json"), 1u);
  WriteFile(dir / "tiny/generation_config.json", R"({"eos_token_id":[320]})");
  EXPECT_THAT(Checkpoint::Open(dir / "tiny"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("generation_config.json")));
}

TEST(HfCheckpointTest, PrefersTheTemplateFile) {
  const TempDir dir;
  TinyModel({}).WriteHf(dir / "tiny");
  WriteFile(dir / "tiny/chat_template.jinja", "from the file");
  ASSERT_OK_AND_ASSIGN(const auto with_file, Checkpoint::Open(dir / "tiny"));
  EXPECT_EQ(with_file->tokenizer().chat_template, "from the file");

  std::filesystem::remove(dir / "tiny/chat_template.jinja");
  WriteFile(dir / "tiny/tokenizer_config.json",
            R"({"chat_template":[{"name":"tool_use","template":"no"},
                                {"name":"default","template":"yes"}]})");
  ASSERT_OK_AND_ASSIGN(const auto with_list, Checkpoint::Open(dir / "tiny"));
  EXPECT_EQ(with_list->tokenizer().chat_template, "yes");
}

struct DamagedCase {
  const char* name;
  Damage damage;
  absl::StatusCode code;
  const char* message;
};

class DamagedHfCheckpointTest : public ::testing::TestWithParam<DamagedCase> {};

TEST_P(DamagedHfCheckpointTest, IsRefusedAtOpening) {
  const TempDir dir;
  TinyModel({}).WriteHf(dir / "tiny", GetParam().damage);
  const auto checkpoint = Checkpoint::Open(dir / "tiny");
  EXPECT_THAT(checkpoint, StatusIs(GetParam().code, HasSubstr(GetParam().message)));
  EXPECT_THAT(std::string(checkpoint.status().message()), Not(HasSubstr(dir.path())));
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

INSTANTIATE_TEST_SUITE_P(
    Kinds, DamagedHfCheckpointTest,
    ::testing::Values(
        DamagedCase{"Truncated", Damage::kTruncated, absl::StatusCode::kDataLoss, "truncated"},
        DamagedCase{"TrailingBytes", Damage::kTrailingBytes, kInvalid, "8 bytes after the last"},
        DamagedCase{"Gap", Damage::kGap, kInvalid, "leaves a gap"},
        DamagedCase{"Overlap", Damage::kOverlap, kInvalid, "overlaps"},
        DamagedCase{"HugeHeader", Damage::kHugeHeader, kInvalid, "header of 9223372036854775808"},
        DamagedCase{"WrongDtype", Damage::kWrongDtype, absl::StatusCode::kUnimplemented,
                    "tensor 'model.layers.1.mlp.up_proj.weight': dtype I32"},
        DamagedCase{"MissingTensor", Damage::kMissingTensor, kInvalid,
                    "tensor 'model.layers.1.mlp.up_proj.weight' is missing"},
        DamagedCase{"WrongShape", Damage::kWrongShape, kInvalid,
                    "has shape [64, 128], the configuration implies [128, 64]"},
        DamagedCase{"UnknownArchitecture", Damage::kUnknownArchitecture,
                    absl::StatusCode::kUnimplemented, "'GPT2LMHeadModel' is not supported"},
        DamagedCase{"NoConfig", Damage::kNoConfig, absl::StatusCode::kNotFound,
                    "'tiny' has no config.json"},
        DamagedCase{"NoTokenizer", Damage::kNoTokenizer, absl::StatusCode::kNotFound,
                    "neither tokenizer.json nor tokenizer.model"},
        DamagedCase{"NoWeights", Damage::kNoWeights, absl::StatusCode::kNotFound,
                    "neither model.safetensors nor model.safetensors.index.json"}),
    [](const auto& param_info) { return std::string(param_info.param.name); });

TEST(HfCheckpointTest, NamesTheFirstValueThatIsNotFinite) {
  const TempDir dir;
  const TinyModel model({});
  model.WriteHf(dir / "tiny", Damage::kNan);
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  EXPECT_THAT(checkpoint->Read(walsh::testing::kDamagedTensor),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr("tensor 'model.layers.1.mlp.up_proj.weight' is nan"),
                             HasSubstr("at [64, 0], must be finite"))));
  EXPECT_OK(checkpoint->ReadRows(walsh::testing::kDamagedTensor, 0, 64));
  // As it is stored, values are the reader's to judge.
  EXPECT_NE(StoredBytes(*checkpoint, walsh::testing::kDamagedTensor), "");
}

TEST(HfCheckpointTest, NoticesAFileThatChangesWhileItIsRead) {
  const TempDir dir;
  TinyModel({}).WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  ASSERT_OK(checkpoint->Read(kEmbeddingTensor));
  const std::string weights = dir / "tiny/model.safetensors";
  const auto size = std::filesystem::file_size(weights);
  std::filesystem::resize_file(weights, size / 2);
  EXPECT_THAT(checkpoint->Read(kLmHeadTensor),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("changed while it was read")));
  std::vector<std::byte> bytes(256);
  EXPECT_THAT(checkpoint->ReadStored("model.layers.0.input_layernorm.weight", 0, 1, bytes),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("changed while it was read")));
  EXPECT_THAT(checkpoint->Fingerprint(1), walsh::testing::HasCode(absl::StatusCode::kDataLoss));
}

TEST(HfCheckpointTest, FingerprintStopsWhenTold) {
  const TempDir dir;
  TinyModel({}).WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  EXPECT_THAT(checkpoint->Fingerprint(2, [] { return absl::CancelledError("enough"); }),
              walsh::testing::HasCode(absl::StatusCode::kCancelled));
}

TEST(HfCheckpointTest, RefusesBadIndexes) {
  const TempDir dir;
  const TinyModel model({.n_shards = 2});
  model.WriteHf(dir / "tiny");
  const std::string path = dir / "tiny/model.safetensors.index.json";
  const json good = json::parse(std::ifstream(path));
  const auto expect = [&](const std::string& text, absl::StatusCode code, const char* message) {
    WriteFile(path, text);
    EXPECT_THAT(Checkpoint::Open(dir / "tiny"), StatusIs(code, HasSubstr(message)));
  };
  const std::string tensor = "model.norm.weight";
  for (const char* shard : {"../tiny/model-00002-of-00002.safetensors", "/etc/passwd", "..",
                            "a/b.safetensors", "x.bin", ".safetensors", "a\\b.safetensors"}) {
    json bad = good;
    bad["weight_map"][tensor] = shard;
    expect(bad.dump(), kInvalid, "is no plain file name");
  }
  json number = good;
  number["weight_map"][tensor] = 3;
  expect(number.dump(), kInvalid, "is no plain file name");
  json missing_shard = good;
  missing_shard["weight_map"][tensor] = "absent.safetensors";
  expect(missing_shard.dump(), absl::StatusCode::kNotFound, "no such file: 'absent.safetensors'");
  json wrong_shard = good;
  wrong_shard["weight_map"][tensor] = "model-00001-of-00002.safetensors";
  expect(wrong_shard.dump(), kInvalid, "is not in model-00001-of-00002.safetensors");
  json unknown = good;
  unknown["weight_map"]["nothing"] = "model-00001-of-00002.safetensors";
  expect(unknown.dump(), kInvalid, "tensor 'nothing' is not in");
  expect("{}", kInvalid, "'weight_map' is missing");
  expect("{\"weight_map\":{}}", kInvalid, "'weight_map' is missing");
  expect("nonsense", kInvalid, "invalid JSON");
  EXPECT_OK((WriteFile(path, good.dump()), Checkpoint::Open(dir / "tiny")));
  // The same tensor in two shards.
  std::filesystem::copy_file(dir / "tiny/model-00001-of-00002.safetensors",
                             dir / "tiny/copy.safetensors");
  json twice = good;
  twice["weight_map"]["model.embed_tokens.weight"] = "copy.safetensors";
  expect(twice.dump(), kInvalid, "is in both");
}

TEST(HfCheckpointTest, RefusesQuantizedSources) {
  const TempDir dir;
  TinyModel({.config_overrides = R"({"quantization_config": {"quant_method": "gptq"}})"})
      .WriteHf(dir / "tiny");
  EXPECT_THAT(Checkpoint::Open(dir / "tiny"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("quantized already")));
}

TEST(HfCheckpointTest, RefusesWhatIsNoModel) {
  const TempDir dir;
  EXPECT_THAT(Checkpoint::Open(dir / "absent"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no such model: 'absent'")));
  WriteFile(dir / "model.bin", "pickle");
  EXPECT_THAT(Checkpoint::Open(dir / "model.bin"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("'model.bin' is neither")));
  // Opening a FIFO must not wait for its writer.
  TinyModel({}).WriteHf(dir / "tiny", Damage::kNoConfig);
  ASSERT_EQ(mkfifo((dir / "tiny/config.json").c_str(), 0600), 0);
  EXPECT_THAT(Checkpoint::Open(dir / "tiny"),
              StatusIs(kInvalid, HasSubstr("'config.json' is not a regular file")));
}

TEST(HfCheckpointTest, FingerprintFollowsEveryByte) {
  const TempDir dir;
  const TinyModel model({.n_shards = 2});
  model.WriteHf(dir / "a");
  model.WriteHf(dir / "b");
  const auto fingerprint = [&](const std::string& name) {
    const auto checkpoint = Checkpoint::Open(dir / name);
    return checkpoint.ok() ? (*checkpoint)->Fingerprint(2).value_or("?") : "!";
  };
  const std::string first = fingerprint("a");
  EXPECT_EQ(first.size(), 64u);
  EXPECT_EQ(fingerprint("b"), first);
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "a"));
  EXPECT_EQ(checkpoint->Fingerprint(1).value_or("?"), first);
  WriteFile(dir / "b/tokenizer_config.json", "{}");
  EXPECT_NE(fingerprint("b"), first);
  TinyModel({.seed = 2, .n_shards = 2}).WriteHf(dir / "b");
  EXPECT_NE(fingerprint("b"), first);
}

TEST(HfCheckpointTest, ReadsTinyStories) {
  WALSH_REQUIRE_DATA(path, "models/TinyStories-656K");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(path));
  EXPECT_TRUE(checkpoint->config().tied_embeddings);
  // Stored once, under the head's name.
  ASSERT_OK_AND_ASSIGN(const Matrix embedding, checkpoint->Read(kEmbeddingTensor));
  EXPECT_EQ(embedding.rows(), 2048);
  EXPECT_EQ(embedding.cols(), 128);
  EXPECT_OK(checkpoint->Read(kLmHeadTensor));
  EXPECT_EQ(checkpoint->size_bytes(), 2626168);
  EXPECT_EQ(checkpoint->format(), "safetensors F32");
}

TEST(BaseNameTest, TakesTheLastComponent) {
  EXPECT_EQ(BaseName("/a/b.gguf"), "b.gguf");
  EXPECT_EQ(BaseName("b"), "b");
  EXPECT_EQ(BaseName("/a/b/"), "b");
  EXPECT_EQ(BaseName("/"), "/");
}

}  // namespace
}  // namespace walsh
