#include "tests/testing/golden_model.h"

#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "common/check.h"
#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/golden.h"
#include "tests/testing/tiny_model.h"

namespace walsh::testing {
namespace {

std::string Golden(const std::string& family, const std::string& name) {
  return GoldenFile("models/" + family + "/" + name);
}

}  // namespace

const std::vector<std::string>& GoldenFamilies() {
  static const std::vector<std::string> families = {"qwen2",   "qwen2_sliding", "qwen3",
                                                    "mistral", "phi3",          "gemma3"};
  return families;
}

GoldenModel ReadGoldenModel(const std::string& family) {
  const auto expected = nlohmann::json::parse(Golden(family, "expected.json"));
  GoldenModel model;
  model.tokens = expected["tokens"].get<std::vector<int32_t>>();
  model.logits = Matrix(expected["shape"][0], expected["shape"][1]);
  const std::string bytes = Golden(family, "logits.bin");
  WALSH_CHECK_EQ(bytes.size(), static_cast<size_t>(model.logits.size()) * sizeof(float));
  std::memcpy(model.logits.data(), bytes.data(), bytes.size());
  return model;
}

void WriteGoldenModel(const std::string& family, const std::string& directory) {
  std::filesystem::create_directories(directory);
  for (const char* name : {"config.json", "model.safetensors"}) {
    WriteFile(directory + "/" + name, Golden(family, name));
  }
  const TinyModel tokenizer({.vocab = ReadGoldenModel(family).logits.cols()});
  WriteFile(directory + "/tokenizer.json", tokenizer.TokenizerJson());
  WriteFile(directory + "/tokenizer_config.json", tokenizer.TokenizerConfigJson());
}

}  // namespace walsh::testing
