// Quantization jobs so small that one takes a tenth of a second: a seeded model and a text on disk.
#pragma once

#include <string>

#include "tests/testing/test_data.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::testing {

class TinyJob {
 public:
  explicit TinyJob(int n_layers = 2);

  const std::string& root() const { return dir_.path(); }  // the model and the text are under it
  // The model is model-ID, the request's id request-ID.
  v1::CreateQuantizationJobRequest Request(const std::string& id) const;

 private:
  const TempDir dir_;
};

}  // namespace walsh::testing
