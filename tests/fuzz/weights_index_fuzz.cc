// model.safetensors.index.json: shards whose names, which become paths, stay in the model's folder,
// or a refusal.

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/limits.h"
#include "tests/fuzz/json_mutator.h"
#include "tests/fuzz/refusal.h"
#include "worker/io/hf_directory.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  return walsh::fuzz::MutateJsonInput(data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using walsh::fuzz::CheckRefusal;
  const auto map = walsh::ParseWeightMap(std::string(reinterpret_cast<const char*>(data), size));
  if (!map.ok()) {
    CheckRefusal(map.status(), {absl::StatusCode::kInvalidArgument});
    return 0;
  }
  WALSH_CHECK(!map->empty());
  const auto shards = walsh::ShardsOf(*map);
  if (!shards.ok()) {
    CheckRefusal(shards.status(), {absl::StatusCode::kInvalidArgument});
    return 0;
  }
  WALSH_CHECK_LE(static_cast<int64_t>(shards->size()), walsh::limits::kShardsMax);
  for (const std::string& shard : *shards) {
    WALSH_CHECK(shard.ends_with(".safetensors") && !shard.starts_with('.'));
    WALSH_CHECK_EQ(shard.find_first_of(std::string_view("/\\\0", 3)), std::string::npos);
  }
  return 0;
}
