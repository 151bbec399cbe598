#include "common/quantization_limits.h"

#include <bit>
#include <cmath>
#include <initializer_list>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/field_checks.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/name_pattern.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

using v1::QuantizationConfig;
using v1::Rotation;

absl::Status CheckBlock(std::string_view field, Rotation::Kind kind, int block) {
  if (block == 0) return absl::OkStatus();
  if (kind != Rotation::GSR && kind != Rotation::LOCAL_HADAMARD) {
    return InvalidField(
        field, absl::StrCat("is ", block, ", but only GSR and LOCAL_HADAMARD have blocks"));
  }
  if (block < limits::kRotationBlockMin || block > limits::kRotationBlockMax ||
      !std::has_single_bit(static_cast<unsigned>(block))) {
    return InvalidField(
        field, absl::StrCat("must be 0 (auto) or a power of two from ", limits::kRotationBlockMin,
                            " to ", limits::kRotationBlockMax, ", is ", block));
  }
  return absl::OkStatus();
}

// Of a quantizer at run time.
absl::Status CheckGrid(std::string_view message, int bits, std::initializer_list<int> allowed,
                       std::string_view rule, int group_size, double clip_ratio) {
  const auto field = [&](std::string_view name) {
    return absl::StrCat("config.", std::string(message), ".", std::string(name));
  };
  WALSH_RETURN_IF_ERROR(CheckOneOf(field("bits"), bits, allowed, rule));
  WALSH_RETURN_IF_ERROR(CheckOneOf(field("group_size"), group_size, {0, 32, 64, 128},
                                   "0 (a token's values, or a head's), 32, 64 or 128"));
  if (clip_ratio != 0 && !(clip_ratio >= limits::kClipRatioMin && clip_ratio <= 1)) {
    return InvalidField(field("clip_ratio"),
                        absl::StrCat("must be 0 (chosen by the bits) or from ",
                                     limits::kClipRatioMin, " to 1, is ", clip_ratio));
  }
  const bool is_on = bits != 0 && bits != 16;
  if (!is_on && (group_size != 0 || clip_ratio != 0)) {
    return InvalidField(field("bits"),
                        absl::StrCat("is ", bits, " (none), but ",
                                     group_size != 0 ? "group_size" : "clip_ratio", " is set"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateRotation(const Rotation& rotation) {
  const auto check_kind = [](std::string_view field, Rotation::Kind kind) {
    if (Rotation::Kind_IsValid(kind)) return absl::OkStatus();
    return InvalidField(field, absl::StrCat(static_cast<int>(kind), " is not a kind of rotation"));
  };
  WALSH_RETURN_IF_ERROR(check_kind("config.rotation.kind", rotation.kind()));
  WALSH_RETURN_IF_ERROR(check_kind("config.rotation.online_kind", rotation.online_kind()));
  if (!Rotation::Signs_IsValid(rotation.signs())) {
    return InvalidField("config.rotation.signs", absl::StrCat(static_cast<int>(rotation.signs()),
                                                              " is not a kind of signs"));
  }
  const bool is_default = rotation.kind() == Rotation::KIND_UNSPECIFIED;
  WALSH_RETURN_IF_ERROR(CheckBlock("config.rotation.block_size",
                                   is_default ? Rotation::GSR : rotation.kind(),
                                   rotation.block_size()));
  return CheckBlock("config.rotation.online_block_size", rotation.online_kind(),
                    rotation.online_block_size());
}

absl::Status ValidateOverrides(const QuantizationConfig& config) {
  if (config.overrides_size() > limits::kOverridesMax) {
    return InvalidField("config.overrides",
                        absl::StrCat("has ", config.overrides_size(), " entries, at most ",
                                     limits::kOverridesMax, " are taken"));
  }
  for (int i = 0; i < config.overrides_size(); ++i) {
    const std::string field = absl::StrCat("config.overrides[", i, "]");
    const std::string& pattern = config.overrides(i).pattern();
    WALSH_RETURN_IF_ERROR(CheckLine(field + ".pattern", pattern, limits::kOverridePatternBytesMax));
    if (const auto parsed = NamePattern::Parse(pattern); !parsed.ok()) {
      return InvalidField(field + ".pattern",
                          absl::StrCat("'", pattern, "': ", parsed.status().message()));
    }
    WALSH_RETURN_IF_ERROR(
        CheckOneOf(field + ".bits", config.overrides(i).bits(), {2, 3, 4, 8}, "2, 3, 4 or 8"));
  }
  return absl::OkStatus();
}

absl::Status ValidateRunTimeQuantizers(const QuantizationConfig& config) {
  const v1::ActivationQuantization& activations = config.activation_quantization();
  WALSH_RETURN_IF_ERROR(CheckGrid("activation_quantization", activations.bits(), {0, 4, 8, 16},
                                  "0 or 16 (none), 4 or 8", activations.group_size(),
                                  activations.clip_ratio()));
  const bool are_quantized = activations.bits() != 0 && activations.bits() != 16;
  if (activations.asymmetric() && !are_quantized) {
    return InvalidField("config.activation_quantization.bits",
                        absl::StrCat("is ", activations.bits(), " (none), but asymmetric is set"));
  }
  const v1::KvCacheQuantization& kv = config.kv_cache_quantization();
  WALSH_RETURN_IF_ERROR(CheckGrid("kv_cache_quantization", kv.bits(), {0, 2, 4, 8, 16},
                                  "0 or 16 (none), 2, 4 or 8", kv.group_size(), kv.clip_ratio()));
  const bool is_kv_quantized = kv.bits() != 0 && kv.bits() != 16;
  if (config.rotation().query_key() && !is_kv_quantized) {
    return InvalidField("config.rotation.query_key",
                        "is set, but the KV cache is not quantized: it would change nothing");
  }
  return absl::OkStatus();
}

absl::Status ValidateQualityGate(const QuantizationConfig& config) {
  const v1::QualityGate& gate = config.quality_gate();
  const double ratio = gate.max_perplexity_ratio();
  if (gate.has_max_perplexity_ratio() && !(std::isfinite(ratio) && ratio >= 1)) {
    return InvalidField("config.quality_gate.max_perplexity_ratio",
                        absl::StrCat("must be a number from 1, is ", ratio));
  }
  const double divergence = gate.max_kl_divergence();
  if (gate.has_max_kl_divergence() && !(std::isfinite(divergence) && divergence > 0)) {
    return InvalidField("config.quality_gate.max_kl_divergence",
                        absl::StrCat("must be a number above 0, is ", divergence));
  }
  const bool is_set = gate.has_max_perplexity_ratio() || gate.has_max_kl_divergence();
  if (is_set && config.evaluation().disable()) {
    return InvalidField("config.quality_gate", "needs an evaluation, which is disabled");
  }
  return absl::OkStatus();
}

}  // namespace walsh
