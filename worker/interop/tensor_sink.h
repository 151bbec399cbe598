// Where an export's tensors go: one implementation for each family of formats.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/interop/export.h"
#include "worker/io/artifact.h"
#include "worker/io/expected_tensors.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::interop {

class TensorSink {
 public:
  virtual ~TensorSink() = default;
  // `name` without suffix: "model.layers.0.mlp.down_proj".
  virtual absl::Status WriteLinear(const std::string& name, const QuantizedMatrix& matrix) = 0;
  // A tensor that is not quantized: its values, BF16 by their bits, follow row by row.
  virtual absl::Status BeginDense(const ExpectedTensor& tensor) = 0;
  virtual absl::Status AppendDense(std::span<const uint16_t> values) = 0;
  // Writes the other files and syncs; the names of all files.
  virtual absl::StatusOr<std::vector<std::string>> Finish() = 0;
  virtual std::vector<std::string> warnings() const { return {}; }
};

// In the order of ExpectedTensors(), as all sinks get them. Each looks at what the whole artifact
// has and refuses what its format does not hold.
absl::StatusOr<std::unique_ptr<TensorSink>> MakeDequantizedSink(const ArtifactReader& artifact,
                                                                const ExportOptions& options,
                                                                const std::string& directory);
absl::StatusOr<std::unique_ptr<TensorSink>> MakeGptqSink(const ArtifactReader& artifact,
                                                         const ExportOptions& options,
                                                         const std::string& directory);
absl::StatusOr<std::unique_ptr<TensorSink>> MakeCompressedTensorsSink(
    const ArtifactReader& artifact, const ExportOptions& options, const std::string& directory);
absl::StatusOr<std::unique_ptr<TensorSink>> MakeGgufSink(const ArtifactReader& artifact,
                                                         const ExportOptions& options,
                                                         const std::string& directory);

// "linear 'model.layers.0.mlp.down_proj': …"
absl::Status OfLinear(const std::string& name, const absl::Status& status);
// The name of a linear by that of its weight.
std::string LinearName(const std::string& weight);

}  // namespace walsh::interop
