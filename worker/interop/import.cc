#include "worker/interop/import.h"

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

json QuantizationConfig(const GptqCheckpoint& source) {
  return {{"quant_method", "gptq"},
          {"checkpoint_format", "gptq_v2"},
          {"bits", source.bits()},
          {"group_size", source.group_size()},
          {"sym", source.symmetric()},
          {"desc_act", source.has_act_order()},
          {"pack_dtype", "int32"},
          {"lm_head", false},
          {"meta", {{"quantizer", json::array({"imported by walsh:" + std::string(Version())})}}}};
}

json Report(const GptqCheckpoint& source, const std::string& source_sha256) {
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
            {"symmetric", source.symmetric()}}},
          {"rotation", {{"kind", "none"}, {"block", 0}}},
          {"quality", json::object()},
          {"linears", json::array()},
          {"warnings",
           json::array({"quantized by another program: calibration and quality are not known"})}};
}

absl::Status CopyTensor(const GptqCheckpoint& source, const ExpectedTensor& tensor,
                        ArtifactWriter& writer) {
  const std::string linear = LinearName(tensor.name);
  if (!tensor.is_one_dimensional && source.IsQuantized(linear)) {
    WALSH_ASSIGN_OR_RETURN(const OrderedMatrix ordered, source.ReadOrdered(linear));
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
  for (const ExpectedTensor& tensor : tensors) {
    WALSH_RETURN_IF_ERROR(CopyTensor(source, tensor, *writer));
    WALSH_RETURN_IF_ERROR(progress(++n_done, n_total));
  }
  return writer
      ->Finish(QuantizationConfig(source), Report(source, fingerprint), n_threads, keep_going)
      .status();
}

}  // namespace walsh::interop
