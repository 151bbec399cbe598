#include "tests/testing/tiny_job.h"

#include <fstream>

#include "absl/strings/str_cat.h"
#include "tests/testing/tiny_model.h"

namespace walsh::testing {

TinyJob::TinyJob(int n_layers) {
  TinyModel({.n_layers = n_layers}).WriteHf(dir_ / "tiny");
  std::ofstream text(dir_ / "text.txt");
  for (int i = 0; i < 2000; ++i) text << "Sentence " << i << " says that " << i * 7 << ". ";
}

v1::CreateQuantizationJobRequest TinyJob::Request(const std::string& id) const {
  v1::CreateQuantizationJobRequest request;
  request.set_quantization_job_id(id);
  request.set_request_id(absl::StrCat("request-", id));
  v1::QuantizationJob& job = *request.mutable_quantization_job();
  job.set_source_model(dir_ / "tiny");
  job.set_model_name(absl::StrCat("model-", id));
  v1::QuantizationConfig& config = *job.mutable_config();
  config.set_bits(4);
  config.set_group_size(32);
  config.mutable_calibration()->set_uri(dir_ / "text.txt");
  config.mutable_calibration()->set_num_samples(4);
  config.mutable_calibration()->set_sequence_length(64);
  config.mutable_evaluation()->set_disable(true);
  return request;
}

}  // namespace walsh::testing
