// config.json: a configuration within every limit, or a refusal.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "tests/fuzz/json_mutator.h"
#include "tests/fuzz/refusal.h"
#include "worker/io/model_config.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  return walsh::fuzz::MutateJsonInput(data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const absl::StatusOr<walsh::ModelConfig> config = walsh::ParseModelConfig(text);
  if (!config.ok()) {
    walsh::fuzz::CheckRefusal(
        config.status(), {absl::StatusCode::kInvalidArgument, absl::StatusCode::kUnimplemented});
    return 0;
  }
  WALSH_CHECK(walsh::ValidateModelConfig(*config, "fuzz").ok());
  WALSH_CHECK_EQ(config->n_heads % config->n_kv_heads, 0);
  // What the model allocates and loops over by.
  WALSH_CHECK_GT(config->q_width(), 0);
  WALSH_CHECK_GT(config->attention_scale(), 0);
  for (int64_t layer = 0; layer < config->n_layers; ++layer)
    WALSH_CHECK_GE(config->window(layer), 0);
  return 0;
}
