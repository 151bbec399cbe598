#include "server/jobs/presets.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/grpc_status.h"

namespace walsh::jobs {
namespace {

using v1::QuantizationConfig;
using v1::QuantizationPreset;
using v1::Rotation;

constexpr int kAutoGroup = 0;
constexpr int kPerChannel = -1;
// β of our presets: ADR 9, and the tables of docs/quality.md.
constexpr double kErrorPropagation = 0.5;
// α of GPTAQ's paper.
constexpr double kGptaqAlpha = 0.25;

// GPTQ as the code of QuaRot runs it, which the tables of GSR and GPTAQ are made with, too.
QuantizationConfig Published(int bits) {
  QuantizationConfig config;
  config.set_method(QuantizationConfig::GPTQ);
  config.set_error_propagation(0);
  config.set_bits(bits);
  config.set_group_size(kAutoGroup);
  config.set_symmetric(false);
  config.set_column_order(QuantizationConfig::NATURAL);
  config.set_damp_percent(0.01);
  config.set_disable_mse_clip(false);
  config.set_grid(QuantizationConfig::UNIFORM);
  config.set_zero_point(QuantizationConfig::INTEGER_ZERO);
  config.mutable_rotation()->set_kind(Rotation::NONE);
  config.mutable_rotation()->set_signs(Rotation::NO_SIGNS);
  config.mutable_rotation()->set_online_kind(Rotation::NONE);
  config.mutable_calibration()->set_num_samples(128);
  config.mutable_calibration()->set_sequence_length(2048);
  return config;
}

QuantizationConfig Rtn(QuantizationConfig config) {
  config.set_method(QuantizationConfig::RTN);
  config.clear_error_propagation();
  config.clear_damp_percent();
  config.set_disable_mse_clip(true);
  return config;
}

QuantizationConfig Gptaq(QuantizationConfig config) {
  config.set_method(QuantizationConfig::GPTAQ);
  config.clear_error_propagation();
  config.set_gptaq_alpha(kGptaqAlpha);
  return config;
}

// QuaRot's own tables at 4 bits have no groups.
QuantizationConfig PerChannelSymmetric(QuantizationConfig config) {
  config.set_group_size(kPerChannel);
  config.set_symmetric(true);
  return config;
}

// QuaRot with `r1` on the residual stream, as GSR's table compares it. R4 is global in all of its
// rows; only QuaRot's own R1 has random signs.
QuantizationConfig QuaRot(QuantizationConfig config, Rotation::Kind r1) {
  Rotation& rotation = *config.mutable_rotation();
  rotation.set_kind(r1);
  rotation.set_signs(r1 == Rotation::HADAMARD ? Rotation::SEEDED : Rotation::NO_SIGNS);
  rotation.set_online_kind(Rotation::HADAMARD);
  return config;
}

QuantizationConfig FourBitActivations(QuantizationConfig config) {
  v1::ActivationQuantization& activations = *config.mutable_activation_quantization();
  activations.set_bits(4);
  activations.set_clip_ratio(0.9);
  return config;
}

// By head: the groups of 128 that QuaRot has are the heads of its models.
QuantizationConfig FourBitKvCache(QuantizationConfig config) {
  v1::KvCacheQuantization& kv = *config.mutable_kv_cache_quantization();
  kv.set_bits(4);
  kv.set_clip_ratio(0.95);
  return config;
}

QuantizationConfig Best(int bits) {
  QuantizationConfig config = Published(bits);
  config.set_error_propagation(kErrorPropagation);
  config.set_column_order(QuantizationConfig::GROUP_AWARE);
  config.mutable_rotation()->set_kind(Rotation::GSR);
  return config;
}

bool IsOn(int bits) { return bits != 0 && bits != 16; }

bool IsDoneAtRunTime(const QuantizationConfig& config) {
  const Rotation::Kind online = config.rotation().online_kind();
  return (online != Rotation::KIND_UNSPECIFIED && online != Rotation::NONE) ||
         config.rotation().query_key() || IsOn(config.activation_quantization().bits()) ||
         IsOn(config.kv_cache_quantization().bits());
}

bool HasOwnGrid(const QuantizationConfig& config) {
  return config.grid() == QuantizationConfig::CODEBOOK ||
         config.zero_point() == QuantizationConfig::FLOAT_ZERO;
}

// What the CUDA backend refuses whatever the model (CheckSupported of its cuda_backend.cc).
bool RunsOnCuda(const QuantizationConfig& config) {
  return !IsDoneAtRunTime(config) && !HasOwnGrid(config);
}

QuantizationPreset Preset(std::string name, std::string description, std::string reproduces,
                          QuantizationConfig config) {
  QuantizationPreset preset;
  preset.set_portable(!IsDoneAtRunTime(config) && !HasOwnGrid(config));
  preset.add_devices("cpu");
  if (RunsOnCuda(config)) preset.add_devices("cuda");
  *preset.mutable_config() = std::move(config);
  preset.mutable_config()->set_preset(name);
  preset.set_name(std::move(name));
  preset.set_description(std::move(description));
  preset.set_reproduces(std::move(reproduces));
  return preset;
}

std::vector<QuantizationPreset> MakePresets() {
  const std::string groups = ", groups of 128 or the largest of 64 and 32 that divides the model";
  const std::string gsr_table = "GSR (arXiv 2505.03810), Llama-2-7B, WikiText-2, ";
  std::vector<QuantizationPreset> presets;
  const auto add = [&](std::string name, std::string description, std::string reproduces,
                       QuantizationConfig config) {
    presets.push_back(
        Preset(std::move(name), std::move(description), std::move(reproduces), std::move(config)));
  };

  add("gsr-w4-portable", "our best at 4 bits that other programs serve" + groups, "", Best(4));
  add("gsr-w3-portable", "our best at 3 bits that other programs serve" + groups, "", Best(3));
  add("gsr-w2-portable", "our best at 2 bits that other programs serve" + groups, "", Best(2));

  add("rtn-w4", "rounding to nearest, no rotation, no clip search" + groups,
      "the usual baseline of GPTQ (arXiv 2210.17323)", Rtn(Published(4)));
  add("gptq-w4", "plain GPTQ, no rotation" + groups,
      "GPTQ (arXiv 2210.17323), 4 bits, groups of 128; with the clip search of QuaRot's code",
      Published(4));
  add("gptq-w3", "plain GPTQ, no rotation" + groups,
      "GPTQ (arXiv 2210.17323), 3 bits, groups of 128; with the clip search of QuaRot's code",
      Published(3));
  add("gptq-w2", "plain GPTQ, no rotation" + groups,
      "GPTQ (arXiv 2210.17323), 2 bits, groups of 128; with the clip search of QuaRot's code",
      Published(2));
  add("gptaq-w4", "GPTAQ, no rotation" + groups,
      "GPTAQ (arXiv 2504.02692), 4 bits, groups of 128, weights only", Gptaq(Published(4)));
  add("gptaq-w2", "GPTAQ, no rotation" + groups,
      "GPTAQ (arXiv 2504.02692) with the recipe of its 4 bits", Gptaq(Published(2)));

  add("quarot-w4a16", "QuaRot, symmetric weights, one group a channel",
      "QuaRot (arXiv 2404.00456), W4A16: 5.62 for Llama-2-7B, WikiText-2",
      QuaRot(PerChannelSymmetric(Published(4)), Rotation::HADAMARD));
  add("quarot-w2a16", "QuaRot: global Hadamard with signs" + groups,
      gsr_table + "QuaRot host, GH, W2A16: 20.29", QuaRot(Published(2), Rotation::HADAMARD));
  add("walsh-w2a16", "QuaRot with a global Walsh R1" + groups,
      gsr_table + "QuaRot host, GW, W2A16: 15.38", QuaRot(Published(2), Rotation::WALSH));
  add("local-hadamard-w2a16", "QuaRot with a local Hadamard R1" + groups,
      gsr_table + "QuaRot host, LH, W2A16: 12.11", QuaRot(Published(2), Rotation::LOCAL_HADAMARD));
  add("gsr-w2a16", "QuaRot with GSR as R1" + groups, gsr_table + "QuaRot host, GSR, W2A16: 11.59",
      QuaRot(Published(2), Rotation::GSR));
  add("quarot-w2a4", "QuaRot, activations of 4 bits by token" + groups,
      gsr_table + "QuaRot host, GH, W2A4: 31.33",
      FourBitActivations(QuaRot(Published(2), Rotation::HADAMARD)));
  add("gsr-w2a4", "QuaRot with GSR as R1, activations of 4 bits by token" + groups,
      gsr_table + "QuaRot host, GSR, W2A4: 15.23",
      FourBitActivations(QuaRot(Published(2), Rotation::GSR)));
  add("gsr-w2a4kv4", "gsr-w2a4 with a KV cache of 4 bits by head" + groups, "",
      FourBitKvCache(FourBitActivations(QuaRot(Published(2), Rotation::GSR))));
  add("quarot-w4a4kv4",
      "QuaRot, symmetric weights, one group a channel, activations of 4 bits by token, KV cache of "
      "4 bits by head",
      "QuaRot (arXiv 2404.00456), W4A4KV4, GPTQ: 6.10 for Llama-2-7B, WikiText-2",
      FourBitKvCache(
          FourBitActivations(QuaRot(PerChannelSymmetric(Published(4)), Rotation::HADAMARD))));
  add("gsr-w4a4kv4", "quarot-w4a4kv4 with GSR as R1", "",
      FourBitKvCache(FourBitActivations(QuaRot(PerChannelSymmetric(Published(4)), Rotation::GSR))));
  return presets;
}

// Whether something was asked for and it is not what the preset has.
bool IsOther(int asked, int of_preset) { return asked != 0 && asked != of_preset; }

}  // namespace

const std::vector<QuantizationPreset>& Presets() {
  static const auto* const presets = new std::vector<QuantizationPreset>(MakePresets());
  return *presets;
}

absl::Status ExpandPreset(QuantizationConfig* config) {
  if (config->preset().empty()) return absl::OkStatus();
  const auto& presets = Presets();
  const auto preset = std::find_if(presets.begin(), presets.end(), [&](const auto& candidate) {
    return candidate.name() == config->preset();
  });
  if (preset == presets.end()) {
    return InvalidField(
        "config.preset",
        absl::StrCat("'", config->preset(), "' must be one of ",
                     absl::StrJoin(presets, ", ", [](std::string* out, const auto& known) {
                       out->append(known.name());
                     })));
  }
  QuantizationConfig expanded = preset->config();
  if (IsOther(config->method(), expanded.method())) {
    expanded.clear_error_propagation();
    expanded.clear_gptaq_alpha();
    // RTN's presets are the usual baseline, without it.
    if (expanded.method() == QuantizationConfig::RTN) expanded.clear_disable_mse_clip();
  }
  if (IsOther(config->activation_quantization().bits(),
              expanded.activation_quantization().bits())) {
    expanded.clear_activation_quantization();
  }
  if (IsOther(config->kv_cache_quantization().bits(), expanded.kv_cache_quantization().bits())) {
    expanded.clear_kv_cache_quantization();
  }
  expanded.MergeFrom(*config);
  *config = std::move(expanded);
  return absl::OkStatus();
}

}  // namespace walsh::jobs
