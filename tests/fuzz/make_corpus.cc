// make_fuzz_corpus FOLDER: writes the seeds of every fuzz target, FOLDER/<target>/<seed>.
//
// They are small valid inputs that show each a form or an option; from them the fuzzers find the
// rest. Run from the root of the repository: some are the inputs of tests/golden.

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "server/jobs/job_query.h"
#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/golden.h"
#include "tests/testing/tiny_model.h"
#include "walsh/v1/generation.pb.h"
#include "walsh/v1/quantization.pb.h"
#include "worker/io/artifact_manifest.h"
#include "worker/io/storage_type.h"

namespace walsh::fuzz {
namespace {

using nlohmann::json;
using testing::GgufBuilder;
using testing::SafetensorsBytes;

class Corpus {
 public:
  explicit Corpus(std::string folder) : folder_(std::move(folder)) {}

  void Add(const std::string& target, const std::string& seed, std::string_view bytes) const {
    std::filesystem::create_directories(folder_ + "/" + target);
    testing::WriteFile(absl::StrCat(folder_, "/", target, "/", seed), bytes);
  }

 private:
  std::string folder_;
};

json GoldenJson(const std::string& relative) { return json::parse(testing::GoldenFile(relative)); }

void AddSafetensors(const Corpus& corpus) {
  const auto add = [&](const std::string& seed, std::string_view header, size_t n_bytes) {
    corpus.Add("safetensors", seed, SafetensorsBytes(header, std::string(n_bytes, 'w')));
  };
  add("empty", "{}", 0);
  add("metadata", R"({"__metadata__":{"format":"pt"}})", 0);
  add("scalar", R"({"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}})", 8);
  add("no_elements", R"({"a":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}})", 0);
  add("out_of_order",
      R"({"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},)"
      R"("a":{"data_offsets":[0,4],"shape":[1,1,4],"dtype":"I8"}}   )",
      16);
  json every_dtype;
  for (const char* dtype : {"BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16",
                            "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64"}) {
    every_dtype[dtype] = {{"dtype", dtype}, {"shape", json::array({0})}, {"data_offsets", {0, 0}}};
  }
  add("every_dtype", every_dtype.dump(), 0);
}

// A Llama of one layer whose weights are all of one type.
std::string Gguf(StorageType type, const GgufBuilder& vocabulary) {
  const StorageTypeInfo& info = Info(type);
  const auto hidden = static_cast<uint64_t>(info.block_elements > 32 ? info.block_elements : 32);
  constexpr uint64_t kVocabulary = 4;
  GgufBuilder gguf = vocabulary;
  gguf.String("general.architecture", "llama")
      .String("tokenizer.chat_template", "{{ messages[0]['content'] }}")
      .Uint32("llama.block_count", 1)
      .Uint32("llama.context_length", 64)
      .Uint32("llama.embedding_length", static_cast<uint32_t>(hidden))
      .Uint32("llama.feed_forward_length", static_cast<uint32_t>(hidden))
      .Uint32("llama.attention.head_count", 2)
      .Uint32("llama.attention.head_count_kv", 1)
      .Float32("llama.attention.layer_norm_rms_epsilon", 1e-5f)
      .Float32("llama.rope.freq_base", 10000);
  const auto add = [&](const std::string& name, uint64_t rows, StorageType stored) {
    const StorageTypeInfo& form = Info(stored);
    const uint64_t bytes = rows * hidden / static_cast<uint64_t>(form.block_elements) *
                           static_cast<uint64_t>(form.block_bytes);
    std::vector<uint64_t> dims = {hidden};
    if (rows > 1) dims.push_back(rows);
    gguf.Tensor(name, dims, form.ggml_id, std::string(bytes, '\1'));
  };
  add("token_embd.weight", kVocabulary, type);
  add("output_norm.weight", 1, StorageType::kF32);
  for (const char* norm : {"attn_norm", "ffn_norm"}) {
    add(absl::StrCat("blk.0.", norm, ".weight"), 1, StorageType::kF32);
  }
  for (const char* linear : {"attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}) {
    add(absl::StrCat("blk.0.", linear, ".weight"), hidden, type);
  }
  for (const char* linear : {"attn_k", "attn_v"}) {
    add(absl::StrCat("blk.0.", linear, ".weight"), hidden / 2, type);
  }
  return gguf.Build();
}

void AddGguf(const Corpus& corpus) {
  GgufBuilder sentencepiece;
  sentencepiece.String("tokenizer.ggml.model", "llama")
      .Strings("tokenizer.ggml.tokens", {"<unk>", "<s>", "<0x0A>", "▁a"})
      .Floats("tokenizer.ggml.scores", {0, 0, 0, -1})
      .Ints("tokenizer.ggml.token_type", {2, 3, 6, 1})
      .Uint32("tokenizer.ggml.bos_token_id", 1)
      .Bool("tokenizer.ggml.add_bos_token", true);
  GgufBuilder byte_level;
  byte_level.String("tokenizer.ggml.model", "gpt2")
      .String("tokenizer.ggml.pre", "llama-bpe")
      .Strings("tokenizer.ggml.tokens", {"a", "b", "ab", "<|end|>"})
      .Ints("tokenizer.ggml.token_type", {1, 1, 1, 3})
      .Strings("tokenizer.ggml.merges", {"a b"})
      .Uint32("tokenizer.ggml.bos_token_id", 3)
      .Uint32("tokenizer.ggml.eos_token_id", 3);
  for (const StorageType type :
       {StorageType::kF16, StorageType::kQ4_0, StorageType::kQ5_1, StorageType::kQ8_0}) {
    corpus.Add("gguf", absl::AsciiStrToLower(std::string(Info(type).name)),
               Gguf(type, type == StorageType::kF16 ? byte_level : sentencepiece));
  }
  corpus.Add("gguf", "metadata_only", byte_level.Build());
}

void AddModelConfigs(const Corpus& corpus) {
  for (const char* family : {"Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma3"}) {
    const testing::TinyModel model({.architecture = absl::StrCat(family, "ForCausalLM")});
    corpus.Add("model_config", absl::AsciiStrToLower(family), model.ConfigJson());
  }
  const testing::TinyModel scaled(
      {.config_overrides =
           R"({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
               "eos_token_id": [1, 2], "head_dim": null})"});
  corpus.Add("model_config", "llama3_scaling", scaled.ConfigJson());
}

void AddWeightsIndexes(const Corpus& corpus) {
  corpus.Add("weights_index", "two_shards",
             R"({"metadata":{"total_size":96},"weight_map":{)"
             R"("lm_head.weight":"model-00002-of-00002.safetensors",)"
             R"("model.embed_tokens.weight":"model-00001-of-00002.safetensors",)"
             R"("model.norm.weight":"model-00002-of-00002.safetensors"}})");
}

void AddManifests(const Corpus& corpus) {
  const std::string digest(64, 'a');
  const absl::StatusOr<std::string> plain =
      ManifestText({{"quantization", {{"bits", 4}, {"group_size", 32}}}}, {});
  WALSH_CHECK(plain.ok());
  corpus.Add("artifact_manifest", "plain", *plain);
  const absl::StatusOr<std::string> whole = ManifestText(
      {{"quantization",
        {{"bits", 2},
         {"group_size", -1},
         {"symmetric", true},
         {"bits_per_weight", 2.5},
         {"grid", "codebook"},
         {"method", "gptq"},
         {"overrides", {{{"pattern", "*"}, {"bits", 8}}}}}},
       {"rotation", {{"kind", "gsr"}, {"block", 64}}},
       {"online_transforms", {{"activations", {{"bits", 4}}}, {"kv_cache", {{"bits", 8}}}}},
       {"quality", {{"perplexity_before", 5.5}, {"perplexity_after", 6}}}},
      {{"config.json", {.size_bytes = 3, .sha256 = {digest}}},
       {"model.safetensors", {.size_bytes = 65 << 20, .sha256 = {digest, digest}}}});
  WALSH_CHECK(whole.ok());
  corpus.Add("artifact_manifest", "whole", *whole);
}

void AddTokenizers(const Corpus& corpus) {
  const json golden = GoldenJson("tokenizer/synthetic.json");
  for (const json& tokenizer : golden["tokenizers"]) {
    std::string seed = tokenizer["name"];
    for (char& c : seed) {
      if (!absl::ascii_isalnum(static_cast<unsigned char>(c))) c = '_';
    }
    corpus.Add("tokenizer_json", seed, tokenizer["json"].dump());
  }
  std::string model;
  absl::Base64Unescape(golden["sentencepiece"]["model"].get<std::string>(), &model);
  corpus.Add("sentencepiece_model", "synthetic", model);
}

// Some snippets of one file; each alone would be a file of few bytes.
void AddChatTemplates(const Corpus& corpus) {
  const json templates = GoldenJson("tokenizer/chat_templates.json");
  for (const auto& [name, source] : templates["templates"].items()) {
    corpus.Add("chat_template", name, source.get<std::string>());
  }
  constexpr int kSnippetsInFile = 16;
  // What the snippets use.
  constexpr std::string_view kVariables =
      "{% set s = 'text' %}{% set d = {'k': {'j': 7}, 'list': [{'z': 'q'}, {'z': 'r'}], "
      "'none_value': none} %}\n";
  std::string joined(kVariables);
  int n = 0;
  const json snippets = GoldenJson("tokenizer/jinja_snippets.json");
  for (const json& snippet : snippets["snippets"]) {
    if (!snippet.contains("output")) continue;
    joined += snippet["source"].get<std::string>() + "\n";
    if (++n % kSnippetsInFile != 0) continue;
    corpus.Add("chat_template", absl::StrCat("snippets_", n / kSnippetsInFile), joined);
    joined = kVariables;
  }
}

void AddRequests(const Corpus& corpus) {
  v1::GenerateRequest generate;
  generate.set_model("models/tiny");
  generate.set_prompt("Once upon a time");
  v1::SamplingParams* sampling = generate.mutable_sampling();
  sampling->set_max_tokens(16);
  sampling->set_temperature(0.7);
  sampling->set_top_p(0.9);
  sampling->add_stop("\n");
  sampling->add_stop_token_ids(2);
  sampling->set_logprobs(true);
  sampling->set_top_logprobs(5);
  corpus.Add("generation_request", "generate", generate.SerializeAsString());
  generate.mutable_token_ids()->add_ids(7);
  corpus.Add("generation_request", "generate_token_ids", generate.SerializeAsString());
  v1::ChatRequest chat;
  chat.set_model("tiny");
  chat.set_request_id("r-1");
  v1::ChatMessage* message = chat.add_messages();
  message->set_role("user");
  message->set_content("Hello");
  corpus.Add("generation_request", "chat", chat.SerializeAsString());
  v1::DetokenizeRequest detokenize;
  detokenize.set_model("tiny");
  detokenize.add_token_ids(1);
  corpus.Add("generation_request", "detokenize", detokenize.SerializeAsString());
}

void AddJobs(const Corpus& corpus) {
  v1::CreateQuantizationJobRequest request;
  v1::QuantizationJob* job = request.mutable_quantization_job();
  job->set_source_model("models/tiny");
  job->set_model_name("tiny-4bit");
  corpus.Add("quantization_job", "defaults", request.SerializeAsString());
  v1::QuantizationConfig* config = job->mutable_config();
  config->set_method(v1::QuantizationConfig::GPTQ);
  config->set_bits(2);
  config->set_group_size(64);
  config->set_grid(v1::QuantizationConfig::CODEBOOK);
  config->mutable_rotation()->set_kind(v1::Rotation::GSR);
  config->mutable_rotation()->set_block_size(64);
  v1::BitsOverride* bits = config->add_overrides();
  bits->set_pattern("layers.{0-3}.mlp.down_proj");
  bits->set_bits(4);
  config->mutable_quality_gate()->set_max_perplexity_ratio(1.5);
  (*job->mutable_labels())["team"] = "a";
  corpus.Add("quantization_job", "codebook", request.SerializeAsString());
  config->Clear();
  config->set_bits(4);
  config->mutable_activation_quantization()->set_bits(4);
  config->mutable_kv_cache_quantization()->set_bits(4);
  config->mutable_rotation()->set_online_kind(v1::Rotation::WALSH);
  corpus.Add("quantization_job", "run_time", request.SerializeAsString());
  config->Clear();
  config->set_preset("gsr-w4a4kv4");
  request.set_quantization_job_id("job-1");
  request.set_request_id("r-1");
  corpus.Add("quantization_job", "preset", request.SerializeAsString());
}

void AddJobQueries(const Corpus& corpus) {
  v1::ListQuantizationJobsRequest request;
  corpus.Add("job_query", "all", request.SerializeAsString());
  request.set_page_size(10);
  request.set_filter("state=RUNNING AND model_name=\"tiny-4bit\"");
  request.set_order_by("create_time");
  corpus.Add("job_query", "filtered", request.SerializeAsString());
  // Of the list without a filter.
  request.Clear();
  request.set_page_token(
      jobs::PageToken(*jobs::ParseQuery(v1::ListQuantizationJobsRequest(), "tenant"), 7));
  corpus.Add("job_query", "second_page", request.SerializeAsString());
}

void AddXml(const Corpus& corpus) {
  constexpr std::string_view kDeclaration = R"(<?xml version="1.0" encoding="UTF-8"?>)";
  const auto add = [&](const std::string& seed, std::string_view xml) {
    corpus.Add("xml", seed, absl::StrCat(std::string(kDeclaration), "\n", std::string(xml)));
  };
  add("list",
      "<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>bucket</Name>"
      "<Prefix>models/a&amp;b/</Prefix><KeyCount>2</KeyCount><IsTruncated>true</IsTruncated>"
      "<NextContinuationToken>1ueGcx&#x2F;pPHR&#47;</NextContinuationToken>"
      "<Contents><Key>models/a&amp;b/model.json</Key><Size>812</Size>"
      "<LastModified>2026-11-28T10:00:00.000Z</LastModified><ETag>&quot;9bb5&quot;</ETag>"
      "</Contents><Contents><Key>models/a&amp;b/&lt;c&gt;&apos;</Key><Size>0</Size>"
      "<LastModified>2026-11-28T10:00:01.000Z</LastModified></Contents></ListBucketResult>");
  add("error", "<Error><Code>NoSuchKey</Code><Message>m</Message><Key>a</Key></Error>");
  add("upload",
      "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>a</Key><UploadId>VXBsb2Fk</UploadId>"
      "</InitiateMultipartUploadResult>");
  add("completed",
      "<CompleteMultipartUploadResult><Key>a</Key><ETag>&#34;3858&#34;</ETag>"
      "</CompleteMultipartUploadResult>");
}

}  // namespace
}  // namespace walsh::fuzz

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const walsh::fuzz::Corpus corpus(argv[1]);
  walsh::fuzz::AddSafetensors(corpus);
  walsh::fuzz::AddGguf(corpus);
  walsh::fuzz::AddModelConfigs(corpus);
  walsh::fuzz::AddWeightsIndexes(corpus);
  walsh::fuzz::AddManifests(corpus);
  walsh::fuzz::AddTokenizers(corpus);
  walsh::fuzz::AddChatTemplates(corpus);
  walsh::fuzz::AddRequests(corpus);
  walsh::fuzz::AddJobs(corpus);
  walsh::fuzz::AddJobQueries(corpus);
  walsh::fuzz::AddXml(corpus);
  return 0;
}
