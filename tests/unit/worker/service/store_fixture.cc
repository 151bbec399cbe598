#include "tests/unit/worker/service/store_fixture.h"

#include <nlohmann/json.hpp>

#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/artifact_manifest.h"
#include "worker/objects/s3_object_store.h"

namespace walsh::service {

void WriteFakeArtifact(const std::string& directory) {
  ASSERT_OK(MakeDirectories(directory));
  ASSERT_OK(PublishFile(directory + "/config.json", testing::TinyModel({}).ConfigJson()));
  const auto report = nlohmann::json::parse(R"({
      "quantization": {"bits": 4, "group_size": 64, "method": "gptq", "bits_per_weight": 4.5,
                       "zero_point": "float", "overrides": [{"pattern": "*.v_proj", "bits": 8}]},
      "online_transforms": {"activations": {"bits": 8}, "kv_cache": {"bits": 2}},
      "rotation": {"kind": "gsr", "block": 64},
      "quality": {"perplexity_before": 10.0, "perplexity_after": 11.0}})");
  ASSERT_OK_AND_ASSIGN(const std::string manifest, ManifestText(report, {}));
  ASSERT_OK(PublishFile(directory + "/walsh.json", manifest));
}

std::unique_ptr<objects::ObjectStore> StoreThatIsAway() {
  return objects::OpenS3Store({.endpoint = "http://127.0.0.1:1",
                               .region = "us-east-1",
                               .access_key_id = "id",
                               .secret_access_key = "key",
                               .bucket = "bucket",
                               .deadline = absl::Milliseconds(20)})
      .value();
}

void StoreFixture::OpenStore() {
  store_.reset();
  auto store = ModelStore::Open({.root = root_,
                                 .worker_id = "w-1",
                                 .engine = engine_options_,
                                 .drain_timeout = drain_timeout_,
                                 .loader = loader_,
                                 .free_memory = free_memory_,
                                 .exclusive = exclusive_,
                                 .artifacts = artifacts_.get()},
                                clock_);
  ASSERT_OK(store);
  store_ = *std::move(store);
}

}  // namespace walsh::service
