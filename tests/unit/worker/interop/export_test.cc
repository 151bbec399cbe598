#include "worker/interop/export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "tests/unit/worker/interop/export_golden.h"
#include "tests/unit/worker/interop/logits_of.h"
#include "worker/io/expected_tensors.h"
#include "worker/io/gguf.h"
#include "worker/io/gptq_packing.h"
#include "worker/io/safetensors.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::interop {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::_;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using walsh::testing::StatusIs;
using walsh::testing::TinyArtifactOptions;
using walsh::testing::TinyModel;
using walsh::testing::TinyModelOptions;
using walsh::testing::WriteTinyArtifact;

constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
constexpr char kDown[] = "model.layers.0.mlp.down_proj";
constexpr char kQuery[] = "model.layers.0.self_attn.q_proj";

absl::Status GoOn(int64_t, int64_t) { return absl::OkStatus(); }

std::string ReadAll(const fs::path& path) {
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

struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

// Of all shards of a directory.
std::map<std::string, Tensor> Tensors(const std::string& directory) {
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, contents] : Contents(directory)) {
    if (!name.ends_with(".safetensors")) continue;
    const auto file = MemoryFile(name, std::as_bytes(std::span(contents)));
    const auto entries = ParseSafetensors(*file);
    EXPECT_OK(entries);
    if (!entries.ok()) continue;
    for (const SafetensorsEntry& entry : *entries) {
      tensors[entry.name] = {entry.dtype, entry.shape,
                             contents.substr(static_cast<size_t>(entry.offset),
                                             static_cast<size_t>(entry.size_bytes))};
    }
  }
  return tensors;
}

class ExportTest : public ::testing::Test {
 protected:
  // An artifact of a tiny model, opened.
  void MakeArtifact(const TinyArtifactOptions& options, const TinyModelOptions& model = {}) {
    TinyModel(model).WriteHf(dir_ / "source");
    ASSERT_OK_AND_ASSIGN(const auto source, Checkpoint::Open(dir_ / "source"));
    ASSERT_OK(WriteTinyArtifact(*source, dir_ / "artifact", options));
    ASSERT_OK_AND_ASSIGN(artifact_, ArtifactReader::Open(dir_ / "artifact", true, 2));
  }

  absl::StatusOr<ExportReport> Export(ExportFormat format, ExportOptions options = {},
                                      const std::string& name = "export") {
    options.format = format;
    options.model_name = "tiny";
    fs::remove_all(out(name));
    fs::create_directory(out(name));
    return ExportArtifact(*artifact_, options, out(name), GoOn);
  }

  std::string out(const std::string& name = "export") const { return dir_ / name; }
  json Config() const { return json::parse(ReadAll(out() + "/config.json")); }

  // Every tensor of the checkpoint is what the artifact stands for.
  void ExpectSameWeights(const Checkpoint& exported) {
    for (const ExpectedTensor& tensor : ExpectedTensors(artifact_->config())) {
      const std::string linear = tensor.name.substr(0, tensor.name.rfind('.'));
      ASSERT_OK_AND_ASSIGN(const Matrix actual, exported.Read(tensor.name));
      Matrix expected;
      if (!tensor.is_one_dimensional && artifact_->IsQuantized(linear)) {
        ASSERT_OK_AND_ASSIGN(const QuantizedMatrix matrix, artifact_->ReadQuantized(linear));
        expected = Dequantize(matrix);
      } else {
        ASSERT_OK_AND_ASSIGN(expected, artifact_->ReadDense(tensor.name));
      }
      ASSERT_EQ(actual.size(), expected.size()) << tensor.name;
      EXPECT_TRUE(std::ranges::equal(actual.span(), expected.span())) << tensor.name;
    }
  }

  testing::TempDir dir_;
  std::unique_ptr<ArtifactReader> artifact_;
};

// The golden matrix of that width in the place of a linear of its shape.
TinyArtifactOptions WithGolden(int bits, const std::string& linear, bool symmetric = false) {
  return {.bits = bits,
          .group_size = 64,
          .symmetric = symmetric,
          .edit = [=](const std::string& name, QuantizedMatrix& matrix) {
            // Version 1 of GPTQ has no zero of 0.
            for (uint8_t& zero : matrix.zeros) zero = std::max<uint8_t>(zero, 1);
            if (name != linear) return;
            for (const ExportGolden& golden : ReadExportGoldens()) {
              if (golden.matrix.bits != bits || golden.matrix.rows != matrix.rows ||
                  golden.matrix.cols != matrix.cols) {
                continue;
              }
              matrix = golden.matrix;
              return;
            }
            ADD_FAILURE() << "no golden matrix for " << name;
          }};
}

ExportGolden GoldenOf(int bits) {
  for (const ExportGolden& golden : ReadExportGoldens()) {
    if (golden.matrix.bits == bits && golden.matrix.rows == 64) return golden;
  }
  ADD_FAILURE() << "no golden matrix of " << bits << " bits";
  return {};
}

TEST_F(ExportTest, DequantizedIsAPlainCheckpoint) {
  MakeArtifact({.bits = 3, .group_size = 32}, {.has_attention_bias = true});
  ASSERT_OK_AND_ASSIGN(const ExportReport report,
                       Export(ExportFormat::kDequantized, {.dtype = StorageType::kF32}));
  EXPECT_THAT(report.files, Contains("model-00001-of-00001.safetensors"));
  EXPECT_THAT(report.files, Contains("tokenizer.json"));
  EXPECT_THAT(report.files, Contains("walsh-export.json"));
  EXPECT_THAT(report.files, Not(Contains("walsh.json")));
  EXPECT_THAT(report.warnings, IsEmpty());
  int64_t bytes = 0;
  for (const auto& [name, contents] : Contents(out())) {
    bytes += static_cast<int64_t>(contents.size());
  }
  EXPECT_EQ(report.size_bytes, bytes);
  EXPECT_LE(bytes, ExportBytesMax(artifact_->config(), {.dtype = StorageType::kF32}));
  EXPECT_FALSE(Config().contains("quantization_config"));
  EXPECT_EQ(Config()["torch_dtype"], "float32");
  EXPECT_EQ(Config()["tie_word_embeddings"], false);
  ASSERT_OK_AND_ASSIGN(const auto exported, Checkpoint::Open(out()));
  EXPECT_EQ(exported->format(), "safetensors F32");
  ExpectSameWeights(*exported);
  ExpectSameLogits(*exported, dir_ / "artifact");
}

TEST_F(ExportTest, DequantizedRoundsToSixteenBits) {
  MakeArtifact({.bits = 8, .group_size = -1});
  for (const auto& [dtype, name, torch] :
       {std::tuple(StorageType::kBf16, "safetensors BF16", "bfloat16"),
        std::tuple(StorageType::kF16, "safetensors F16", "float16")}) {
    ASSERT_OK(Export(ExportFormat::kDequantized, {.dtype = dtype}));
    EXPECT_EQ(Config()["torch_dtype"], torch);
    ASSERT_OK_AND_ASSIGN(const auto exported, Checkpoint::Open(out()));
    EXPECT_EQ(exported->format(), name);
    ASSERT_OK_AND_ASSIGN(const Matrix actual, exported->Read(std::string(kDown) + ".weight"));
    ASSERT_OK_AND_ASSIGN(const QuantizedMatrix matrix, artifact_->ReadQuantized(kDown));
    const Matrix expected = Dequantize(matrix);
    for (int64_t i = 0; i < expected.size(); ++i) {
      const float value = expected.data()[i];
      const float rounded = dtype == StorageType::kF16 ? HalfToFloat(FloatToHalf(value))
                                                       : Bf16ToFloat(FloatToBf16(value));
      ASSERT_EQ(actual.data()[i], rounded) << i;
    }
  }
}

TEST_F(ExportTest, DequantizedIsShardedWithAnIndex) {
  MakeArtifact({});
  ASSERT_OK_AND_ASSIGN(
      const ExportReport report,
      Export(ExportFormat::kDequantized, {.dtype = StorageType::kF32, .shard_bytes_max = 100'000}));
  EXPECT_THAT(report.files, Contains("model.safetensors.index.json"));
  EXPECT_THAT(report.files, Contains("model-00002-of-00005.safetensors"));
  ASSERT_OK_AND_ASSIGN(const auto exported, Checkpoint::Open(out()));
  ExpectSameWeights(*exported);
}

TEST_F(ExportTest, GptqV2HasTheArtifactsOwnTensors) {
  MakeArtifact({.bits = 2, .group_size = 32});
  ASSERT_OK(Export(ExportFormat::kGptqV2));
  const auto expected = Tensors(dir_ / "artifact");
  const auto actual = Tensors(out());
  ASSERT_EQ(actual.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(actual.contains(name)) << name;
    EXPECT_EQ(actual.at(name).dtype, tensor.dtype) << name;
    EXPECT_EQ(actual.at(name).shape, tensor.shape) << name;
    EXPECT_EQ(actual.at(name).bytes, tensor.bytes) << name;
  }
  const json quantization = Config()["quantization_config"];
  EXPECT_EQ(quantization["checkpoint_format"], "gptq_v2");
  EXPECT_EQ(quantization["bits"], 2);
  EXPECT_FALSE(quantization.contains("dynamic"));
}

TEST_F(ExportTest, GptqTellsLinearsOfOtherWidths) {
  MakeArtifact({.bits = 4, .bits_of = {{kDown, 8}, {kQuery, 0}}});
  ASSERT_OK(Export(ExportFormat::kGptqV2));
  EXPECT_EQ(Config()["quantization_config"]["dynamic"],
            (json{{"+:^model\\.layers\\.0\\.mlp\\.down_proj$", {{"bits", 8}, {"group_size", 32}}},
                  {"-:^model\\.layers\\.0\\.self_attn\\.q_proj$", json::object()}}));
}

TEST_F(ExportTest, GptqV1StoresZerosLessOne) {
  MakeArtifact(WithGolden(4, kDown));
  ASSERT_OK(Export(ExportFormat::kGptq));
  const auto tensors = Tensors(out());
  EXPECT_EQ(tensors.at(std::string(kDown) + ".qzeros").bytes, GoldenOf(4).v1_qzeros);
  EXPECT_EQ(tensors.at(std::string(kDown) + ".qweight").bytes,
            Tensors(dir_ / "artifact").at(std::string(kDown) + ".qweight").bytes);
  EXPECT_EQ(Config()["quantization_config"]["checkpoint_format"], "gptq");
}

TEST_F(ExportTest, GptqV1RefusesAZeroOfZero) {
  TinyArtifactOptions options = WithGolden(4, "none");
  options.edit = [](const std::string& name, QuantizedMatrix& matrix) {
    for (uint8_t& zero : matrix.zeros) zero = 1;
    if (name == kDown) matrix.zeros[3] = 0;  // of two groups an output
  };
  MakeArtifact(options);
  EXPECT_THAT(
      Export(ExportFormat::kGptq),
      StatusIs(kPrecondition, AllOf(HasSubstr("tensor 'model.layers.0.mlp.down_proj.qzeros'"),
                                    HasSubstr("output 1, group 1"), HasSubstr("gptq_v2"))));
}

TEST_F(ExportTest, CompressedTensorsPacksAsTheLibraryDoes) {
  for (const auto& [bits, linear] : {std::pair(4, kDown), std::pair(8, kQuery)}) {
    const ExportGolden golden = GoldenOf(bits);
    fs::remove_all(dir_ / "artifact");
    MakeArtifact(WithGolden(bits, linear));
    ASSERT_OK(Export(ExportFormat::kCompressedTensors));
    const auto tensors = Tensors(out());
    const std::string name(linear);
    const int64_t rows = golden.matrix.rows;
    const int64_t cols = golden.matrix.cols;
    EXPECT_EQ(tensors.at(name + ".weight_packed").bytes, golden.weight_packed);
    EXPECT_EQ(tensors.at(name + ".weight_packed").shape,
              (std::vector<int64_t>{rows, cols / 32 * bits}));
    EXPECT_EQ(tensors.at(name + ".weight_zero_point").bytes, golden.weight_zero_point);
    EXPECT_EQ(tensors.at(name + ".weight_zero_point").shape,
              (std::vector<int64_t>{rows / 32 * bits, cols / 64}));
    EXPECT_EQ(tensors.at(name + ".weight_scale").dtype, "F16");
    EXPECT_EQ(tensors.at(name + ".weight_scale").shape, (std::vector<int64_t>{rows, cols / 64}));
    int64_t shape[2] = {};
    std::memcpy(shape, tensors.at(name + ".weight_shape").bytes.data(), sizeof(shape));
    EXPECT_EQ(shape[0], rows);
    EXPECT_EQ(shape[1], cols);
    EXPECT_FALSE(tensors.contains(name + ".g_idx"));
    const json quantization = Config()["quantization_config"];
    EXPECT_EQ(quantization["quant_method"], "compressed-tensors");
    EXPECT_EQ(quantization["format"], "pack-quantized");
    EXPECT_EQ(quantization["ignore"], json{"lm_head"});
    const json& weights = quantization["config_groups"]["group_0"]["weights"];
    EXPECT_EQ(weights["num_bits"], bits);
    EXPECT_EQ(weights["group_size"], 64);
    EXPECT_EQ(weights["symmetric"], false);
    EXPECT_EQ(weights["strategy"], "group");
  }
}

TEST_F(ExportTest, CompressedTensorsLeavesTheMiddleOut) {
  MakeArtifact({.bits = 4, .group_size = -1, .symmetric = true, .bits_of = {{kDown, 8}}});
  ASSERT_OK(Export(ExportFormat::kCompressedTensors));
  EXPECT_FALSE(Tensors(out()).contains(std::string(kDown) + ".weight_zero_point"));
  const json groups = Config()["quantization_config"]["config_groups"];
  EXPECT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups["group_1"]["targets"], json{kDown});
  EXPECT_EQ(groups["group_1"]["weights"]["num_bits"], 8);
  EXPECT_EQ(groups["group_0"]["targets"].size(), 13u);
  EXPECT_EQ(groups["group_0"]["weights"]["symmetric"], true);
  EXPECT_EQ(groups["group_0"]["weights"]["strategy"], "channel");
  EXPECT_TRUE(groups["group_0"]["weights"]["group_size"].is_null());
}

TEST_F(ExportTest, CompressedTensorsRefusesOtherWidths) {
  MakeArtifact({.bits = 4, .bits_of = {{kDown, 3}}});
  EXPECT_THAT(Export(ExportFormat::kCompressedTensors),
              StatusIs(kPrecondition, AllOf(HasSubstr("linear 'model.layers.0.mlp.down_proj'"),
                                            HasSubstr("3 bits"))));
}

class GgufExportTest : public ExportTest,
                       public ::testing::WithParamInterface<std::tuple<int, std::string>> {};

TEST_P(GgufExportTest, OurOwnReaderFindsTheSameModel) {
  const auto& [bits, overrides] = GetParam();
  MakeArtifact({.bits = bits, .group_size = 64, .symmetric = true},
               {.has_attention_bias = true, .config_overrides = overrides});
  ASSERT_OK_AND_ASSIGN(const ExportReport report, Export(ExportFormat::kGguf));
  EXPECT_THAT(report.warnings, IsEmpty());
  EXPECT_EQ(report.files, (std::vector<std::string>{"tiny.gguf", "walsh-export.json"}));
  ASSERT_OK_AND_ASSIGN(const auto exported, Checkpoint::Open(out() + "/tiny.gguf"));
  ASSERT_OK_AND_ASSIGN(const StoredForm form, exported->FormOf(std::string(kDown) + ".weight"));
  EXPECT_EQ(form.type, bits == 4 ? StorageType::kQ4_0 : StorageType::kQ8_0);
  const ModelConfig& actual = exported->config();
  const ModelConfig& expected = artifact_->config();
  EXPECT_EQ(actual.n_kv_heads, expected.n_kv_heads);
  EXPECT_EQ(actual.head_dim, expected.head_dim);
  EXPECT_EQ(actual.max_position, expected.max_position);
  EXPECT_EQ(actual.rope_scaling.kind, expected.rope_scaling.kind);
  EXPECT_EQ(actual.rope_scaling.factor, expected.rope_scaling.factor);
  EXPECT_EQ(actual.bos_token, expected.bos_token);
  EXPECT_EQ(actual.eos_tokens, expected.eos_tokens);
  EXPECT_FALSE(actual.tied_embeddings);
  ExpectSameWeights(*exported);
  ExpectSameLogits(*exported, dir_ / "artifact");
  ASSERT_OK_AND_ASSIGN(const auto theirs, Tokenizer::Create(exported->tokenizer()));
  ASSERT_OK_AND_ASSIGN(const auto ours, Tokenizer::Create(artifact_->tokenizer()));
  const char* text = "the other day, 12 of them\n  ran";
  EXPECT_EQ(*theirs->Encode(text, {}), *ours->Encode(text, {}));
}

INSTANTIATE_TEST_SUITE_P(
    , GgufExportTest,
    ::testing::Values(std::tuple(4, "{}"), std::tuple(8, "{}"),
                      std::tuple(4, R"({"rope_scaling": {"rope_type": "linear", "factor": 2.0}})"),
                      std::tuple(8, R"({"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                          "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}})")));

TEST_F(ExportTest, GgufKeepsWhatQ4_1Holds) {
  MakeArtifact({.bits = 4, .group_size = 64, .edit = [](const auto&, QuantizedMatrix& matrix) {
                  for (uint8_t& zero : matrix.zeros) zero = 4;
                }});
  ASSERT_OK(Export(ExportFormat::kGguf, {.dtype = StorageType::kF16}));
  ASSERT_OK_AND_ASSIGN(const auto exported, Checkpoint::Open(out() + "/tiny.gguf"));
  ASSERT_OK_AND_ASSIGN(const StoredForm form, exported->FormOf(std::string(kDown) + ".weight"));
  EXPECT_EQ(form.type, StorageType::kQ4_1);
  ASSERT_OK_AND_ASSIGN(const StoredForm head, exported->FormOf(kLmHeadTensor));
  EXPECT_EQ(head.type, StorageType::kF16);
  ASSERT_OK_AND_ASSIGN(const StoredForm norm, exported->FormOf(kFinalNormTensor));
  EXPECT_EQ(norm.type, StorageType::kF32);
}

TEST_F(ExportTest, GgufRefusesWhatItDoesNotHoldExactlyBeforeWriting) {
  MakeArtifact({.bits = 4, .group_size = 64});
  EXPECT_THAT(Export(ExportFormat::kGguf),
              StatusIs(kPrecondition,
                       AllOf(HasSubstr("linear 'model.layers."), HasSubstr("half precision"))));
  EXPECT_THAT(Contents(out()), IsEmpty());
}

TEST_F(ExportTest, GgufRefusesTwoBits) {
  MakeArtifact({.bits = 2, .group_size = 64});
  EXPECT_THAT(Export(ExportFormat::kGguf), StatusIs(kPrecondition, HasSubstr("2 bits: no type")));
}

TEST_F(ExportTest, RefusesADtypeThatAFormatDoesNotHave) {
  MakeArtifact({});
  EXPECT_THAT(Export(ExportFormat::kGptqV2, {.dtype = StorageType::kF16}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("dtype F16"), HasSubstr("format gptq_v2"))));
}

// An artifact with another config.json.
class Reconfigured final : public ArtifactReader {
 public:
  Reconfigured(const ArtifactReader& base, const char* member, const json& value)
      : base_(base), side_files_(base.side_files()) {
    json config = json::parse(side_files_["config.json"]);
    config["quantization_config"][member] = value;
    side_files_["config.json"] = config.dump();
  }
  const ModelConfig& config() const override { return base_.config(); }
  const TokenizerSource& tokenizer() const override { return base_.tokenizer(); }
  const ArtifactInfo& info() const override { return base_.info(); }
  const OnlineTransforms& online() const override { return base_.online(); }
  const std::map<std::string, std::string>& side_files() const override { return side_files_; }
  bool IsQuantized(std::string_view name) const override { return base_.IsQuantized(name); }
  absl::StatusOr<QuantizedMatrix> ReadQuantized(std::string_view name) const override {
    return base_.ReadQuantized(name);
  }
  absl::StatusOr<OrderedMatrix> ReadOrdered(std::string_view name) const override {
    return base_.ReadOrdered(name);
  }
  absl::StatusOr<Matrix> ReadDense(std::string_view name) const override {
    return base_.ReadDense(name);
  }
  absl::StatusOr<GptqShape> ShapeOf(std::string_view name) const override {
    return base_.ShapeOf(name);
  }
  absl::StatusOr<std::vector<int32_t>> ReadInputOrder(std::string_view name) const override {
    return base_.ReadInputOrder(name);
  }
  absl::Status ReadPacked(std::string_view name, const PackedSpans& into) const override {
    return base_.ReadPacked(name, into);
  }
  absl::Status ReadBf16(std::string_view name, int64_t first, int64_t n,
                        std::span<uint16_t> into) const override {
    return base_.ReadBf16(name, first, n, into);
  }
  absl::Status ReadStoredBf16(std::string_view name, int64_t first, int64_t n,
                              std::span<uint16_t> into) const override {
    return base_.ReadStoredBf16(name, first, n, into);
  }

 private:
  const ArtifactReader& base_;
  std::map<std::string, std::string> side_files_;
};

TEST_F(ExportTest, RefusesWhatNoFormatCanSay) {
  MakeArtifact({});
  const json transforms = {{"r4", {{"kind", "walsh"}}}};
  const Reconfigured online(*artifact_, "online_transforms", transforms);
  EXPECT_THAT(CheckExportable(online, {}),
              StatusIs(kPrecondition, AllOf(HasSubstr("transforms at run time"), HasSubstr("r4"))));
  const Reconfigured unknown(*artifact_, "codebook", 4);
  EXPECT_THAT(CheckExportable(unknown, {}),
              StatusIs(kPrecondition, HasSubstr("quantization_config.codebook is 4")));
  // There, and empty: nothing is left out.
  EXPECT_OK(CheckExportable(Reconfigured(*artifact_, "online_transforms", json::object()), {}));
}

// A job's artifact names them as readers that fuse linears do; nothing else is written instead.
TEST_F(ExportTest, GptqKeepsTheArtifactsOwnNamesOfExceptions) {
  MakeArtifact({.bits = 4, .bits_of = {{kDown, 8}}});
  const json dynamic = {{R"(+:^model\.layers\.(?:0)\.mlp\.down_proj$)", {{"bits", 8}}}};
  const Reconfigured named(*artifact_, "dynamic", dynamic);
  fs::create_directory(out());
  ASSERT_OK(ExportArtifact(named, {.format = ExportFormat::kGptqV2}, out(), GoOn));
  EXPECT_EQ(Config()["quantization_config"]["dynamic"], dynamic);
}

TEST_F(ExportTest, RefusesActOrderBeforeWriting) {
  MakeArtifact({});
  const Reconfigured ordered(*artifact_, "desc_act", true);
  EXPECT_THAT(CheckExportable(ordered, {}),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("act-order")));
}

TEST_F(ExportTest, WarnsOfWhatReadersDoNotTake) {
  MakeArtifact(WithGolden(4, kDown));
  ASSERT_OK_AND_ASSIGN(const ExportReport gptq, Export(ExportFormat::kGptq));
  EXPECT_THAT(gptq.warnings, ElementsAre(HasSubstr("gptq_v2")));
  ASSERT_OK_AND_ASSIGN(const ExportReport v2, Export(ExportFormat::kGptqV2));
  EXPECT_THAT(v2.warnings, IsEmpty());
  ASSERT_OK_AND_ASSIGN(const ExportReport packed, Export(ExportFormat::kCompressedTensors));
  EXPECT_THAT(packed.warnings, ElementsAre(HasSubstr("asymmetric")));

  fs::remove_all(dir_ / "artifact");
  MakeArtifact({.bits = 4, .symmetric = true, .bits_of = {{kDown, 8}}});
  ASSERT_OK_AND_ASSIGN(const ExportReport symmetric, Export(ExportFormat::kGptq));
  EXPECT_THAT(symmetric.warnings, IsEmpty());
  ASSERT_OK_AND_ASSIGN(const ExportReport mixed, Export(ExportFormat::kCompressedTensors));
  EXPECT_THAT(mixed.warnings, ElementsAre(HasSubstr("differ in width")));
}

// Its norms multiply by 1 + γ, and γ is what checkpoints hold.
TEST_F(ExportTest, Gemma3GoesToEveryCheckpointFormat) {
  MakeArtifact({.bits = 8, .symmetric = true},
               {.architecture = "Gemma3ForCausalLM", .sliding_window = 32});
  for (const ExportFormat format :
       {ExportFormat::kDequantized, ExportFormat::kGptqV2, ExportFormat::kCompressedTensors}) {
    ASSERT_OK(Export(format, {.dtype = format == ExportFormat::kDequantized ? StorageType::kF32
                                                                            : StorageType::kBf16}));
    if (format != ExportFormat::kDequantized) continue;
    ASSERT_OK_AND_ASSIGN(const auto exported, Checkpoint::Open(out()));
    ExpectSameWeights(*exported);
  }
  EXPECT_THAT(Export(ExportFormat::kGguf), StatusIs(absl::StatusCode::kUnimplemented, _));
}

TEST_F(ExportTest, OnlyDequantizedHoldsOtherGrids) {
  const auto to_codebook = [](const std::string&, QuantizedMatrix& matrix) {
    for (int64_t i = 0; i < matrix.rows * matrix.groups(); ++i) {
      for (const float level : {-0.5f, -0.125f, 0.25f, 1.0f}) matrix.levels.push_back(level);
    }
    matrix.scales.clear();
    matrix.zeros.clear();
  };
  const auto to_float_zeros = [](const std::string&, QuantizedMatrix& matrix) {
    matrix.float_zeros.assign(matrix.zeros.size(), 1.25f);
    matrix.zeros.clear();
  };
  const auto make = [&](const char* grid, auto edit) {
    fs::remove_all(dir_ / "artifact");
    MakeArtifact({.bits = 2,
                  .quantization_config = {{"checkpoint_format", "walsh"},
                                          {"walsh", {{"grid", grid}, {"bits", 2}}}},
                  .edit = edit});
  };
  for (const bool has_codebook : {true, false}) {
    if (has_codebook) {
      make("codebook", to_codebook);
    } else {
      make("float-zero", to_float_zeros);
    }
    for (const ExportFormat format : {ExportFormat::kGptqV2, ExportFormat::kGptq,
                                      ExportFormat::kCompressedTensors, ExportFormat::kGguf}) {
      EXPECT_THAT(Export(format),
                  StatusIs(kPrecondition, HasSubstr("which only the format dequantized can hold")));
    }
    ASSERT_OK(Export(ExportFormat::kDequantized, {.dtype = StorageType::kF32}));
    ASSERT_OK_AND_ASSIGN(const auto exported, Checkpoint::Open(out()));
    ExpectSameWeights(*exported);
  }
}

TEST_F(ExportTest, EndsWhenItsCallerSaysSo) {
  MakeArtifact({});
  fs::create_directory(out());
  int64_t n_calls = 0;
  const auto stop = [&](int64_t done, int64_t total) -> absl::Status {
    EXPECT_EQ(done, ++n_calls);
    EXPECT_EQ(total, 21);
    return done == 3 ? absl::CancelledError("enough") : absl::OkStatus();
  };
  EXPECT_THAT(ExportArtifact(*artifact_, {}, out(), stop),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
  EXPECT_EQ(n_calls, 3);
}

TEST_F(ExportTest, TheSameArtifactGivesTheSameBytes) {
  MakeArtifact({.bits = 8, .group_size = 64, .symmetric = true});
  for (const ExportFormat format :
       {ExportFormat::kDequantized, ExportFormat::kGptqV2, ExportFormat::kGptq,
        ExportFormat::kCompressedTensors, ExportFormat::kGguf}) {
    ASSERT_OK(Export(format, {}, "first"));
    ASSERT_OK(Export(format, {}, "second"));
    EXPECT_EQ(Contents(out("first")), Contents(out("second"))) << FormatName(format);
  }
}

}  // namespace
}  // namespace walsh::interop
