// Goal:   one seed, one artifact: byte for byte, in two runs and with one and two worker threads.
// Method: the same job on services with different thread counts; every file of the artifacts is
//         compared, walsh.json after removal of what tells runs apart on purpose.
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "common/publish.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_model.h"

namespace walsh {
namespace {

using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TestModel;

using Files = std::map<std::string, std::string>;

// The published files of a model: the folder that holds walsh.json.
Files ArtifactFiles(const std::string& data_dir) {
  Files files;
  std::filesystem::path artifact;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(data_dir)) {
    if (entry.path().filename() == "walsh.json") artifact = entry.path().parent_path();
  }
  if (artifact.empty()) return files;
  for (const auto& entry : std::filesystem::directory_iterator(artifact)) {
    files[entry.path().filename()] = ReadFile(entry.path(), 1 << 30).value_or("unreadable");
  }
  return files;
}

Files QuantizeWith(const TestModel& model, int n_threads) {
  testing::ServiceOptions options;
  options.model_roots = {model.root()};
  options.n_threads = n_threads;
  ServiceFixture service(options);
  EXPECT_OK(service.Start());
  v1::CreateQuantizationJobRequest request;
  request.set_quantization_job_id("same");
  v1::QuantizationJob& job = *request.mutable_quantization_job();
  job.set_source_model(model.path());
  job.set_model_name("m");
  v1::QuantizationConfig& config = *job.mutable_config();
  config.set_bits(3);
  config.set_seed(42);
  config.mutable_rotation()->set_signs(v1::Rotation::SEEDED);
  // Text that the model writes itself: the seed decides that, too.
  config.mutable_calibration()->set_num_samples(8);
  config.mutable_calibration()->set_sequence_length(128);
  config.mutable_evaluation()->set_max_windows(4);
  config.mutable_evaluation()->set_sequence_length(128);
  const auto created = service.client().CreateJob(request);
  EXPECT_OK(created);
  if (!created.ok()) return {};
  const auto finished = service.client().WatchJob(created->name(), 0, {});
  EXPECT_OK(finished);
  EXPECT_TRUE(finished.ok() && finished->state() == v1::QuantizationJob::SUCCEEDED);
  return ArtifactFiles(service.worker_data_dir());
}

void ExpectEqual(const Files& a, const Files& b) {
  ASSERT_FALSE(a.empty());
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, contents] : a) {
    ASSERT_EQ(b.count(name), 1u) << name;
    EXPECT_TRUE(contents == b.at(name)) << name << " differs";
  }
}

TEST(DeterminismTest, RunsAndThreadCountsGiveTheSameBytes) {
  const TestModel model;
  const Files first = QuantizeWith(model, 1);
  EXPECT_EQ(first.count("model-00001-of-00001.safetensors"), 1u);
  ExpectEqual(first, QuantizeWith(model, 1));
  ExpectEqual(first, QuantizeWith(model, 2));
}

}  // namespace
}  // namespace walsh
