// Checkpoints that GPTQModel dequantizes (tests/golden/interop/make_gptq_checkpoints.py), and
// damaged ones.
#include "worker/interop/gptq_checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "common/publish.h"
#include "common/sha256.h"
#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/golden.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "tests/unit/worker/interop/logits_of.h"
#include "worker/calibrate/token_windows.h"
#include "worker/evaluate/layer_source.h"
#include "worker/evaluate/perplexity.h"
#include "worker/interop/export.h"
#include "worker/interop/import.h"
#include "worker/io/artifact.h"
#include "worker/io/gptq_packing.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::interop {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using walsh::testing::StatusIs;
using walsh::testing::TinyModel;
using walsh::testing::WriteFile;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
constexpr char kDown[] = "model.layers.0.mlp.down_proj";

absl::Status GoOn(int64_t, int64_t) { return absl::OkStatus(); }

// The bytes of what a file's header and data are after `edit`.
std::string EditSafetensors(const std::string& bytes,
                            const std::function<void(json& header, std::string& data)>& edit) {
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  json header = json::parse(bytes.substr(8, header_bytes));
  std::string data = bytes.substr(8 + header_bytes);
  edit(header, data);
  return testing::SafetensorsBytes(header.dump(), data);
}

class GptqCheckpointTest : public ::testing::Test {
 protected:
  // One of the golden checkpoints, with a tokenizer and after changes.
  void Write(const std::string& name, const json& quantization_changes = json::object(),
             const std::function<void(json&, std::string&)>& edit = {}) {
    const std::string golden = "interop/gptq_checkpoints/" + name + "/";
    ASSERT_OK(MakeDirectories(source()));
    const TinyModel tokenizer({});
    WriteFile(source() + "/tokenizer.json", tokenizer.TokenizerJson());
    WriteFile(source() + "/tokenizer_config.json", tokenizer.TokenizerConfigJson());
    json config = json::parse(testing::GoldenFile(golden + "config.json"));
    config["quantization_config"].merge_patch(quantization_changes);
    WriteFile(source() + "/config.json", config.dump());
    const std::string weights = testing::GoldenFile(golden + "model.safetensors");
    WriteFile(source() + "/model.safetensors", edit ? EditSafetensors(weights, edit) : weights);
    expected_ = json::parse(testing::GoldenFile(golden + "expected.json"));
  }
  std::string source() const { return dir_ / "source"; }
  std::string artifact() const { return dir_ / "artifact"; }

  testing::TempDir dir_;
  json expected_;
};

class GoldenCheckpointTest : public GptqCheckpointTest,
                             public ::testing::WithParamInterface<const char*> {};

std::string HashOf(const Matrix& matrix) {
  return Sha256Hex({reinterpret_cast<const char*>(matrix.data()),
                    static_cast<size_t>(matrix.size()) * sizeof(float)});
}

TEST_P(GoldenCheckpointTest, WeightsAndLogitsAreThoseOfGptqModel) {
  Write(GetParam());
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
  int n_linears = 0;
  for (const auto& [linear, hash] : expected_["weights"].items()) {
    ASSERT_OK_AND_ASSIGN(const Matrix weights, checkpoint->Read(linear + ".weight"));
    EXPECT_EQ(HashOf(weights), hash) << linear;
    ++n_linears;
  }
  EXPECT_EQ(n_linears, 7);
  ASSERT_OK_AND_ASSIGN(const auto dense, engine::LoadedModel::LoadDense(*checkpoint));
  const std::vector<float> logits = expected_["logits"];
  EXPECT_LE(RelativeDifference(LogitsOf(*dense), logits), 1e-4);
}

TEST_P(GoldenCheckpointTest, TheImportedArtifactStandsForTheSameWeights) {
  Write(GetParam());
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
  ASSERT_OK(ImportGptq(*checkpoint, artifact(), 2, GoOn));
  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 2));
  EXPECT_EQ(reader->info().method, "gptq (imported)");
  for (const auto& [linear, hash] : expected_["weights"].items()) {
    ASSERT_OK_AND_ASSIGN(const OrderedMatrix ordered, reader->ReadOrdered(linear));
    EXPECT_EQ(HashOf(Dequantize(ordered)), hash) << linear;
  }
  ASSERT_OK_AND_ASSIGN(const auto served,
                       engine::LoadedModel::LoadArtifact(artifact(), {.head_8bit = false}));
  // Served with activations of 8 bits; the weights are compared above.
  const std::vector<float> logits = expected_["logits"];
  EXPECT_LE(RelativeDifference(LogitsOf(*served), logits), 0.04);
}

// In floats, as an evaluation runs it: what differs from GPTQModel's logits is the rounding of the
// checkpoint's F16 tensors to BF16.
TEST_P(GoldenCheckpointTest, TheImportedArtifactIsEvaluatedAsTheSameModel) {
  Write(GetParam());
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
  ASSERT_OK(ImportGptq(*checkpoint, artifact(), 2, GoOn));
  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 2));
  evaluate::ArtifactSource artifact_source(*reader);
  calibrate::TokenWindows window;
  window.ids = PromptIds(artifact_source.config().vocab);
  window.length = static_cast<int64_t>(window.ids.size());
  ThreadPool pool(2);
  ASSERT_OK_AND_ASSIGN(const evaluate::FinalStates states,
                       evaluate::ForwardToHead(artifact_source, window, pool,
                                               [](double) { return absl::OkStatus(); }));
  const ForwardContext context =
      ForwardContext::Create(artifact_source.config(), {kernels::Backend::kCpu, &pool});
  Matrix logits;
  ASSERT_OK(evaluate::Logits(context, states.final_norm, states.head,
                             states.hidden.row(window.length - 1), 1, logits));
  const std::vector<float> expected = expected_["logits"];
  EXPECT_LE(RelativeDifference({logits.span().begin(), logits.span().end()}, expected), 0.01);
}

INSTANTIATE_TEST_SUITE_P(, GoldenCheckpointTest,
                         ::testing::Values("v1-4bit-sym-act-order", "v1-3bit-act-order", "v2-2bit",
                                           "v2-8bit-channel"));

TEST_F(GptqCheckpointTest, ActOrderIsReadOnlyByWhoKnowsIt) {
  Write("v1-3bit-act-order");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
  ASSERT_OK(ImportGptq(*checkpoint, artifact(), 2, GoOn));
  ASSERT_OK_AND_ASSIGN(const auto reader, ArtifactReader::Open(artifact(), true, 2));
  const auto out_of_order = StatusIs(kUnimplemented, HasSubstr("columns out of order"));
  EXPECT_THAT(reader->ReadQuantized(kDown), out_of_order);
  ASSERT_OK_AND_ASSIGN(const GptqShape shape, reader->ShapeOf(kDown));
  std::vector<uint32_t> weights(static_cast<size_t>(shape.weight_words() * shape.rows));
  std::vector<uint32_t> zeros(static_cast<size_t>(shape.groups() * shape.zero_words()));
  std::vector<uint16_t> scales(static_cast<size_t>(shape.groups() * shape.rows));
  PackedSpans into{.qweight = weights, .qzeros = zeros, .scales = scales};
  EXPECT_THAT(reader->ReadPacked(kDown, into), out_of_order);
  into.in_any_order = true;
  ASSERT_OK(reader->ReadPacked(kDown, into));
  // The same as ReadOrdered's, whose columns are in the order of their groups.
  ASSERT_OK_AND_ASSIGN(const OrderedMatrix ordered, reader->ReadOrdered(kDown));
  ASSERT_FALSE(ordered.input_order.empty());
  ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> order, reader->ReadInputOrder(kDown));
  EXPECT_EQ(order, ordered.input_order);
  ASSERT_OK_AND_ASSIGN(const GptqTensors packed, PackGptq(ordered));
  EXPECT_EQ(weights, packed.qweight);
}

json ImportedConfig(const std::string& artifact) {
  std::ifstream in(artifact + "/config.json");
  return json::parse(in)["quantization_config"];
}

// What a checkpoint says of its order and its zeros is not what decides.
TEST_F(GptqCheckpointTest, OrderAndSymmetryAreThoseOfTheTensors) {
  Write("v1-3bit-act-order", {{"desc_act", false}, {"sym", true}});
  ASSERT_OK_AND_ASSIGN(const auto ordered, GptqCheckpoint::Open(source()));
  ASSERT_OK(ImportGptq(*ordered, artifact(), 2, GoOn));
  EXPECT_EQ(ImportedConfig(artifact())["desc_act"], true);
  EXPECT_EQ(ImportedConfig(artifact())["sym"], false);
  EXPECT_OK(engine::LoadedModel::LoadArtifact(artifact(), {.head_8bit = false}));

  fs::remove_all(source());
  Write("v1-4bit-sym-act-order", {{"sym", false}});
  ASSERT_OK_AND_ASSIGN(const auto symmetric, GptqCheckpoint::Open(source()));
  ASSERT_OK(ImportGptq(*symmetric, dir_ / "symmetric", 2, GoOn));
  EXPECT_EQ(ImportedConfig(dir_ / "symmetric")["sym"], true);
}

TEST_F(GptqCheckpointTest, RefusesWidthsAndGroupsThatNoLinearHas) {
  Write("v2-2bit", {{"bits", 8}});
  EXPECT_THAT(GptqCheckpoint::Open(source()),
              StatusIs(kInvalid, HasSubstr("'bits' is 8, which no linear has")));
  Write("v2-2bit", {{"group_size", 7}});
  EXPECT_THAT(GptqCheckpoint::Open(source()),
              StatusIs(kInvalid, HasSubstr("'group_size' is 7, which no linear has")));
}

// What we export as version 1 comes back.
TEST_F(GptqCheckpointTest, OurOwnExportsComeBack) {
  TinyModel({.has_attention_bias = true}).WriteHf(dir_ / "model");
  ASSERT_OK_AND_ASSIGN(const auto model, Checkpoint::Open(dir_ / "model"));
  ASSERT_OK(testing::WriteTinyArtifact(
      *model, dir_ / "first", {.bits = 3, .edit = [](const auto&, QuantizedMatrix& matrix) {
                                 for (uint8_t& zero : matrix.zeros)
                                   zero = std::max<uint8_t>(zero, 1);
                               }}));
  ASSERT_OK_AND_ASSIGN(const auto first, ArtifactReader::Open(dir_ / "first", true, 2));
  fs::create_directory(dir_ / "exported");
  ASSERT_OK(ExportArtifact(*first, {.format = ExportFormat::kGptq}, dir_ / "exported", GoOn));
  ASSERT_OK_AND_ASSIGN(const auto exported, GptqCheckpoint::Open(dir_ / "exported"));
  ASSERT_OK(ImportGptq(*exported, artifact(), 2, GoOn));
  ASSERT_OK_AND_ASSIGN(const auto second, ArtifactReader::Open(artifact(), true, 2));
  ASSERT_OK_AND_ASSIGN(const QuantizedMatrix before, first->ReadQuantized(kDown));
  ASSERT_OK_AND_ASSIGN(const QuantizedMatrix after, second->ReadQuantized(kDown));
  EXPECT_EQ(after.codes, before.codes);
  EXPECT_EQ(after.zeros, before.zeros);
  EXPECT_EQ(after.scales, before.scales);
}

TEST_F(GptqCheckpointTest, RefusesSettingsThatItDoesNotRead) {
  const auto expect = [&](const json& changes, absl::StatusCode code, const char* message) {
    Write("v1-4bit-sym-act-order", changes);
    EXPECT_THAT(GptqCheckpoint::Open(source()), StatusIs(code, HasSubstr(message)));
  };
  expect({{"quant_method", "awq"}}, kUnimplemented, "'quant_method' is 'awq'");
  expect({{"checkpoint_format", "marlin"}}, kUnimplemented, "'checkpoint_format' is 'marlin'");
  expect({{"is_marlin_format", true}}, kUnimplemented, "'is_marlin_format' is true");
  expect({{"lm_head", true}}, kUnimplemented, "'lm_head' is true");
  expect({{"pack_dtype", "int64"}}, kUnimplemented, "'pack_dtype' is 'int64'");
  expect({{"bits", 5}}, kUnimplemented, "'bits' is 5");
  expect({{"bits", "4"}}, kInvalid, "'bits' is missing or no integer");
  expect({{"group_size", 0}}, kInvalid, "'group_size' is 0");
  // 2^64 - 1 is no -1, which means a group of a channel.
  expect({{"group_size", uint64_t{18446744073709551615u}}}, kInvalid, "no integer");
  expect({{"sym", "yes"}}, kInvalid, "'sym' is neither true nor false");
  expect({{"desc_act", 1}}, kInvalid, "'desc_act' is neither true nor false");
}

TEST_F(GptqCheckpointTest, RefusesWhatIsNotQuantized) {
  TinyModel({}).WriteHf(source());
  EXPECT_THAT(GptqCheckpoint::Open(source()), StatusIs(kInvalid, HasSubstr("walsh quantize")));
}

// Sets the 32-bit word at `index` of a tensor.
std::function<void(json&, std::string&)> SetWord(const std::string& tensor, int64_t index,
                                                 int32_t value) {
  return [=](json& header, std::string& data) {
    const auto offset = header.at(tensor)["data_offsets"][0].get<size_t>();
    std::memcpy(data.data() + offset + static_cast<size_t>(index) * 4, &value, sizeof(value));
  };
}

TEST_F(GptqCheckpointTest, RefusesGroupsThatAreNone) {
  const std::string g_idx = std::string(kDown) + ".g_idx";
  for (const auto& [value, message] : {std::pair(-1, "g_idx is -1 at [5], must be 0 to 3"),
                                       std::pair(4, "g_idx is 4 at [5], must be 0 to 3"),
                                       std::pair(INT32_MAX, "g_idx is 2147483647 at [5]")}) {
    Write("v1-4bit-sym-act-order", json::object(), SetWord(g_idx, 5, value));
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
    EXPECT_THAT(checkpoint->ReadOrdered(kDown), StatusIs(kInvalid, HasSubstr(message)));
  }
  // One group has 33 inputs then, another 31.
  Write("v2-2bit", json::object(), SetWord(g_idx, 5, 1));
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
  EXPECT_THAT(checkpoint->ReadOrdered(kDown), StatusIs(kInvalid, HasSubstr("more than its 64")));
}

TEST_F(GptqCheckpointTest, RefusesAZeroThatReadersDoNotAgreeAbout) {
  Write("v1-4bit-sym-act-order", json::object(), SetWord(std::string(kDown) + ".qzeros", 0, 0xf));
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
  EXPECT_THAT(checkpoint->ReadOrdered(kDown),
              StatusIs(kInvalid, AllOf(HasSubstr("holds 15 at output 0, group 0"),
                                       HasSubstr("do not agree"))));
}

TEST_F(GptqCheckpointTest, RefusesTensorsOfOtherShapes) {
  const auto reshape = [](const std::string& tensor, const json& shape) {
    return [=](json& header, std::string&) { header.at(tensor)["shape"] = shape; };
  };
  const std::string down(kDown);
  const auto expect = [&](const std::function<void(json&, std::string&)>& edit,
                          absl::StatusCode code, const char* message) {
    Write("v1-4bit-sym-act-order", json::object(), edit);
    EXPECT_THAT(GptqCheckpoint::Open(source()), StatusIs(code, HasSubstr(message)));
  };
  expect(reshape(down + ".qweight", {8, 128}), kInvalid, "tensor 'model.layers.0.mlp.down_proj.q");
  expect(reshape(down + ".qweight", {1024}), kInvalid, "fit no width");
  expect(reshape(down + ".qzeros", {8, 4}), kInvalid,
         "down_proj.qzeros' is [8, 4], expected [4, 8]");
  expect(reshape(down + ".scales", {256, 1}), kInvalid, "fit no width");
  expect(reshape(down + ".g_idx", {2, 64}), kInvalid, "down_proj.g_idx' is [2, 64]");
  expect([&](json& header, std::string&) { header.at(down + ".scales")["dtype"] = "BF16"; },
         kUnimplemented, "down_proj.scales' is BF16");
}

TEST_F(GptqCheckpointTest, RefusesABiasThatTheModelDoesNotHave) {
  Write("v1-4bit-sym-act-order", json::object(), SetWord(std::string(kDown) + ".bias", 3, 0x3c00));
  EXPECT_THAT(GptqCheckpoint::Open(source()),
              StatusIs(kUnimplemented, HasSubstr("down_proj.bias' is a bias that")));
}

TEST_F(GptqCheckpointTest, AnImportEndsWhenItsCallerSaysSo) {
  Write("v2-2bit");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, GptqCheckpoint::Open(source()));
  const auto stop = [](int64_t done, int64_t) {
    return done == 2 ? absl::CancelledError("enough") : absl::OkStatus();
  };
  EXPECT_THAT(ImportGptq(*checkpoint, artifact(), 2, stop),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
}

}  // namespace
}  // namespace walsh::interop
