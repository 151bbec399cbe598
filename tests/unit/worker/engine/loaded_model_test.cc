// Real weights behind the engine: artifacts made by the pipeline, and the reference of
// TinyStories-656K.
#include "worker/engine/loaded_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/hand_cache.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/recording_sink.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/engine/engine.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::engine {
namespace {

using ::testing::HasSubstr;
using walsh::testing::CompareTensors;
using walsh::testing::HandCache;
using walsh::testing::HasCode;
using walsh::testing::IsClose;
using walsh::testing::RecordingSink;
using walsh::testing::StatusIs;
using walsh::testing::TempDir;
using walsh::testing::TinyModel;

constexpr int64_t kTrialTokensMax = 64;

// A sequence that is run by hand. Those that run together share a cache.
struct Trial {
  std::vector<int32_t> tokens;
  std::shared_ptr<HandCache> cache;
  std::vector<BlockId> blocks;
  int64_t n_done = 0;
};

std::shared_ptr<HandCache> MakeCache(const LoadedModel& model, int64_t n_sequences = 1) {
  return std::make_shared<HandCache>(model.config(), kTrialTokensMax, n_sequences);
}

Trial MakeTrial(std::shared_ptr<HandCache> cache, std::vector<int32_t> tokens) {
  std::vector<BlockId> blocks = cache->Take(kTrialTokensMax);
  return {.tokens = std::move(tokens), .cache = std::move(cache), .blocks = std::move(blocks)};
}

Trial MakeTrial(const LoadedModel& model, std::vector<int32_t> tokens) {
  return MakeTrial(MakeCache(model), std::move(tokens));
}

// One step: `n_tokens[i]` more tokens of trials[i]; logits of all.
Matrix Step(const LoadedModel& model, std::vector<Trial*> trials, std::vector<int64_t> n_tokens) {
  LoadedModel::Batch batch;
  batch.kv = trials.front()->cache->pool();
  for (size_t i = 0; i < trials.size(); ++i) {
    Trial& trial = *trials[i];
    EXPECT_EQ(trial.cache, trials.front()->cache);
    batch.sequences.push_back({.first_row = static_cast<int64_t>(batch.tokens.size()),
                               .n_rows = n_tokens[i],
                               .n_past = trial.n_done,
                               .blocks = trial.blocks,
                               .needs_logits = true});
    for (int64_t t = 0; t < n_tokens[i]; ++t) {
      batch.tokens.push_back(trial.tokens[trial.n_done + t]);
      batch.positions.push_back(static_cast<int32_t>(trial.n_done + t));
    }
    trial.n_done += n_tokens[i];
  }
  ForwardScratch scratch;
  Matrix logits;
  int64_t n_layers = 0;
  batch.on_layer = [&] { ++n_layers; };
  EXPECT_OK(model.Forward(batch, {}, scratch, logits));
  EXPECT_EQ(n_layers, model.config().n_layers);
  return logits;
}

std::vector<float> Row(const Matrix& logits, int64_t row) {
  return {logits.row(row), logits.row(row) + logits.cols()};
}

// Makes an artifact of `source` with round-to-nearest, which needs no calibration to speak of.
void Quantize(const std::string& source, const std::string& output, int bits,
              rotate::Kind rotation) {
  const std::string text = output + ".txt";
  std::ofstream file(text);
  for (int i = 0; i < 300; ++i)
    file << "Once upon a time there was a little girl number " << i << ". ";
  file.close();
  pipeline::JobSpec spec;
  spec.job_name = "quantizationJobs/test";
  spec.source_path = source;
  spec.model_name = "m";
  spec.quantizer.method = gptq::Method::kRtn;
  spec.quantizer.bits = bits;
  spec.quantizer.group_size = 0;
  spec.rotation = rotation;
  spec.calibration_path = text;
  spec.n_calibration_windows = 4;
  spec.sequence_length = 64;
  spec.evaluate = false;
  spec.output_directory = output;
  ThreadPool pool(2);
  ASSERT_OK(pipeline::RunJob(spec, pool, [](const auto&) { return absl::OkStatus(); }));
}

class LoadedModelTest : public ::testing::Test {
 protected:
  void MakeTiny(const testing::TinyModelOptions& options = {}, int bits = 8,
                rotate::Kind rotation = rotate::Kind::kNone) {
    TinyModel(options).WriteHf(dir_ / "source");
    Quantize(dir_ / "source", dir_ / "artifact", bits, rotation);
  }
  std::shared_ptr<LoadedModel> Load(const LoadedModel::Options& options = {}) {
    auto model = LoadedModel::LoadArtifact(dir_ / "artifact", options);
    EXPECT_OK(model);
    return model.ok() ? *model : nullptr;
  }

  TempDir dir_;
};

TEST_F(LoadedModelTest, EightBitsAreCloseToTheSource) {
  for (const bool is_tied : {false, true}) {
    SCOPED_TRACE(is_tied);
    std::filesystem::remove_all(dir_ / "source");
    std::filesystem::remove_all(dir_ / "artifact");
    MakeTiny({.is_tied = is_tied, .has_attention_bias = true, .has_mlp_bias = true}, 8,
             rotate::Kind::kGsr);
    const auto artifact = Load();
    ASSERT_NE(artifact, nullptr);
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir_ / "source"));
    ASSERT_OK_AND_ASSIGN(const auto dense, LoadedModel::LoadDense(*checkpoint));
    const std::vector<int32_t> tokens = {3, 99, 250, 17, 4, 4, 181};
    Trial a = MakeTrial(*artifact, tokens);
    Trial d = MakeTrial(*dense, tokens);
    const auto quantized = Row(Step(*artifact, {&a}, {7}), 0);
    const auto expected = Row(Step(*dense, {&d}, {7}), 0);
    EXPECT_THAT(CompareTensors(quantized, expected, {.max_abs = 0.3, .max_rel = 10, .nmse = 2e-3}),
                IsClose());
    EXPECT_EQ(artifact->info().bits, 8);
    EXPECT_EQ(artifact->tokenizer().vocab_size(), 320);
    EXPECT_GT(artifact->packed_bytes_per_token(), 0);
    EXPECT_GT(artifact->memory_bytes(), artifact->packed_bytes_per_token());
  }
}

// The memory of a token stays: grids of integers, kept as floats.
TEST_F(LoadedModelTest, KeysAndValuesAreRoundedWhereItIsAsked) {
  MakeTiny({.head_dim = 32});
  const auto logits_of = [&](KvCacheDtype dtype) {
    const auto model = Load({.kv_cache_dtype = dtype});
    EXPECT_EQ(model->kv_token_bytes(), 2 * 2 * 2 * 32 * 4);
    Trial trial = MakeTrial(*model, {3, 99, 250, 17, 4, 4, 181});
    return Row(Step(*model, {&trial}, {7}), 0);
  };
  const std::vector<float> plain = logits_of(KvCacheDtype::kAuto);
  EXPECT_EQ(logits_of(KvCacheDtype::kBf16), plain);
  const std::vector<float> of_8_bits = logits_of(KvCacheDtype::kInt8);
  EXPECT_NE(of_8_bits, plain);
  EXPECT_THAT(CompareTensors(of_8_bits, plain, {.max_abs = 0.3, .max_rel = 10, .nmse = 2e-3}),
              IsClose());
  const std::vector<float> of_4_bits = logits_of(KvCacheDtype::kInt4);
  EXPECT_NE(of_4_bits, of_8_bits);
  EXPECT_THAT(CompareTensors(of_4_bits, plain, {.max_abs = 1, .max_rel = 100, .nmse = 5e-2}),
              IsClose());
}

TEST_F(LoadedModelTest, CheckpointAt8BitsIsCloseToItsFloatsAndSmaller) {
  for (const bool is_tied : {false, true}) {
    SCOPED_TRACE(is_tied);
    const std::string source = dir_ / (is_tied ? "tied" : "untied");
    TinyModel({.is_tied = is_tied, .has_attention_bias = true, .has_mlp_bias = true})
        .WriteHf(source);
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(source));
    ASSERT_OK_AND_ASSIGN(const auto packed, LoadedModel::Load8Bit(*checkpoint));
    ASSERT_OK_AND_ASSIGN(const auto dense, LoadedModel::LoadDense(*checkpoint));
    const std::vector<int32_t> tokens = {3, 99, 250, 17, 4, 4, 181};
    Trial a = MakeTrial(*packed, tokens);
    Trial d = MakeTrial(*dense, tokens);
    EXPECT_THAT(CompareTensors(Row(Step(*packed, {&a}, {7}), 0), Row(Step(*dense, {&d}, {7}), 0),
                               {.max_abs = 0.3, .max_rel = 10, .nmse = 2e-3}),
                IsClose());
    EXPECT_LT(packed->memory_bytes(), dense->memory_bytes() * 2 / 5);
  }
}

TEST_F(LoadedModelTest, FloatHeadIsAnOption) {
  MakeTiny();
  const auto eight = Load();
  const auto floats = Load({.head_8bit = false});
  ASSERT_TRUE(eight != nullptr && floats != nullptr);
  EXPECT_GT(floats->packed_bytes_per_token(), eight->packed_bytes_per_token());
  const std::vector<int32_t> tokens = {3, 99, 250};
  Trial a = MakeTrial(*eight, tokens);
  Trial b = MakeTrial(*floats, tokens);
  EXPECT_THAT(CompareTensors(Row(Step(*eight, {&a}, {3}), 0), Row(Step(*floats, {&b}, {3}), 0),
                             {.max_abs = 0.2, .max_rel = 10, .nmse = 1e-3}),
              IsClose());
}

// Bytes, not closeness: what a sequence gets must not depend on who trials beside it, nor on where
// its prompt was cut.
TEST_F(LoadedModelTest, LogitsDoNotDependOnTheBatch) {
  for (const int bits : {2, 3, 4, 8}) {
    SCOPED_TRACE(bits);
    std::filesystem::remove_all(dir_ / "source");
    std::filesystem::remove_all(dir_ / "artifact");
    MakeTiny({}, bits, rotate::Kind::kGsr);
    const auto model = Load();
    ASSERT_NE(model, nullptr);
    std::vector<int32_t> tokens(41);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 37 % 320);
    Trial whole = MakeTrial(*model, tokens);
    const auto expected = Row(Step(*model, {&whole}, {41}), 0);

    for (const int64_t cut : {1, 7, 16, 40}) {
      Trial cut_trial = MakeTrial(*model, tokens);
      Step(*model, {&cut_trial}, {cut});
      EXPECT_EQ(Row(Step(*model, {&cut_trial}, {41 - cut}), 0), expected) << "cut at " << cut;
    }
    for (const int n_others : {1, 2, 5, 11}) {
      const auto cache = MakeCache(*model, n_others + 1);
      std::vector<Trial> others;
      for (int i = 0; i < n_others; ++i) {
        others.push_back(MakeTrial(cache, std::vector<int32_t>(20, i + 1)));
      }
      Trial trial = MakeTrial(cache, tokens);
      std::vector<Trial*> trials;
      std::vector<int64_t> n_tokens;
      for (int i = 0; i < n_others; ++i) {
        trials.push_back(&others[i]);
        n_tokens.push_back(1 + i % 3);
      }
      trials.push_back(&trial);
      n_tokens.push_back(41);
      EXPECT_EQ(Row(Step(*model, trials, n_tokens), n_others), expected) << n_others << " others";
    }
  }
}

TEST_F(LoadedModelTest, AnUnusableChatTemplateIsAProblemOfChatsOnly) {
  for (const auto& [source, problem] : std::vector<std::pair<std::string, std::string>>{
           {"{% set ns.b %}x{% endset %}", "'set' of a namespace's attribute to a block"},
           {"{% if %}", "chat template, line 1"},
           {std::string(300'000, 'x'), "chat template of 300000 bytes, at most 262144"}}) {
    TinyModel({}).WriteHf(dir_ / "source");
    testing::WriteFile(dir_ / "source/chat_template.jinja", source);
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir_ / "source"));
    ASSERT_OK_AND_ASSIGN(const auto model, LoadedModel::LoadDense(*checkpoint));
    ASSERT_NE(model->chat_template(), nullptr);
    EXPECT_THAT(
        model->chat_template()->Render({}),
        StatusIs(absl::StatusCode::kUnimplemented,
                 ::testing::AllOf(HasSubstr("cannot be used; use Generate"), HasSubstr(problem))));
  }
}

TEST_F(LoadedModelTest, DamagedArtifactIsRefused) {
  MakeTiny();
  for (const auto& entry : std::filesystem::directory_iterator(dir_ / "artifact")) {
    if (entry.path().extension() != ".safetensors") continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(-5, std::ios::end);
    const auto byte = static_cast<char>(file.get());
    file.seekp(-5, std::ios::end);
    file.put(static_cast<char>(byte ^ 1));
  }
  EXPECT_THAT(LoadedModel::LoadArtifact(dir_ / "artifact", {}),
              HasCode(absl::StatusCode::kDataLoss));
  EXPECT_THAT(LoadedModel::LoadArtifact(dir_ / "none", {}), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(LoadedModelTest, BadBatchIsAnError) {
  MakeTiny();
  const auto model = Load();
  ASSERT_NE(model, nullptr);
  Trial trial = MakeTrial(*model, {1, 2, 3});
  LoadedModel::Batch batch;
  batch.tokens = {1, 320};
  batch.positions = {0, 1};
  batch.kv = trial.cache->pool();
  batch.sequences = {{.n_rows = 2, .blocks = trial.blocks}};
  ForwardScratch scratch;
  Matrix logits;
  EXPECT_THAT(model->Forward(batch, {}, scratch, logits),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token 320")));
  batch.tokens = {1, 2};
  batch.sequences[0].n_past = 15;
  batch.sequences[0].blocks = {trial.blocks.data(), 1};
  EXPECT_THAT(model->Forward(batch, {}, scratch, logits),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("17 tokens does not fit")));
  const std::vector<BlockId> foreign = {0, 4};
  batch.sequences[0].blocks = foreign;
  EXPECT_THAT(model->Forward(batch, {}, scratch, logits),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block 4 is outside")));
}

// -- Through the engine -------------------------------------------------------------------------

// Real kernels over shared and recomputed blocks: the same tokens and log-probabilities, to the
// bit, as one request at a time in a cache of its own.
TEST_F(LoadedModelTest, AnswersDoNotDependOnCachePreemptionOrBatch) {
  MakeTiny({}, 4, rotate::Kind::kGsr);
  const auto model = Load();
  ASSERT_NE(model, nullptr);
  std::vector<Request> requests;
  for (int i = 0; i < 32; ++i) {
    Request request{.id = std::to_string(i)};
    for (int t = 0; t < 49 - i % 4 * 13; ++t) request.prompt.push_back(t * 37 % 320);
    request.prompt.push_back(i);
    request.sampling = {.max_tokens = 12 + i % 5 * 8, .temperature = i % 4 == 3 ? 0.9 : 0.0};
    request.sampling.seed = static_cast<uint64_t>(i);
    request.sampling.ignore_eos = true;
    request.sampling.logprobs = true;
    requests.push_back(std::move(request));
  }
  const auto run = [&](int max_sequences, int64_t kv_cache_tokens, bool prefix_cache) {
    const std::string name =
        absl::StrCat("answers", max_sequences, "/", kv_cache_tokens, "/", prefix_cache);
    auto engine = Engine::Create(model,
                                 {.model_name = name,
                                  .max_sequences = max_sequences,
                                  .max_waiting = 32,
                                  .max_batch_tokens = 40,
                                  .kv_cache_tokens = kv_cache_tokens,
                                  .prefix_cache = prefix_cache,
                                  .n_threads = 2},
                                 Clock::Real());
    EXPECT_OK(engine);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (const Request& request : requests) {
      sinks.push_back(std::make_shared<RecordingSink>());
      EXPECT_OK((*engine)->Submit(request, sinks.back()));
      if (sinks.size() == 1) sinks[0]->WaitForEnd();  // so that there is something to be found
    }
    for (const auto& sink : sinks) sink->WaitForEnd();
    EXPECT_EQ(walsh::testing::MetricValue("walsh_num_preemptions_total",
                                          {"model_name=\"" + name + "\""}) > 0,
              kv_cache_tokens < 1000);
    return sinks;
  };
  const auto expected = run(1, 2048, false);
  for (const auto& [max_sequences, kv_cache_tokens, prefix_cache] : {std::tuple{1, 2048, true},
                                                                     {32, 4096, false},
                                                                     {32, 4096, true},
                                                                     {32, 112, false},
                                                                     {32, 112, true}}) {
    SCOPED_TRACE(::testing::Message() << max_sequences << " sequences, " << kv_cache_tokens
                                      << " tokens, cache " << prefix_cache);
    const auto sinks = run(max_sequences, kv_cache_tokens, prefix_cache);
    int n_cached = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      ASSERT_OK(sinks[i]->status());
      ASSERT_EQ(sinks[i]->tokens(), expected[i]->tokens()) << "request " << i;
      for (size_t t = 0; t < sinks[i]->logprobs().size(); ++t) {
        ASSERT_EQ(sinks[i]->logprobs()[t].logprob, expected[i]->logprobs()[t].logprob);
      }
      n_cached += sinks[i]->outcome().cached_tokens;
    }
    EXPECT_EQ(n_cached > 0, prefix_cache);
  }
}

// -- TinyStories-656K ---------------------------------------------------------------------------

std::vector<std::shared_ptr<RecordingSink>> Generate(Engine& engine,
                                                     const std::vector<Request>& requests) {
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (const Request& request : requests) {
    sinks.push_back(std::make_shared<RecordingSink>());
    EXPECT_OK(engine.Submit(request, sinks.back()));
  }
  for (const auto& sink : sinks) sink->WaitForEnd();
  return sinks;
}

std::unique_ptr<Engine> MakeEngine(std::shared_ptr<LoadedModel> model) {
  auto engine = Engine::Create(std::move(model),
                               {.model_name = "stories",
                                .max_sequences = 4,
                                .max_waiting = 20,
                                .max_batch_tokens = 24,
                                .n_threads = 2},
                               Clock::Real());
  EXPECT_OK(engine);
  return *std::move(engine);
}

TEST(TinyStoriesTest, DenseEngineGivesTheReferencesGreedyIds) {
  WALSH_REQUIRE_DATA(directory, "models/TinyStories-656K");
  const auto reference = nlohmann::json::parse(std::ifstream(directory + "/reference.json"));
  const auto prompt = reference["prompt_ids"].get<std::vector<int32_t>>();
  auto expected = reference["greedy_ids"].get<std::vector<int32_t>>();
  expected.erase(expected.begin(), expected.begin() + static_cast<int64_t>(prompt.size()));
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(directory));
  ASSERT_OK_AND_ASSIGN(const auto model, LoadedModel::LoadDense(*checkpoint));
  const auto engine = MakeEngine(model);
  SamplingOptions sampling{.max_tokens = static_cast<int>(expected.size()), .temperature = 0};
  sampling.ignore_eos = true;
  const auto sinks = Generate(*engine, {{.id = "a", .prompt = prompt, .sampling = sampling}});
  EXPECT_OK(sinks[0]->status());
  EXPECT_EQ(sinks[0]->tokens(), expected);
}

TEST(TinyStoriesTest, QuantizedStoriesAreSaneAndEqualInAnyBatch) {
  WALSH_REQUIRE_DATA(directory, "models/TinyStories-656K");
  TempDir dir;
  Quantize(directory, dir / "artifact", 8, rotate::Kind::kGsr);
  ASSERT_OK_AND_ASSIGN(const auto model, LoadedModel::LoadArtifact(dir / "artifact", {}));
  const auto engine = MakeEngine(model);
  std::vector<Request> requests;
  for (const char* prompt : {"Once upon a time", "The little dog was", "Lily and Tom went to the",
                             "One day", "There was a big tree and", "Mom said"}) {
    ASSERT_OK_AND_ASSIGN(auto ids, model->tokenizer().Encode(prompt, {}));
    for (const double temperature : {0.0, 0.8}) {
      Request request{.id = std::string(prompt) + std::to_string(temperature), .prompt = ids};
      request.sampling.max_tokens = 60;
      request.sampling.temperature = temperature;
      request.sampling.top_p = 0.9;
      request.sampling.seed = 11;
      requests.push_back(request);
    }
  }
  const auto together = Generate(*engine, requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE(requests[i].id);
    const auto alone = Generate(*engine, {requests[i]});
    EXPECT_EQ(alone[0]->tokens(), together[i]->tokens());
    EXPECT_EQ(alone[0]->text(), together[i]->text());
    // Stories: mostly letters, spaces and full stops.
    const std::string& text = together[i]->text();
    const auto n_plain = std::count_if(text.begin(), text.end(), [](char c) {
      return std::isalpha(static_cast<unsigned char>(c)) || c == ' ' || c == '.' || c == ',';
    });
    EXPECT_GT(n_plain, static_cast<int64_t>(text.size()) * 9 / 10) << text;
    EXPECT_GT(text.size(), 60u) << text;
  }
}

}  // namespace
}  // namespace walsh::engine
