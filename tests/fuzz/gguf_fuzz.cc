// A GGUF file from its first byte to a model whose weights are read and a tokenizer that encodes.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "tests/fuzz/gguf_mutator.h"
#include "tests/fuzz/refusal.h"
#include "tests/fuzz/tokenizer_properties.h"
#include "worker/io/checkpoint.h"
#include "worker/io/file_checkpoint.h"
#include "worker/io/random_access_file.h"

namespace walsh::fuzz {
namespace {

constexpr absl::StatusCode kInvalidArgument = absl::StatusCode::kInvalidArgument;
constexpr absl::StatusCode kDataLoss = absl::StatusCode::kDataLoss;
constexpr absl::StatusCode kUnimplemented = absl::StatusCode::kUnimplemented;

// Every value of what the configuration promises is there and finite, or the tensor is refused.
void CheckTensor(const Checkpoint& checkpoint, std::string_view tensor, int64_t n_values) {
  const absl::StatusOr<Matrix> weights = checkpoint.Read(tensor);
  if (!weights.ok()) return CheckRefusal(weights.status(), {kDataLoss});
  WALSH_CHECK_EQ(weights->size(), n_values);
  for (int64_t i = 0; i < n_values; ++i) WALSH_CHECK(std::isfinite(weights->data()[i]));
}

void CheckWeights(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  for (const std::string_view tensor : {kEmbeddingTensor, kFinalNormTensor, kLmHeadTensor}) {
    WALSH_CHECK(checkpoint.Has(tensor));
  }
  CheckTensor(checkpoint, kEmbeddingTensor, config.vocab * config.hidden);
  CheckTensor(checkpoint, kFinalNormTensor, config.hidden);
  CheckTensor(checkpoint, kLmHeadTensor, config.vocab * config.hidden);
  CheckTensor(checkpoint, LayerTensor(0, "mlp.down_proj.weight"),
              config.hidden * config.intermediate);
}

void Check(std::span<const std::byte> bytes) {
  const auto checkpoint = MakeGgufCheckpoint(MemoryFile("fuzz.gguf", bytes), "fuzz.gguf");
  if (!checkpoint.ok()) {
    CheckRefusal(checkpoint.status(), {kInvalidArgument, kDataLoss, kUnimplemented});
    return;
  }
  CheckWeights(**checkpoint);
  CheckTokenizer((*checkpoint)->tokenizer());
}

}  // namespace
}  // namespace walsh::fuzz

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  return walsh::fuzz::MutateGgufInput(data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  walsh::fuzz::Check(std::as_bytes(std::span(data, size)));
  return 0;
}
