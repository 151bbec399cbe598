// The format "pack-quantized" of the library compressed-tensors, which vLLM reads.
//
//   <linear>.weight_packed      [out, in/32·bits] I32  codes, packed along in
//   <linear>.weight_scale       [out, groups] F16
//   <linear>.weight_zero_point  [out/32·bits, groups] I32  zeros, packed along out; not there where
//                               the quantization is symmetric
//   <linear>.weight_shape       [2] I64  out, in
//
// The library counts from -2^(bits-1): it stores code and zero plus 2^(bits-1), which is what we
// have. Its packing is the stream of bits of worker/io/gptq_packing.h, along the other dimension.
//
// Source:  compressed_tensors/compressors/pack_quantized; golden against it (tests/golden/interop)

#include <algorithm>
#include <cstddef>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/interop/hf_sink.h"
#include "worker/io/gptq_packing.h"
#include "worker/tensor/half.h"

namespace walsh::interop {
namespace {

using nlohmann::json;

json Weights(int bits, int64_t group_size, bool is_per_channel, bool symmetric) {
  return {{"num_bits", bits},
          {"type", "int"},
          {"symmetric", symmetric},
          {"strategy", is_per_channel ? "channel" : "group"},
          {"group_size", is_per_channel ? json() : json(group_size)},
          {"dynamic", false},
          {"actorder", nullptr},
          {"block_structure", nullptr},
          {"observer", "minmax"},
          {"observer_kwargs", json::object()}};
}

// One group of linears for each width and group size.
json ConfigGroups(const std::vector<LinearForm>& linears, bool symmetric) {
  std::map<std::pair<int, int64_t>, std::vector<const LinearForm*>> by_form;
  for (const LinearForm& linear : linears) {
    by_form[{linear.bits, linear.is_per_channel ? -1 : linear.group_size}].push_back(&linear);
  }
  json groups = json::object();
  for (const auto& [form, members] : by_form) {
    json targets = json::array();
    if (by_form.size() == 1) targets.push_back("Linear");
    if (by_form.size() > 1) {
      for (const LinearForm* linear : members) targets.push_back(linear->name);
    }
    groups[absl::StrCat("group_", groups.size())] = {
        {"targets", std::move(targets)},
        {"weights", Weights(form.first, form.second, form.second < 0, symmetric)},
        {"input_activations", nullptr},
        {"output_activations", nullptr}};
  }
  return groups;
}

bool HasSeveralForms(const std::vector<LinearForm>& linears) {
  return std::any_of(linears.begin(), linears.end(), [&](const LinearForm& linear) {
    const LinearForm& first = linears.front();
    return linear.bits != first.bits || linear.is_per_channel != first.is_per_channel ||
           (!linear.is_per_channel && linear.group_size != first.group_size);
  });
}

class CompressedTensorsSink final : public HfSink {
 public:
  CompressedTensorsSink(const ArtifactReader& artifact, json config_json,
                        const ExportOptions& options, std::string directory,
                        const std::vector<LinearForm>& linears)
      : HfSink(artifact, std::move(config_json), StorageType::kBf16, options, std::move(directory)),
        symmetric_(artifact.info().symmetric),
        is_mixed_(HasSeveralForms(linears)) {
    json ignore = DenseLinears(artifact);
    ignore.push_back("lm_head");
    config()["quantization_config"] = {{"quant_method", "compressed-tensors"},
                                       {"format", "pack-quantized"},
                                       {"quantization_status", "compressed"},
                                       {"global_compression_ratio", nullptr},
                                       {"kv_cache_scheme", nullptr},
                                       {"config_groups", ConfigGroups(linears, symmetric_)},
                                       {"ignore", std::move(ignore)}};
  }

  absl::Status WriteLinear(const std::string& name, const QuantizedMatrix& matrix) override {
    WALSH_RETURN_IF_ERROR(WriteCodes(name, matrix));
    WALSH_RETURN_IF_ERROR(WriteScales(name, matrix));
    const int64_t shape[] = {matrix.rows, matrix.cols};
    WALSH_RETURN_IF_ERROR(
        weights().Write(name + ".weight_shape", "I64", {2}, std::as_bytes(std::span(shape))));
    return symmetric_ ? CheckSymmetric(name, matrix) : WriteZeros(name, matrix);
  }

  std::vector<std::string> warnings() const override {
    std::vector<std::string> warnings;
    if (!symmetric_) {
      warnings.push_back(
          "transformers (5.24 with compressed-tensors 0.20) loads asymmetric zeros only with "
          "CompressedTensorsConfig(dequantize=True)");
    }
    if (is_mixed_) {
      warnings.push_back(
          "linears differ in width or group: transformers (5.24 with compressed-tensors 0.20) "
          "reads all by one scheme when told to dequantize, which gives wrong weights");
    }
    return warnings;
  }

 private:
  absl::Status WriteCodes(const std::string& name, const QuantizedMatrix& m) {
    std::vector<uint32_t> words(static_cast<size_t>(m.rows * m.cols / 32 * m.bits));
    PackValues(m.codes, m.bits, words);
    return weights().Write(name + ".weight_packed", "I32", {m.rows, m.cols / 32 * m.bits},
                           std::as_bytes(std::span(words)));
  }

  absl::Status WriteScales(const std::string& name, const QuantizedMatrix& m) {
    std::vector<uint16_t> halves(m.scales.size());
    std::transform(m.scales.begin(), m.scales.end(), halves.begin(), FloatToHalf);
    return weights().Write(name + ".weight_scale", "F16", {m.rows, m.groups()},
                           std::as_bytes(std::span(halves)));
  }

  absl::Status WriteZeros(const std::string& name, const QuantizedMatrix& m) {
    const int64_t n_words = m.rows / kPackingRun * m.bits;  // of a group
    std::vector<uint8_t> column(static_cast<size_t>(m.rows));
    std::vector<uint32_t> packed(static_cast<size_t>(n_words));
    std::vector<uint32_t> words(static_cast<size_t>(n_words * m.groups()));
    for (int64_t group = 0; group < m.groups(); ++group) {
      for (int64_t row = 0; row < m.rows; ++row) {
        column[static_cast<size_t>(row)] = m.zeros[static_cast<size_t>(row * m.groups() + group)];
      }
      PackValues(column, m.bits, packed);
      for (int64_t word = 0; word < n_words; ++word) {
        words[static_cast<size_t>(word * m.groups() + group)] = packed[static_cast<size_t>(word)];
      }
    }
    return weights().Write(name + ".weight_zero_point", "I32", {n_words, m.groups()},
                           std::as_bytes(std::span(words)));
  }

  // Without zeros in the file every one of them is taken for the middle.
  static absl::Status CheckSymmetric(const std::string& name, const QuantizedMatrix& m) {
    const int middle = 1 << (m.bits - 1);
    for (const uint8_t zero : m.zeros) {
      if (zero == middle) continue;
      return OfLinear(name, absl::FailedPreconditionError(absl::StrCat(
                                "a zero is ", static_cast<int>(zero),
                                " in an artifact that says it is symmetric, expected ", middle)));
    }
    return absl::OkStatus();
  }

  const bool symmetric_;
  const bool is_mixed_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TensorSink>> MakeCompressedTensorsSink(
    const ArtifactReader& artifact, const ExportOptions& options, const std::string& directory) {
  WALSH_ASSIGN_OR_RETURN(json config, ConfigOfArtifact(artifact));
  WALSH_ASSIGN_OR_RETURN(const std::vector<LinearForm> linears, LinearForms(artifact));
  for (const LinearForm& linear : linears) {
    if (linear.bits == 4 || linear.bits == 8) continue;
    return OfLinear(linear.name, absl::FailedPreconditionError(
                                     absl::StrCat(linear.bits,
                                                  " bits: what reads compressed-tensors runs 4 and "
                                                  "8; gptq_v2 holds 2 and 3")));
  }
  return std::make_unique<CompressedTensorsSink>(artifact, std::move(config), options, directory,
                                                 linears);
}

}  // namespace walsh::interop
