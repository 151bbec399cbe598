#include "worker/interop/import.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "common/status_macros.h"
#include "common/utf8.h"
#include "common/version.h"
#include "worker/interop/tensor_sink.h"
#include "worker/io/artifact.h"
#include "worker/io/expected_tensors.h"

namespace walsh::interop {
namespace {

using nlohmann::json;

constexpr char kMethod[] = "gptq (imported)";

// What the tensors say, whatever the checkpoint's own configuration does.
struct Found {
  bool is_symmetric = true;  // every zero is the middle
  bool has_order = false;    // columns that are not sorted by group

  void Add(const OrderedMatrix& ordered) {
    const int middle = 1 << (ordered.matrix.bits - 1);
    has_order |= !ordered.input_order.empty();
    is_symmetric &= std::ranges::all_of(ordered.matrix.zeros,
                                        [middle](uint8_t zero) { return zero == middle; });
  }
};

json QuantizationConfig(const GptqCheckpoint& source, const Found& found) {
  return {{"quant_method", "gptq"},
          {"checkpoint_format", "gptq_v2"},
          {"bits", source.bits()},
          {"group_size", source.group_size()},
          {"sym", found.is_symmetric},
          {"desc_act", found.has_order},
          {"pack_dtype", "int32"},
          {"lm_head", false},
          {"meta", {{"quantizer", json::array({"imported by walsh:" + std::string(Version())})}}}};
}

json Report(const GptqCheckpoint& source, const Found& found, const std::string& source_sha256) {
  return {{"walsh_version", std::string(Version())},
          {"source",
           {{"format", source.format()},
            {"architecture", source.config().architecture},
            {"sha256", source_sha256},
            {"size_bytes", source.size_bytes()},
            {"license", ReplaceInvalidUtf8(source.license())}}},
          {"quantization",
           {{"method", kMethod},
            {"bits", source.bits()},
            {"group_size", source.group_size()},
            {"symmetric", found.is_symmetric}}},
          {"rotation", {{"kind", "none"}, {"block", 0}}},
          {"quality", json::object()},
          {"linears", json::array()},
          {"warnings",
           json::array({"quantized by another program: calibration and quality are not known"})}};
}

absl::Status CopyTensor(const GptqCheckpoint& source, const ExpectedTensor& tensor,
                        ArtifactWriter& writer, Found& found) {
  const std::string linear = LinearName(tensor.name);
  if (!tensor.is_one_dimensional && source.IsQuantized(linear)) {
    WALSH_ASSIGN_OR_RETURN(const OrderedMatrix ordered, source.ReadOrdered(linear));
    found.Add(ordered);
    return writer.WriteOrdered(linear, ordered);
  }
  WALSH_ASSIGN_OR_RETURN(const Matrix matrix, source.Read(tensor.name));
  return writer.WriteDense(tensor.name, matrix, tensor.is_one_dimensional);
}

}  // namespace

absl::Status ImportGptq(const GptqCheckpoint& source, const std::string& directory, int n_threads,
                        const ImportProgress& progress) {
  ModelConfig config = source.config();
  config.tied_embeddings = false;
  const std::vector<ExpectedTensor> tensors = ExpectedTensors(config);
  const auto n_total = static_cast<int64_t>(tensors.size());
  int64_t n_done = 0;
  const KeepGoing keep_going = [&] { return progress(n_done, n_total); };
  WALSH_ASSIGN_OR_RETURN(const std::string fingerprint, source.Fingerprint(n_threads, keep_going));
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactWriter> writer,
                         ArtifactWriter::Create(directory, source));
  Found found;
  for (const ExpectedTensor& tensor : tensors) {
    WALSH_RETURN_IF_ERROR(CopyTensor(source, tensor, *writer, found));
    WALSH_RETURN_IF_ERROR(progress(++n_done, n_total));
  }
  return writer
      ->Finish(QuantizationConfig(source, found), Report(source, found, fingerprint), n_threads,
               keep_going)
      .status();
}

}  // namespace walsh::interop
