#include "worker/io/artifact.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "common/sha256.h"
#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/expected_tensors.h"
#include "worker/io/gptq_packing.h"
#include "worker/tensor/half.h"

namespace walsh {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;
using walsh::testing::HasCode;
using walsh::testing::RoundToNearest;
using walsh::testing::StatusIs;
using walsh::testing::TempDir;
using walsh::testing::TinyModel;
using walsh::testing::TinyModelOptions;
using walsh::testing::WriteFile;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

// What a device would hand over for the same integers.
PackedTensors Pack(const QuantizedMatrix& q) {
  absl::StatusOr<GptqTensors> tensors = PackGptq(q);
  EXPECT_OK(tensors);
  if (!tensors.ok()) return {};
  return {.rows = q.rows,
          .cols = q.cols,
          .bits = q.bits,
          .group_size = q.group_size,
          .qweight = {tensors->qweight.begin(), tensors->qweight.end()},
          .qzeros = {tensors->qzeros.begin(), tensors->qzeros.end()},
          .scales = {tensors->scales.begin(), tensors->scales.end()}};
}

absl::StatusOr<PackedTensors> ReadPacked(const ArtifactReader& reader, std::string_view linear) {
  const absl::StatusOr<GptqShape> shape = reader.ShapeOf(linear);
  if (!shape.ok()) return shape.status();
  PackedTensors packed{.rows = shape->rows,
                       .cols = shape->cols,
                       .bits = shape->bits,
                       .group_size = shape->group_size};
  packed.qweight.resize(static_cast<size_t>(shape->weight_words() * shape->rows));
  packed.qzeros.resize(static_cast<size_t>(shape->groups() * shape->zero_words()));
  packed.scales.resize(static_cast<size_t>(shape->groups() * shape->rows));
  const absl::Status status =
      reader.ReadPacked(linear, {packed.qweight, packed.qzeros, packed.scales});
  if (!status.ok()) return status;
  return packed;
}

absl::StatusOr<std::vector<uint16_t>> ReadBf16(const ArtifactReader& reader,
                                               std::string_view tensor, int64_t rows,
                                               int64_t cols) {
  std::vector<uint16_t> values(static_cast<size_t>(rows * cols));
  const absl::Status status = reader.ReadBf16(tensor, 0, rows, values);
  if (!status.ok()) return status;
  return values;
}

Bf16Matrix ToBf16(const Matrix& matrix) {
  Bf16Matrix out{.rows = matrix.rows(), .cols = matrix.cols()};
  for (const float value : matrix.span()) out.values.push_back(FloatToBf16(value));
  return out;
}

json QuantizationConfig(int bits, int64_t group_size) {
  return {{"quant_method", "gptq"}, {"checkpoint_format", "gptq_v2"},
          {"bits", bits},           {"group_size", group_size},
          {"sym", false},           {"desc_act", false},
          {"lm_head", false}};
}

json Report(int bits, int64_t group_size) {
  return {{"quantization",
           {{"bits", bits}, {"group_size", group_size}, {"symmetric", false}, {"method", "gptq"}}},
          {"rotation", {{"kind", "gsr"}, {"block", 32}}}};
}

struct Options {
  int bits = 4;
  int64_t group_size = 32;
  int64_t shard_bytes_max = kShardBytesMax;
  bool in_stored_form = false;  // by WritePacked and WriteBf16
};

bool IsLinear(const ExpectedTensor& tensor) {
  return !tensor.is_one_dimensional && tensor.name.find("layers.") != std::string::npos;
}

// All tensors of `source`, linears of the layers quantized.
absl::Status WriteTensors(const Checkpoint& source, const Options& options,
                          ArtifactWriter& writer) {
  ModelConfig config = source.config();
  config.tied_embeddings = false;
  for (const ExpectedTensor& tensor : ExpectedTensors(config)) {
    auto matrix = source.Read(tensor.name);
    if (!matrix.ok()) return matrix.status();
    const std::string linear = tensor.name.substr(0, tensor.name.rfind('.'));
    absl::Status status;
    if (IsLinear(tensor)) {
      const QuantizedMatrix quantized = RoundToNearest(*matrix, options.bits, options.group_size);
      status = options.in_stored_form ? writer.WritePacked(linear, Pack(quantized))
                                      : writer.WriteQuantized(linear, quantized);
    } else {
      status = options.in_stored_form
                   ? writer.WriteBf16(tensor.name, ToBf16(*matrix), tensor.is_one_dimensional)
                   : writer.WriteDense(tensor.name, *matrix, tensor.is_one_dimensional);
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<ArtifactInfo> WriteArtifact(const Checkpoint& source, const std::string& directory,
                                           const Options& options) {
  auto writer = ArtifactWriter::Create(directory, source, options.shard_bytes_max);
  if (!writer.ok()) return writer.status();
  if (const auto status = WriteTensors(source, options, **writer); !status.ok()) return status;
  return (*writer)->Finish(QuantizationConfig(options.bits, options.group_size),
                           Report(options.bits, options.group_size), /*n_threads=*/2);
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::map<std::string, std::string> Contents(const std::string& directory) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(directory)) {
    files[entry.path().filename()] = ReadAll(entry.path());
  }
  return files;
}

// A tiny model as HF directory and as GGUF, opened.
class ArtifactTest : public ::testing::Test {
 protected:
  std::unique_ptr<Checkpoint> Source(const TinyModelOptions& options = {}, bool as_gguf = false) {
    const TinyModel model(options);
    const std::string path = dir_ / (as_gguf ? "source.gguf" : "source");
    if (as_gguf) {
      model.WriteGguf(path);
    } else {
      model.WriteHf(path);
    }
    auto checkpoint = Checkpoint::Open(path);
    EXPECT_OK(checkpoint);
    return *std::move(checkpoint);
  }
  std::string artifact() const { return dir_ / "artifact"; }

  TempDir dir_;
};

class ArtifactRoundTripTest : public ArtifactTest,
                              public ::testing::WithParamInterface<std::tuple<int, int64_t>> {};

TEST_P(ArtifactRoundTripTest, ReadsWhatWasWritten) {
  const auto& [bits, group_size] = GetParam();
  const auto source = Source({.has_attention_bias = true});
  ASSERT_OK_AND_ASSIGN(
      const ArtifactInfo info,
      WriteArtifact(*source, artifact(), {.bits = bits, .group_size = group_size}));
  EXPECT_EQ(info.bits, bits);
  EXPECT_EQ(info.group_size, group_size);
  EXPECT_EQ(info.rotation, "gsr");
  EXPECT_EQ(info.method, "gptq");
  EXPECT_EQ(info.sha256, Sha256Hex(ReadAll(artifact() + "/walsh.json")));
  EXPECT_GT(info.create_time_unix, 1'700'000'000);
  int64_t bytes = 0;
  for (const auto& [name, contents] : Contents(artifact())) {
    bytes += static_cast<int64_t>(contents.size());
  }
  EXPECT_EQ(info.size_bytes, bytes);

  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 2));
  EXPECT_EQ(reader->config().hidden, 64);
  EXPECT_FALSE(reader->config().tied_embeddings);
  EXPECT_EQ(reader->tokenizer().tokenizer_json, source->tokenizer().tokenizer_json);
  EXPECT_EQ(reader->tokenizer().chat_template, source->tokenizer().chat_template);
  for (const ExpectedTensor& tensor : ExpectedTensors(source->config())) {
    ASSERT_OK_AND_ASSIGN(const Matrix original, source->Read(tensor.name));
    const std::string linear = tensor.name.substr(0, tensor.name.rfind('.'));
    if (IsLinear(tensor)) {
      EXPECT_TRUE(reader->IsQuantized(linear));
      const QuantizedMatrix expected = RoundToNearest(original, bits, group_size);
      ASSERT_OK_AND_ASSIGN(const QuantizedMatrix q, reader->ReadQuantized(linear));
      EXPECT_EQ(q.codes, expected.codes) << linear;
      EXPECT_EQ(q.scales, expected.scales) << linear;
      EXPECT_EQ(q.zeros, expected.zeros) << linear;
      EXPECT_EQ(q.group_size, expected.group_size) << linear;
      ASSERT_OK_AND_ASSIGN(const PackedTensors packed, ReadPacked(*reader, linear));
      const PackedTensors expected_packed = Pack(expected);
      EXPECT_EQ(packed.rows, expected.rows) << linear;
      EXPECT_EQ(packed.cols, expected.cols) << linear;
      EXPECT_EQ(packed.bits, expected.bits) << linear;
      EXPECT_EQ(packed.group_size, expected.group_size) << linear;
      EXPECT_EQ(packed.qweight, expected_packed.qweight) << linear;
      EXPECT_EQ(packed.qzeros, expected_packed.qzeros) << linear;
      EXPECT_EQ(packed.scales, expected_packed.scales) << linear;
      EXPECT_THAT(reader->ReadDense(tensor.name), HasCode(absl::StatusCode::kNotFound));
      EXPECT_THAT(ReadBf16(*reader, tensor.name, tensor.rows, tensor.cols),
                  HasCode(absl::StatusCode::kNotFound));
    } else {
      EXPECT_FALSE(reader->IsQuantized(tensor.name));
      ASSERT_OK_AND_ASSIGN(const Matrix dense, reader->ReadDense(tensor.name));
      ASSERT_EQ(dense.rows(), original.rows());
      ASSERT_EQ(dense.cols(), original.cols());
      for (int64_t i = 0; i < dense.size(); ++i) {
        ASSERT_EQ(dense.data()[i], Bf16ToFloat(FloatToBf16(original.data()[i]))) << tensor.name;
      }
      ASSERT_OK_AND_ASSIGN(const std::vector<uint16_t> stored,
                           ReadBf16(*reader, tensor.name, original.rows(), original.cols()));
      EXPECT_TRUE(std::ranges::equal(stored, ToBf16(original).values)) << tensor.name;
      EXPECT_THAT(reader->ReadQuantized(tensor.name), HasCode(absl::StatusCode::kNotFound));
      EXPECT_THAT(ReadPacked(*reader, tensor.name), HasCode(absl::StatusCode::kNotFound));
    }
  }
}

TEST_P(ArtifactRoundTripTest, TheStoredFormGivesTheSameFiles) {
  Options options;
  std::tie(options.bits, options.group_size) = GetParam();
  options.shard_bytes_max = 50000;
  const auto source = Source({.has_attention_bias = true});
  ASSERT_OK(WriteArtifact(*source, dir_ / "floats", options));
  options.in_stored_form = true;
  ASSERT_OK(WriteArtifact(*source, dir_ / "stored", options));
  const auto expected = Contents(dir_ / "floats");
  EXPECT_GE(expected.size(), 8u);  // three shards at least
  EXPECT_EQ(Contents(dir_ / "stored"), expected);
}

INSTANTIATE_TEST_SUITE_P(Widths, ArtifactRoundTripTest,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values(int64_t{32}, int64_t{64},
                                                              int64_t{-1})));

TEST_F(ArtifactTest, RefusesToReadIntoMemoryOfAnotherSize) {
  const auto source = Source();
  ASSERT_OK(WriteArtifact(*source, artifact(), {}));
  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 1));
  const std::string linear = "model.layers.0.mlp.up_proj";  // [128, 64]
  ASSERT_OK_AND_ASSIGN(const PackedTensors packed, ReadPacked(*reader, linear));
  const auto expect = [&](size_t qweight, size_t qzeros, size_t scales, const char* message) {
    std::vector<uint32_t> weights(qweight), zeros(qzeros);
    std::vector<uint16_t> halves(scales);
    EXPECT_THAT(reader->ReadPacked(linear, {weights, zeros, halves}),
                StatusIs(kInvalid, HasSubstr(linear + message)));
  };
  const size_t n_weights = packed.qweight.size(), n_zeros = packed.qzeros.size();
  expect(n_weights - 1, n_zeros, packed.scales.size(),
         ".qweight': room for 1023 values, it has 1024");
  expect(n_weights, n_zeros + 1, packed.scales.size(), ".qzeros': room for 33 values, it has 32");
  expect(n_weights, n_zeros, 0, ".scales': room for 0 values, it has 256");
  std::vector<uint16_t> norm(64);
  EXPECT_OK(reader->ReadBf16("model.norm.weight", 0, 1, norm));
  EXPECT_THAT(reader->ReadBf16("model.norm.weight", 0, 0, norm),
              StatusIs(kInvalid, HasSubstr("a buffer of 128 bytes, rows 0 to 0 have 0")));
  EXPECT_THAT(reader->ReadBf16("model.norm.weight", 1, 1, norm),
              StatusIs(kInvalid, HasSubstr("1 rows from row 1 asked for, it has 1")));
}

TEST_F(ArtifactTest, TheSameInputGivesTheSameBytes) {
  const auto source = Source();
  ASSERT_OK(WriteArtifact(*source, dir_ / "first", {.shard_bytes_max = 50000}));
  ASSERT_OK(WriteArtifact(*source, dir_ / "second", {.shard_bytes_max = 50000}));
  EXPECT_EQ(Contents(dir_ / "first"), Contents(dir_ / "second"));
}

TEST_F(ArtifactTest, DigestsAreTakenAndCheckedNoLongerThanWanted) {
  const auto enough = [] { return absl::CancelledError("enough"); };
  const auto source = Source();
  ASSERT_OK_AND_ASSIGN(const auto writer, ArtifactWriter::Create(artifact(), *source));
  ASSERT_OK(WriteTensors(*source, {}, *writer));
  EXPECT_THAT(writer->Finish(QuantizationConfig(4, 32), Report(4, 32), 1, enough),
              walsh::testing::HasCode(absl::StatusCode::kCancelled));
  std::filesystem::remove_all(artifact());
  ASSERT_OK(WriteArtifact(*source, artifact(), {}));
  EXPECT_THAT(ArtifactReader::Open(artifact(), true, 1, enough),
              walsh::testing::HasCode(absl::StatusCode::kCancelled));
}

TEST_F(ArtifactTest, SplitsIntoShards) {
  const auto source = Source();
  ASSERT_OK(WriteArtifact(*source, artifact(), {.shard_bytes_max = 50000}));
  const json index = json::parse(ReadAll(artifact() + "/model.safetensors.index.json"));
  std::map<std::string, int> shards;
  for (const auto& [tensor, shard] : index["weight_map"].items()) ++shards[shard];
  // The embedding and the head take 40,960 bytes each, the two layers together about as much.
  EXPECT_GE(shards.size(), 3u);
  int64_t data_bytes = 0;
  for (const auto& [shard, n] : shards) {
    EXPECT_EQ(shard.find("model-0000"), 0u);
    EXPECT_EQ(shard.substr(15), "0000" + std::to_string(shards.size()) + ".safetensors");
    const std::string contents = ReadAll(artifact() + "/" + shard);
    uint64_t header = 0;
    std::memcpy(&header, contents.data(), 8);
    EXPECT_EQ(header % 8, 0u);
    data_bytes += static_cast<int64_t>(contents.size() - 8 - header);
  }
  EXPECT_EQ(index["metadata"]["total_size"], data_bytes);
  EXPECT_OK(ArtifactReader::Open(artifact(), true, 1));
}

TEST_F(ArtifactTest, ConfigKeepsWhatItDoesNotKnow) {
  const auto source = Source({.is_tied = true, .config_overrides = R"({"my_field": [1, 2]})"});
  ASSERT_OK(WriteArtifact(*source, artifact(), {}));
  const json config = json::parse(ReadAll(artifact() + "/config.json"));
  EXPECT_EQ(config["my_field"], json::array({1, 2}));
  EXPECT_EQ(config["tie_word_embeddings"], false);
  EXPECT_EQ(config["torch_dtype"], "bfloat16");
  EXPECT_EQ(config["quantization_config"], QuantizationConfig(4, 32));
  EXPECT_FALSE(config.contains("dtype"));
}

TEST_F(ArtifactTest, WritesConfigAndTokenizerForGguf) {
  const auto source = Source({.is_tied = true}, /*as_gguf=*/true);
  ASSERT_OK(WriteArtifact(*source, artifact(), {}));
  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 1));
  const ModelConfig& a = source->config();
  const ModelConfig& b = reader->config();
  EXPECT_EQ(b.architecture, a.architecture);
  EXPECT_EQ(b.hidden, a.hidden);
  EXPECT_EQ(b.head_dim, a.head_dim);
  EXPECT_EQ(b.n_kv_heads, a.n_kv_heads);
  EXPECT_EQ(b.max_position, a.max_position);
  EXPECT_EQ(b.rope_theta, a.rope_theta);
  EXPECT_EQ(b.rms_norm_eps, a.rms_norm_eps);
  EXPECT_EQ(b.bos_token, a.bos_token);
  EXPECT_EQ(b.eos_tokens, a.eos_tokens);
  const json tokenizer = json::parse(reader->tokenizer().tokenizer_json);
  EXPECT_EQ(tokenizer["model"]["vocab"].size(), 320u);
  EXPECT_FALSE(reader->tokenizer().gguf.has_value());
}

// Row J5 of the fault matrix: it becomes the error of a job.
TEST_F(ArtifactTest, AFolderThatCannotBeMadeIsNotToldWhere) {
  const absl::Status refused =
      ArtifactWriter::Create(artifact() + "/absent/model", *Source()).status();
  EXPECT_THAT(refused,
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("the artifact's directory")));
  EXPECT_THAT(refused.message(), ::testing::Not(HasSubstr("/")));
}

TEST_F(ArtifactTest, NeedsEveryTensorOnce) {
  const auto source = Source();
  ASSERT_OK_AND_ASSIGN(const auto writer, ArtifactWriter::Create(artifact(), *source));
  EXPECT_THAT(writer->Finish(QuantizationConfig(4, 32), Report(4, 32), 1),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("'model.embed_tokens.weight' was not written")));
  const Matrix norm(1, 64);
  ASSERT_OK(writer->WriteDense("model.norm.weight", norm, true));
  EXPECT_THAT(writer->WriteDense("model.norm.weight", norm, true),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("was written already")));
}

TEST_F(ArtifactTest, RefusesToWriteWhatIsNotFinite) {
  const auto source = Source();
  ASSERT_OK_AND_ASSIGN(const auto writer, ArtifactWriter::Create(artifact(), *source));
  Matrix norm(1, 64);
  norm(0, 5) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(writer->WriteDense("model.norm.weight", norm, true),
              StatusIs(kDataLoss, HasSubstr("tensor 'model.norm.weight' is nan at element 5")));
  Matrix large(1, 64);
  large(0, 7) = std::numeric_limits<float>::max();  // rounds to infinity in BF16
  EXPECT_THAT(writer->WriteDense("model.layers.0.input_layernorm.weight", large, true),
              StatusIs(kDataLoss, HasSubstr("at element 7, must be finite in BF16")));
  QuantizedMatrix bad = RoundToNearest(*source->Read("model.layers.0.mlp.up_proj.weight"), 4, 32);
  bad.codes[0] = 16;
  EXPECT_THAT(writer->WriteQuantized("model.layers.0.mlp.up_proj", bad),
              StatusIs(kInvalid, HasSubstr("linear 'model.layers.0.mlp.up_proj': a code is 16")));
}

TEST_F(ArtifactTest, RefusesAPackedLinearThatDoesNotFit) {
  const auto source = Source();
  ASSERT_OK_AND_ASSIGN(const auto writer, ArtifactWriter::Create(artifact(), *source));
  const std::string name = "model.layers.0.mlp.up_proj";  // [128, 64]
  const PackedTensors good = Pack(RoundToNearest(*source->Read(name + ".weight"), 4, 32));
  const auto expect = [&](const PackedTensors& bad, absl::StatusCode code,
                          const std::string& message) {
    EXPECT_THAT(writer->WritePacked(name, bad),
                StatusIs(code, HasSubstr("linear '" + name + "': " + message)));
  };
  expect({}, kInvalid, "0 bits, must be 2, 3, 4 or 8");
  PackedTensors bad = good;
  bad.bits = 5;
  expect(bad, kInvalid, "5 bits");
  bad = good;
  bad.rows = 120;
  expect(bad, kInvalid, "a matrix of 120 outputs and 64 inputs: both must be multiples of 32");
  bad = good;
  bad.group_size = 0;
  expect(bad, kInvalid, "groups of 0 do not divide 64 inputs");
  bad = good;
  bad.group_size = 48;
  expect(bad, kInvalid, "groups of 48 do not divide 64 inputs");
  bad = good;
  bad.qweight.pop_back();
  expect(bad, kInvalid, "qweight has 1023 values, its shape [8, 128] 1024");
  bad = good;
  bad.qzeros.push_back(0);
  expect(bad, kInvalid, "qzeros has 33 values, its shape [2, 16] 32");
  bad = good;
  bad.group_size = 64;
  expect(bad, kInvalid, "qzeros has 32 values, its shape [1, 16] 16");
  bad = good;
  bad.scales.clear();
  expect(bad, kInvalid, "scales has 0 values, its shape [2, 128] 256");
  bad = good;
  bad.scales[130] = 0x7c00;
  expect(bad, kDataLoss, "the scale at [1, 2] is inf, must be finite");
  // Nothing of those was written.
  EXPECT_EQ(writer->bytes_written(), 0);
  EXPECT_OK(writer->WritePacked(name, good));
  EXPECT_THAT(writer->WritePacked(name, good),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("was written already")));
}

TEST_F(ArtifactTest, ARecordingIsWrittenAgainToTheSameBytes) {
  const auto source = Source();
  const std::string linear = "model.layers.0.mlp.up_proj";
  RecordedTensors recording;
  ASSERT_OK_AND_ASSIGN(const auto first, ArtifactWriter::Create(artifact(), *source));
  first->Record(&recording);
  ASSERT_OK(
      first->WriteQuantized(linear, RoundToNearest(*source->Read(linear + ".weight"), 4, 32)));
  ASSERT_OK(first->WriteDense("model.norm.weight", *source->Read("model.norm.weight"), true));
  first->Record(nullptr);
  ASSERT_OK(first->WriteDense("lm_head.weight", *source->Read("lm_head.weight"), false));
  ASSERT_EQ(recording.entries.size(), 5);

  ASSERT_OK_AND_ASSIGN(const auto second, ArtifactWriter::Create(artifact() + "-2", *source));
  RecordedTensors again;
  second->Record(&again);
  ASSERT_OK(second->WriteRecorded(recording));
  EXPECT_EQ(again.bytes, recording.bytes);
  EXPECT_EQ(second->bytes_written(), static_cast<int64_t>(recording.bytes.size()));

  RecordedTensors bad = recording;
  bad.bytes.push_back('x');
  ASSERT_OK_AND_ASSIGN(const auto third, ArtifactWriter::Create(artifact() + "-3", *source));
  EXPECT_THAT(third->WriteRecorded(bad), StatusIs(kInvalid, HasSubstr("1 bytes beyond")));
  bad.bytes.resize(recording.bytes.size() - 1);
  ASSERT_OK_AND_ASSIGN(const auto fourth, ArtifactWriter::Create(artifact() + "-4", *source));
  EXPECT_THAT(fourth->WriteRecorded(bad),
              StatusIs(kInvalid, HasSubstr("bytes left for tensor 'model.norm.weight'")));
}

TEST_F(ArtifactTest, RefusesBf16ThatDoesNotFit) {
  const auto source = Source();
  ASSERT_OK_AND_ASSIGN(const auto writer, ArtifactWriter::Create(artifact(), *source));
  const Bf16Matrix good{.rows = 1, .cols = 64, .values = UninitializedVector<uint16_t>(64, 0x3f80)};
  const auto expect = [&](const Bf16Matrix& bad, absl::StatusCode code, const char* message) {
    EXPECT_THAT(writer->WriteBf16("model.norm.weight", bad, true),
                StatusIs(code, HasSubstr(message)));
  };
  Bf16Matrix bad = good;
  bad.values.pop_back();
  expect(bad, kInvalid, "tensor 'model.norm.weight' has 63 values, its shape [1, 64] 64");
  bad = good;
  bad.rows = -1;
  bad.cols = -64;
  expect(bad, kInvalid, "its shape [-1, -64]");
  bad = good;
  bad.values[9] = 0xff80;
  expect(bad, kDataLoss, "tensor 'model.norm.weight' is -inf at element 9, must be finite in BF16");
  EXPECT_EQ(writer->bytes_written(), 0);
  EXPECT_OK(writer->WriteBf16("model.norm.weight", good, true));
  EXPECT_THAT(writer->WriteBf16("model.norm.weight", good, true),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("was written already")));
}

TEST_F(ArtifactTest, NeedsAFreshDirectory) {
  const auto source = Source();
  fs::create_directories(artifact());
  EXPECT_THAT(ArtifactWriter::Create(artifact(), *source),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("'artifact' exists already")));
}

TEST_F(ArtifactTest, ReplacesAMemberOfTheReport) {
  const auto source = Source();
  ASSERT_OK_AND_ASSIGN(const ArtifactInfo before, WriteArtifact(*source, artifact(), {}));
  EXPECT_EQ(before.perplexity_after, 0.0);
  ASSERT_OK(ReplaceReportMember(artifact(), "quality",
                                {{"perplexity_before", 10.5}, {"perplexity_after", 11.25}}));
  ASSERT_OK_AND_ASSIGN(const ArtifactInfo after, ArtifactReader::ReadInfo(artifact()));
  EXPECT_EQ(after.perplexity_before, 10.5);
  EXPECT_EQ(after.perplexity_after, 11.25);
  EXPECT_NE(after.sha256, before.sha256);
  EXPECT_OK(ArtifactReader::Open(artifact(), true, 1));
}

// Every byte of an artifact is covered: whichever changes, nothing loads.
TEST_F(ArtifactTest, NoFlippedByteLoads) {
  const auto source =
      Source({.hidden = 32, .intermediate = 32, .n_heads = 1, .n_kv_heads = 1, .head_dim = 32});
  ASSERT_OK(WriteArtifact(*source, artifact(), {.shard_bytes_max = 20000}));
  ASSERT_OK(ArtifactReader::Open(artifact(), true, 1));
  std::vector<std::string> paths;
  for (const auto& entry : fs::directory_iterator(artifact())) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::mt19937_64 random(20250503);
  for (int i = 0; i < 1000; ++i) {
    // Files in turn, so that the small ones get their share.
    const std::string& path = paths[static_cast<size_t>(i) % paths.size()];
    const std::string good = ReadAll(path);
    std::string bad = good;
    const size_t at = random() % bad.size();
    bad[at] = static_cast<char>(bad[at] ^ static_cast<char>(1 + random() % 255));
    WriteFile(path, bad);
    const auto reader = ArtifactReader::Open(artifact(), true, 1);
    ASSERT_FALSE(reader.ok()) << path << " byte " << at;
    WriteFile(path, good);
  }
  EXPECT_OK(ArtifactReader::Open(artifact(), true, 1));
}

TEST_F(ArtifactTest, NoTruncatedFileLoads) {
  const auto source = Source();
  ASSERT_OK(WriteArtifact(*source, artifact(), {}));
  for (const auto& [name, contents] : Contents(artifact())) {
    const std::string path = artifact() + "/" + name;
    for (const size_t n : {size_t{0}, contents.size() / 2, contents.size() - 1}) {
      WriteFile(path, contents.substr(0, n));
      EXPECT_FALSE(ArtifactReader::Open(artifact(), false, 1).ok()) << name << " " << n;
    }
    fs::remove(path);
    EXPECT_FALSE(ArtifactReader::Open(artifact(), false, 1).ok()) << name;
    WriteFile(path, contents);
  }
  EXPECT_OK(ArtifactReader::Open(artifact(), true, 1));
}

// Damage that is covered by fresh digests: what remains is the structure's own rules.
class ForgedArtifactTest : public ArtifactTest {
 protected:
  void SetUp() override {
    const auto source = Source();
    ASSERT_OK(WriteArtifact(*source, artifact(), {}));
  }
  // Rewrites one file and walsh.json to match.
  void Forge(const std::string& name, const std::string& contents) {
    WriteFile(artifact() + "/" + name, contents);
    json manifest = json::parse(ReadAll(artifact() + "/walsh.json"));
    json chunks = json::array();
    if (!contents.empty()) chunks.push_back(Sha256Hex(contents));
    manifest["files"][name] = {{"size_bytes", contents.size()}, {"sha256", chunks}};
    ForgeManifest(manifest);
  }
  void ForgeManifest(json manifest) {
    manifest.erase("digest");
    manifest["digest"] = Sha256Hex(manifest.dump(2) + "\n");
    WriteFile(artifact() + "/walsh.json", manifest.dump(2) + "\n");
  }
  json ReadJson(const std::string& name) { return json::parse(ReadAll(artifact() + "/" + name)); }
  void ExpectRefused(absl::StatusCode code, const char* message) {
    EXPECT_THAT(ArtifactReader::Open(artifact(), true, 1), StatusIs(code, HasSubstr(message)));
  }
};

TEST_F(ForgedArtifactTest, RefusesOtherQuantizationFormats) {
  const json good = ReadJson("config.json");
  const auto forge = [&](const char* field, const json& value) {
    json bad = good;
    bad["quantization_config"][field] = value;
    Forge("config.json", bad.dump());
  };
  forge("quant_method", "awq");
  ExpectRefused(kUnimplemented, "'quant_method' is \"awq\", only \"gptq\"");
  forge("checkpoint_format", "gptq");
  ExpectRefused(kUnimplemented, "'checkpoint_format' is \"gptq\", only \"gptq_v2\"");
  forge("desc_act", 1);
  ExpectRefused(kUnimplemented, "'desc_act' must be true or false");
  forge("lm_head", true);
  ExpectRefused(kUnimplemented, "'lm_head' is true");
  // With transforms at run time it is no plain GPTQ checkpoint, and must not look like one.
  const json online = json::parse(R"({"query_key": {"matrix": "walsh", "block": 16}})");
  forge("online_transforms", online);
  ExpectRefused(kUnimplemented, "'quant_method' beside online transforms");
  json marked = good;
  marked["quantization_config"].erase("quant_method");
  marked["quantization_config"]["online_transforms"] = online;
  Forge("config.json", marked.dump());
  ExpectRefused(kUnimplemented, "'checkpoint_format' is \"gptq_v2\", only \"walsh\"");
  marked["quantization_config"]["checkpoint_format"] = "walsh";
  marked["quantization_config"]["online_transforms"]["query_key"]["block"] = 24;
  Forge("config.json", marked.dump());
  ExpectRefused(kInvalid, "a block of 24 does not divide");
  json none = good;
  none.erase("quantization_config");
  Forge("config.json", none.dump());
  ExpectRefused(kInvalid, "'quantization_config' is missing");
  json tied = good;
  tied["tie_word_embeddings"] = true;
  Forge("config.json", tied.dump());
  ExpectRefused(kInvalid, "embeddings are not tied");
  Forge("config.json", good.dump());
  EXPECT_OK(ArtifactReader::Open(artifact(), true, 1));
}

// Linears whose tensors are not those of the grid that quantization_config names: whoever looks at
// one of the two only would take them for something else.
TEST_F(ArtifactTest, TensorsAgreeWithTheConfiguredGrid) {
  const auto to_codebook = [](QuantizedMatrix& matrix) {
    for (int64_t i = 0; i < matrix.rows * matrix.groups(); ++i) {
      for (const float level : {-0.5f, -0.125f, 0.25f, 1.0f}) matrix.levels.push_back(level);
    }
    matrix.scales.clear();
    matrix.zeros.clear();
  };
  const auto to_float_zeros = [](QuantizedMatrix& matrix) {
    matrix.float_zeros.assign(matrix.zeros.size(), 1.25f);
    matrix.zeros.clear();
  };
  const auto keep = [](QuantizedMatrix&) {};
  using Edit = std::function<void(QuantizedMatrix&)>;
  const std::string odd = "model.layers.1.mlp.down_proj";
  const auto source = Source();
  const auto write = [&](const char* grid, const Edit& edit, const Edit& edit_odd,
                         int odd_bits = 2) {
    fs::remove_all(artifact());
    json config = json::object();
    if (grid != nullptr) {
      config = {{"checkpoint_format", "walsh"}, {"walsh", {{"grid", grid}, {"bits", 2}}}};
    }
    ASSERT_OK(
        testing::WriteTinyArtifact(*source, artifact(),
                                   {.bits = 2,
                                    .bits_of = {{odd, odd_bits}},
                                    .quantization_config = config,
                                    .edit = [&](const std::string& name, QuantizedMatrix& matrix) {
                                      (name == odd ? edit_odd : edit)(matrix);
                                    }}));
  };
  const auto expect_refused = [&](const char* message) {
    EXPECT_THAT(ArtifactReader::Open(artifact(), true, 1),
                StatusIs(kInvalid, ::testing::AllOf(HasSubstr(odd), HasSubstr(message))));
  };
  write(nullptr, keep, to_float_zeros);
  expect_refused("has float zeros at 2 bits, quantization_config says integer zeros");
  write(nullptr, keep, to_codebook);
  expect_refused("has a codebook at 2 bits, quantization_config says integer zeros");
  write("codebook", to_codebook, keep);
  expect_refused("has integer zeros at 2 bits, quantization_config says a codebook");
  write("codebook", to_codebook, to_float_zeros, 4);
  expect_refused("has float zeros at 4 bits, quantization_config says integer zeros");
  write("float-zero", to_float_zeros, keep);
  expect_refused("has integer zeros at 2 bits, quantization_config says float zeros");
  write("float-zero", to_float_zeros, to_codebook);
  expect_refused("has a codebook at 2 bits, quantization_config says float zeros");
  for (const auto& [grid, edit, edit_odd] :
       {std::tuple<const char*, Edit, Edit>{nullptr, keep, keep},
        {"codebook", to_codebook, keep},
        {"float-zero", to_float_zeros, to_float_zeros}}) {
    write(grid, edit, edit_odd, 4);
    EXPECT_OK(ArtifactReader::Open(artifact(), true, 1));
  }
}

// The tensors of every grid as they are stored, into memory for those and no others.
TEST_F(ArtifactTest, ReadsEveryGridInItsStoredForm) {
  const std::string linear = "model.layers.0.mlp.up_proj";
  const auto source = Source();
  for (const char* grid : {"codebook", "float-zero"}) {
    SCOPED_TRACE(grid);
    fs::remove_all(artifact());
    ASSERT_OK(testing::WriteTinyArtifact(
        *source, artifact(),
        {.bits = 2,
         .quantization_config = {{"checkpoint_format", "walsh"},
                                 {"walsh", {{"grid", grid}, {"bits", 2}}}},
         .edit = [&](const std::string&, QuantizedMatrix& m) {
           if (grid == std::string("codebook")) {
             for (const float scale : m.scales) {
               for (int code = 0; code < 4; ++code) m.levels.push_back(scale * (code < 2 ? 1 : 2));
             }
             m.scales.clear();
           } else {
             for (const uint8_t zero : m.zeros) m.float_zeros.push_back(zero + 0.5f);
           }
           m.zeros.clear();
         }}));
    ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 1));
    ASSERT_OK_AND_ASSIGN(const QuantizedMatrix matrix, reader->ReadQuantized(linear));
    ASSERT_OK_AND_ASSIGN(const GptqTensors expected, PackGptq(matrix));
    GptqTensors actual;
    actual.qweight.resize(expected.qweight.size());
    actual.scales.resize(expected.scales.size());
    actual.zeros.resize(expected.zeros.size());
    actual.levels.resize(expected.levels.size());
    const PackedSpans into{.qweight = actual.qweight,
                           .scales = actual.scales,
                           .zeros = actual.zeros,
                           .levels = actual.levels};
    ASSERT_OK(reader->ReadPacked(linear, into));
    EXPECT_EQ(actual.qweight, expected.qweight);
    EXPECT_EQ(actual.scales, expected.scales);
    EXPECT_EQ(actual.zeros, expected.zeros);
    EXPECT_EQ(actual.levels, expected.levels);
    ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> order, reader->ReadInputOrder(linear));
    EXPECT_TRUE(order.empty());
    std::vector<uint32_t> zeros(32);
    PackedSpans too_much = into;
    too_much.qzeros = zeros;
    EXPECT_THAT(reader->ReadPacked(linear, too_much),
                StatusIs(kInvalid, HasSubstr("room for 32 values of qzeros")));
    PackedSpans too_little = into;
    too_little.levels = {};
    too_little.zeros = {};
    EXPECT_THAT(reader->ReadPacked(linear, too_little),
                StatusIs(kInvalid, HasSubstr("room for 0 values, it has")));
  }
}

TEST_F(ForgedArtifactTest, RefusesGridsThatItDoesNotKnow) {
  const json good = ReadJson("config.json");
  for (const auto& [value, message] :
       {std::pair("{}", "only an object of 'grid' and 'bits'"),
        std::pair("null", "only an object of 'grid' and 'bits'"),
        std::pair(R"(["codebook", 2])", "only an object of 'grid' and 'bits'"),
        std::pair(R"({"grid": "codebook"})", "only an object of 'grid' and 'bits'"),
        std::pair(R"({"grid": "codebook", "bits": 2, "levels": 16})",
                  "only an object of 'grid' and 'bits'"),
        std::pair(R"({"grid": "nf4", "bits": 4})", "only the grids codebook and float-zero"),
        std::pair(R"({"grid": 2, "bits": 2})", "only the grids codebook and float-zero"),
        std::pair(R"({"grid": "codebook", "bits": 4})", "a codebook is of 2 bits"),
        std::pair(R"({"grid": "float-zero", "bits": 5})", "bits must be 2, 3, 4 or 8"),
        std::pair(R"({"grid": "float-zero", "bits": "4"})", "bits must be 2, 3, 4 or 8")}) {
    json bad = good;
    bad["quantization_config"]["walsh"] = json::parse(value);
    bad["quantization_config"]["checkpoint_format"] = "walsh";
    Forge("config.json", bad.dump());
    ExpectRefused(kUnimplemented, message);
  }
  json marked = good;
  marked["quantization_config"]["walsh"] = {{"grid", "float-zero"}, {"bits", 4}};
  Forge("config.json", marked.dump());
  ExpectRefused(kUnimplemented, "'checkpoint_format' is \"gptq_v2\", only \"walsh\"");
  json plain = good;
  plain["quantization_config"]["checkpoint_format"] = "walsh";
  Forge("config.json", plain.dump());
  ExpectRefused(kUnimplemented, "'checkpoint_format' is \"walsh\", only \"gptq_v2\"");
}

// Which of two grids a linear has is not for the reader to guess.
TEST_F(ForgedArtifactTest, RefusesTheTensorsOfTwoGrids) {
  const std::string shard = "model-00001-of-00001.safetensors";
  const std::string good = ReadAll(artifact() + "/" + shard);
  const json good_index = ReadJson("model.safetensors.index.json");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, good.data(), 8);
  const json header = json::parse(good.substr(8, header_bytes));
  const std::string linear = "model.layers.0.self_attn.q_proj";
  // Another tensor gets the name of one that this linear must not have.
  const auto rename = [](json& object, const std::string& from, const std::string& to) {
    object[to] = object[from];
    object.erase(from);
  };
  const auto expect = [&](std::vector<const char*> added, const char* message) {
    json names = header;
    json index = good_index;
    const char* spare[] = {"model.norm.weight", "lm_head.weight"};
    for (size_t i = 0; i < added.size(); ++i) {
      rename(names, spare[i], linear + added[i]);
      rename(index["weight_map"], spare[i], linear + added[i]);
    }
    std::string text = names.dump();
    ASSERT_LE(text.size(), header_bytes);
    text.resize(header_bytes, ' ');
    Forge(shard, good.substr(0, 8) + text + good.substr(8 + header_bytes));
    Forge("model.safetensors.index.json", index.dump());
    ExpectRefused(kInvalid, message);
  };
  expect({".zeros"}, "linear 'model.layers.0.self_attn.q_proj' has qzeros beside zeros");
  expect({".levels"}, "linear 'model.layers.0.self_attn.q_proj' has scales beside levels");
  expect({".levels", ".zeros"}, "q_proj' has qzeros beside zeros");
}

// Changes one tensor's entry in the header of the only shard, keeping its length.
TEST_F(ForgedArtifactTest, RefusesTensorsOfTheWrongForm) {
  const std::string shard = "model-00001-of-00001.safetensors";
  const std::string good = ReadAll(artifact() + "/" + shard);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, good.data(), 8);
  const json header = json::parse(good.substr(8, header_bytes));
  const std::string linear = "model.layers.0.mlp.up_proj";
  const auto forge = [&](const std::string& tensor, const char* member, const json& value) {
    json bad = header;
    bad[tensor][member] = value;
    std::string text = bad.dump();
    text.resize(header_bytes, ' ');
    Forge(shard, good.substr(0, 8) + text + good.substr(8 + header_bytes));
  };
  forge(linear + ".qweight", "dtype", "U32");
  ExpectRefused(kInvalid,
                "tensor 'model.layers.0.mlp.up_proj.qweight' is U32 [8, 128], expected "
                "I32 [8, 128]");
  forge(linear + ".qweight", "shape", {16, 64});
  ExpectRefused(kInvalid, "tensor 'model.layers.0.mlp.up_proj.qweight' is I32 [16, 64]");
  forge(linear + ".qweight", "shape", {1024, 1});
  ExpectRefused(kInvalid, "which no width of 64 inputs gives");
  forge(linear + ".qzeros", "shape", {32, 1});
  ExpectRefused(kInvalid, "tensor 'model.layers.0.mlp.up_proj.qzeros'");
  forge(linear + ".scales", "shape", {256, 1});
  ExpectRefused(kInvalid, "256 groups do not divide 64 inputs");
  forge(linear + ".scales", "shape", {4, 64});
  ExpectRefused(kInvalid, "expected I32 [4, 16]");
  forge(linear + ".scales", "dtype", "BF16");
  ExpectRefused(kInvalid, "is BF16 [2, 128], expected F16 [2, 128]");
  forge(linear + ".g_idx", "shape", {32, 2});
  ExpectRefused(kInvalid, "tensor 'model.layers.0.mlp.up_proj.g_idx'");
  forge("model.norm.weight", "dtype", "F16");
  ExpectRefused(kInvalid, "tensor 'model.norm.weight' is F16 [64], expected BF16 [64]");
  forge("model.embed_tokens.weight", "shape", {160, 128});
  ExpectRefused(kInvalid, "tensor 'model.embed_tokens.weight' is BF16 [160, 128]");

  // Tensors that fit each other, and another configuration.
  Forge(shard, good);
  const std::string config = ReadAll(artifact() + "/config.json");
  for (const auto& [field, value] :
       {std::pair("intermediate_size", 96), std::pair("num_key_value_heads", 4)}) {
    json other = json::parse(config);
    other[field] = value;
    Forge("config.json", other.dump());
    ExpectRefused(kInvalid, "expected");
  }
  Forge("config.json", config);

  // Values: columns out of order, a scale that is not finite.
  const auto data_of = [&](const std::string& tensor) {
    return 8 + header_bytes + header[tensor]["data_offsets"][0].get<size_t>();
  };
  std::string order = good;
  order[data_of(linear + ".g_idx")] = '\1';
  Forge(shard, order);
  {
    ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 1));
    const auto out_of_order = StatusIs(
        kUnimplemented, HasSubstr("'model.layers.0.mlp.up_proj.g_idx' is 1 at [0], expected 0"));
    EXPECT_THAT(reader->ReadQuantized(linear), out_of_order);
    EXPECT_THAT(ReadPacked(*reader, linear), out_of_order);
  }
  std::string infinite = good;
  infinite[data_of(linear + ".scales")] = '\0';
  infinite[data_of(linear + ".scales") + 1] = '\x7c';
  // The same for a value of a dense tensor: row 2, column 3.
  infinite[data_of("model.embed_tokens.weight") + 2 * (2 * 64 + 3)] = '\x80';
  infinite[data_of("model.embed_tokens.weight") + 2 * (2 * 64 + 3) + 1] = '\x7f';
  infinite[data_of("model.norm.weight") + 2 * 5] = '\xc0';
  infinite[data_of("model.norm.weight") + 2 * 5 + 1] = '\x7f';
  Forge(shard, infinite);
  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 1));
  const auto infinite_scale = StatusIs(
      kDataLoss, HasSubstr("linear 'model.layers.0.mlp.up_proj': the scale at [0, 0] is inf"));
  EXPECT_THAT(reader->ReadQuantized(linear), infinite_scale);
  EXPECT_THAT(ReadPacked(*reader, linear), infinite_scale);
  const auto infinite_weight = StatusIs(
      kDataLoss, HasSubstr(shard + ": tensor 'model.embed_tokens.weight' is inf at [2, 3]"));
  EXPECT_THAT(reader->ReadDense("model.embed_tokens.weight"), infinite_weight);
  const std::string embedding = "model.embed_tokens.weight";
  EXPECT_THAT(ReadBf16(*reader, embedding, 320, 64), infinite_weight);
  // Rows are counted from the tensor's first, and those without it are read.
  std::vector<uint16_t> rows(size_t{2} * 64);
  EXPECT_THAT(reader->ReadBf16(embedding, 1, 2, rows), infinite_weight);
  EXPECT_OK(reader->ReadBf16(embedding, 3, 2, rows));
  const auto nan_in_vector =
      StatusIs(kDataLoss, HasSubstr(shard + ": tensor 'model.norm.weight' is nan at [5]"));
  EXPECT_THAT(reader->ReadDense("model.norm.weight"), nan_in_vector);
  EXPECT_THAT(ReadBf16(*reader, "model.norm.weight", 1, 64), nan_in_vector);
}

// What a list of models shows beside the bits.
TEST_F(ForgedArtifactTest, TellsWhatBitsAloneDoNot) {
  json manifest = ReadJson("walsh.json");
  ASSERT_OK_AND_ASSIGN(ArtifactInfo info, ArtifactReader::ReadInfo(artifact()));
  EXPECT_EQ(info.grid, "uniform");
  EXPECT_EQ(info.activation_bits, 0);
  EXPECT_EQ(info.kv_cache_bits, 0);
  EXPECT_EQ(info.bits_per_weight, 0);
  EXPECT_TRUE(info.override_bits.empty());
  manifest["quantization"]["bits"] = 2;
  manifest["quantization"]["bits_per_weight"] = 2.75;
  manifest["quantization"]["grid"] = "codebook";
  manifest["quantization"]["overrides"] = json::parse(
      R"([{"pattern": "a*", "bits": 8}, {"pattern": "b*", "bits": 4}, {"pattern": "c*", "bits": 4},
          {"pattern": "d*", "bits": 2}, {"pattern": "e*", "bits": 4294967298}, 4, {}])");
  manifest["online_transforms"] =
      json::parse(R"({"activations": {"bits": 4}, "kv_cache": {"bits": 2}})");
  ForgeManifest(manifest);
  ASSERT_OK_AND_ASSIGN(info, ArtifactReader::ReadInfo(artifact()));
  EXPECT_EQ(info.bits, 2);
  EXPECT_EQ(info.bits_per_weight, 2.75);
  EXPECT_EQ(info.grid, "codebook");
  EXPECT_EQ(info.override_bits, (std::vector<int>{4, 8}));
  EXPECT_EQ(info.activation_bits, 4);
  EXPECT_EQ(info.kv_cache_bits, 2);
  manifest["quantization"].erase("grid");
  manifest["quantization"]["zero_point"] = "float";
  manifest["quantization"]["overrides"] = "4";
  manifest["online_transforms"] = 4;
  ForgeManifest(manifest);
  ASSERT_OK_AND_ASSIGN(info, ArtifactReader::ReadInfo(artifact()));
  EXPECT_EQ(info.grid, "float-zero");
  EXPECT_TRUE(info.override_bits.empty());
  EXPECT_EQ(info.activation_bits, 0);
}

TEST_F(ForgedArtifactTest, RefusesBadManifests) {
  const json good = ReadJson("walsh.json");
  const auto expect = [&](const json& manifest, absl::StatusCode code, const char* message) {
    ForgeManifest(manifest);
    ExpectRefused(code, message);
    EXPECT_EQ(ArtifactReader::Open(artifact(), false, 1).status().code(), code);
  };
  json bad = good;
  bad["format_version"] = 2;
  expect(bad, kUnimplemented, "format version 2, this walsh reads 1");
  bad = good;
  bad.erase("format_version");
  expect(bad, kInvalid, "'format_version' is missing");
  bad = good;
  bad.erase("files");
  expect(bad, kInvalid, "'files' is missing");
  bad = good;
  bad["files"]["../config.json"] = bad["files"]["config.json"];
  expect(bad, kInvalid, "no plain file name: '../config.json'");
  bad = good;
  bad["files"]["walsh.json"] = bad["files"]["config.json"];
  expect(bad, kInvalid, "no plain file name: 'walsh.json'");
  bad = good;
  bad["files"]["absent.json"] = bad["files"]["config.json"];
  expect(bad, kDataLoss, "lists absent.json, which is missing");
  bad = good;
  bad["files"].erase("config.json");
  expect(bad, kInvalid, "does not list config.json");
  bad = good;
  bad["files"].erase("model-00001-of-00001.safetensors");
  expect(bad, kInvalid, "lists 0 weight files, model.safetensors.index.json 1");
  bad = good;
  bad["files"]["config.json"]["size_bytes"] = uint64_t{1} << 62;
  expect(bad, kInvalid, "bytes, at most 1099511627776");
  bad = good;
  bad["files"]["config.json"]["size_bytes"] = -1;
  expect(bad, kInvalid, "file 'config.json' has no size_bytes");
  bad = good;
  bad["files"]["config.json"]["sha256"] = json::array();
  expect(bad, kInvalid, "has 0 digests");
  bad = good;
  bad["files"]["config.json"]["sha256"][0] = "ABC";
  expect(bad, kInvalid, "has a malformed digest");
  bad = good;
  bad["quantization"]["bits"] = 5;
  expect(bad, kInvalid, "'quantization.bits' must be 2, 3, 4 or 8");
  bad = good;
  bad["quantization"]["group_size"] = 0;
  expect(bad, kInvalid, "'quantization.group_size' must be");
  // What a narrower integer would wrap to values that are right: 2 bits, a group of a channel.
  bad = good;
  bad["quantization"]["bits"] = (int64_t{1} << 32) + 2;
  expect(bad, kInvalid, "'quantization.bits' must be 2, 3, 4 or 8");
  bad = good;
  bad["quantization"]["group_size"] = std::numeric_limits<uint64_t>::max();
  expect(bad, kInvalid, "'quantization.group_size' must be");
  bad["quantization"]["group_size"] = (int64_t{1} << 32) + 32;
  expect(bad, kInvalid, "'quantization.group_size' must be");
  bad = good;
  bad["rotation"]["block"] = (int64_t{1} << 32) + 64;
  expect(bad, kInvalid, "'rotation.block' must be 0 to 131072");
  bad["rotation"]["block"] = -16;
  expect(bad, kInvalid, "'rotation.block' must be 0 to 131072");

  WriteFile(artifact() + "/walsh.json", good.dump(2));  // one newline short of the one spelling
  ExpectRefused(kDataLoss, "not in canonical form");
  bad = good;
  bad["seed"] = 99;  // under the old digest
  WriteFile(artifact() + "/walsh.json", bad.dump(2) + "\n");
  ExpectRefused(kDataLoss, "differ from its own digest");
  bad.erase("digest");
  WriteFile(artifact() + "/walsh.json", bad.dump(2) + "\n");
  ExpectRefused(kInvalid, "'digest' is missing");
  fs::remove(artifact() + "/walsh.json");
  ExpectRefused(absl::StatusCode::kNotFound, "'artifact' is no artifact: it has no walsh.json");
}

// walsh.json says it for people and tools, config.json for the forward pass.
TEST_F(ForgedArtifactTest, RefusesTwoAccountsOfItsTransforms) {
  const json online = json::parse(R"({"query_key": {"matrix": "walsh", "block": 16}})");
  json config = ReadJson("config.json");
  config["quantization_config"].erase("quant_method");
  config["quantization_config"]["checkpoint_format"] = "walsh";
  config["quantization_config"]["online_transforms"] = online;
  Forge("config.json", config.dump());
  json manifest = ReadJson("walsh.json");
  EXPECT_OK(ArtifactReader::Open(artifact(), true, 1)) << "an imported one need not repeat them";
  manifest["online_transforms"] = online;
  ForgeManifest(manifest);
  EXPECT_OK(ArtifactReader::Open(artifact(), true, 1));
  for (const char* other :
       {"{}", "null", R"({"query_key": {"matrix": "hadamard", "block": 16}})"}) {
    manifest["online_transforms"] = json::parse(other);
    ForgeManifest(manifest);
    ExpectRefused(kDataLoss, "walsh.json: online_transforms is");
  }
  manifest["online_transforms"] = online;
  ForgeManifest(manifest);
  config["quantization_config"].erase("online_transforms");
  config["quantization_config"]["quant_method"] = "gptq";
  config["quantization_config"]["checkpoint_format"] = "gptq_v2";
  Forge("config.json", config.dump());
  ExpectRefused(kDataLoss, "config.json has {}");
}

TEST_F(ForgedArtifactTest, RefusesShardsThatTheIndexDoesNotDescribe) {
  json index = ReadJson("model.safetensors.index.json");
  index["weight_map"].erase("model.norm.weight");
  Forge("model.safetensors.index.json", index.dump());
  ExpectRefused(kInvalid, "tensor 'model.norm.weight' is not listed in");
}

TEST_F(ForgedArtifactTest, NoticesAShardThatChangesAfterOpening) {
  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 1));
  ASSERT_OK(reader->ReadQuantized("model.layers.0.mlp.up_proj"));
  const std::string shard = artifact() + "/model-00001-of-00001.safetensors";
  fs::resize_file(shard, fs::file_size(shard) - 1);
  EXPECT_THAT(reader->ReadQuantized("model.layers.0.mlp.up_proj"), HasCode(kDataLoss));
  EXPECT_THAT(ReadPacked(*reader, "model.layers.0.mlp.up_proj"), HasCode(kDataLoss));
  EXPECT_THAT(ReadBf16(*reader, "model.norm.weight", 1, 64), HasCode(kDataLoss));
}

// The files that readers of other projects look for, and no others.
TEST_F(ArtifactTest, HoldsExactlyItsFiles) {
  const auto source = Source();
  ASSERT_OK(WriteArtifact(*source, artifact(), {}));
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(artifact())) {
    names.push_back(entry.path().filename());
  }
  EXPECT_THAT(names, UnorderedElementsAre("config.json", "model-00001-of-00001.safetensors",
                                          "model.safetensors.index.json", "tokenizer.json",
                                          "tokenizer_config.json", "walsh.json"));
}

}  // namespace
}  // namespace walsh
