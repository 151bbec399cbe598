#include "tests/testing/tiny_artifact.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/status_macros.h"
#include "worker/io/expected_tensors.h"
#include "worker/tensor/half.h"

namespace walsh::testing {
namespace {

using nlohmann::json;

// Columns in that order; empty: as they are.
Matrix Ordered(Matrix matrix, const std::vector<int32_t>& order) {
  if (order.empty()) return matrix;
  Matrix ordered(matrix.rows(), matrix.cols());
  for (int64_t r = 0; r < matrix.rows(); ++r) {
    for (int64_t c = 0; c < matrix.cols(); ++c) {
      ordered(r, c) = matrix(r, order[static_cast<size_t>(c)]);
    }
  }
  return ordered;
}

absl::Status WriteTensor(const Checkpoint& source, const ExpectedTensor& tensor,
                         const TinyArtifactOptions& options, ArtifactWriter& writer) {
  WALSH_ASSIGN_OR_RETURN(Matrix matrix, source.Read(tensor.name));
  const std::string linear = tensor.name.substr(0, tensor.name.rfind('.'));
  const auto exception = options.bits_of.find(linear);
  const int bits = exception == options.bits_of.end() ? options.bits : exception->second;
  const bool is_linear = !tensor.is_one_dimensional && tensor.name.starts_with("model.layers.");
  if (!is_linear || bits == 0) {
    return writer.WriteDense(tensor.name, matrix, tensor.is_one_dimensional);
  }
  std::vector<int32_t> order;
  if (options.input_order) order = options.input_order(linear, matrix.cols());
  QuantizedMatrix quantized = RoundToNearest(Ordered(std::move(matrix), order), bits,
                                             options.group_size, options.symmetric);
  if (options.edit) options.edit(linear, quantized);
  if (order.empty()) return writer.WriteQuantized(linear, quantized);
  return writer.WriteOrdered(linear, {.matrix = quantized, .input_order = order});
}

}  // namespace

QuantizedMatrix RoundToNearest(const Matrix& weights, int bits, int64_t group_size,
                               bool symmetric) {
  QuantizedMatrix q;
  q.rows = weights.rows();
  q.cols = weights.cols();
  q.bits = bits;
  q.group_size = group_size < 0 ? weights.cols() : group_size;
  q.symmetric = symmetric;
  const float top = static_cast<float>((1 << bits) - 1);
  const float middle = static_cast<float>(1 << (bits - 1));
  for (int64_t r = 0; r < q.rows; ++r) {
    for (int64_t g = 0; g < q.groups(); ++g) {
      const float* v = weights.row(r) + g * q.group_size;
      const auto [low, high] = std::minmax_element(v, v + q.group_size);
      const float step = symmetric ? std::max(-*low, *high) / middle : (*high - *low) / top;
      const float scale = HalfToFloat(FloatToHalf(step));
      const float zero = symmetric ? middle : std::clamp(std::round(-*low / scale), 0.0f, top);
      q.scales.push_back(scale);
      q.zeros.push_back(static_cast<uint8_t>(zero));
      for (int64_t i = 0; i < q.group_size; ++i) {
        const float code = std::round(v[i] / scale) + zero;
        q.codes.push_back(static_cast<uint8_t>(std::clamp(code, 0.0f, top)));
      }
    }
  }
  return q;
}

absl::StatusOr<ArtifactInfo> WriteTinyArtifact(const Checkpoint& source,
                                               const std::string& directory,
                                               const TinyArtifactOptions& options) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactWriter> writer,
                         ArtifactWriter::Create(directory, source));
  ModelConfig config = source.config();
  config.tied_embeddings = false;
  for (const ExpectedTensor& tensor : ExpectedTensors(config)) {
    WALSH_RETURN_IF_ERROR(WriteTensor(source, tensor, options, *writer));
  }
  json quantization = {{"quant_method", "gptq"},   {"checkpoint_format", "gptq_v2"},
                       {"bits", options.bits},     {"group_size", options.group_size},
                       {"sym", options.symmetric}, {"desc_act", false},
                       {"lm_head", false}};
  if (options.quantization_config.is_object())
    quantization.merge_patch(options.quantization_config);
  json report = {{"quantization",
                  {{"bits", options.bits},
                   {"group_size", options.group_size},
                   {"symmetric", options.symmetric},
                   {"method", "rtn"}}},
                 {"rotation", {{"kind", "none"}, {"block", 0}}}};
  return writer->Finish(quantization, std::move(report), /*n_threads=*/2);
}

}  // namespace walsh::testing
