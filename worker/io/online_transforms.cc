#include "worker/io/online_transforms.h"

#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"

namespace walsh {
namespace {

using nlohmann::json;
using BlockRotation = OnlineTransforms::BlockRotation;
using Rounding = OnlineTransforms::Rounding;

constexpr char kMember[] = "online_transforms";
constexpr int kClippedBitsMax = 4;

absl::Status CheckRotation(std::string_view what, const BlockRotation& rotation, int64_t width) {
  if (rotation.block >= 0 && (rotation.block == 0 || width % rotation.block == 0)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(std::string(what), ": a block of ", rotation.block,
                                                 " does not divide the width ", width));
}

absl::Status CheckRounding(std::string_view what, const Rounding& rounding,
                           std::initializer_list<int> bits, std::string_view bits_rule,
                           std::initializer_list<int64_t> widths) {
  if (!rounding.is_on()) return absl::OkStatus();
  const std::string name(what);
  if (std::find(bits.begin(), bits.end(), rounding.bits) == bits.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", rounding.bits, " bits, must be ", std::string(bits_rule)));
  }
  if (!(rounding.clip_ratio >= limits::kClipRatioMin && rounding.clip_ratio <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": clip ratio ", rounding.clip_ratio,
                                                   ", must be from ", limits::kClipRatioMin,
                                                   " to 1"));
  }
  if (rounding.group_size == OnlineTransforms::kWholeRow) return absl::OkStatus();
  for (const int64_t width : widths) {
    if (rounding.group_size < 1 || width % rounding.group_size != 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": a group of ", rounding.group_size,
                                                     " does not divide the width ", width));
    }
  }
  return absl::OkStatus();
}

absl::Status Malformed(std::string_view member, std::string_view rule) {
  return absl::InvalidArgumentError(absl::StrCat("config.json: quantization_config.", kMember, ".",
                                                 std::string(member), ": ", std::string(rule)));
}

absl::Status CheckMembers(std::string_view what, const json& object,
                          std::initializer_list<const char*> known) {
  if (!object.is_object()) return Malformed(what, "is no object");
  for (const auto& [name, value] : object.items()) {
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    return absl::UnimplementedError(absl::StrCat("config.json: quantization_config.", kMember,
                                                 ": '", name.substr(0, 64),
                                                 "' is not known to this version of walsh"));
  }
  for (const char* name : known) {
    if (!object.contains(name)) return Malformed(what, absl::StrCat("'", name, "' is missing"));
  }
  return absl::OkStatus();
}

absl::StatusOr<BlockRotation> ParseRotation(std::string_view what, const json& object) {
  WALSH_RETURN_IF_ERROR(CheckMembers(what, object, {"matrix", "block"}));
  const json& matrix = object["matrix"];
  if (matrix != "walsh" && matrix != "hadamard") {
    return absl::UnimplementedError(absl::StrCat("config.json: quantization_config.", kMember, ".",
                                                 std::string(what), ": matrix ",
                                                 matrix.dump().substr(0, 64), " is not known"));
  }
  const std::optional<int64_t> block = Int64Of(object["block"]);
  if (!block.has_value() || *block < 1) return Malformed(what, "'block' is no positive integer");
  return BlockRotation{*block, matrix == "walsh"};
}

absl::StatusOr<Rounding> ParseRounding(std::string_view what, const json& object) {
  WALSH_RETURN_IF_ERROR(
      CheckMembers(what, object, {"bits", "group_size", "symmetric", "clip_ratio"}));
  // Wide, so that a number beyond 32 bits is refused as it is and not as its remainder.
  const std::optional<int64_t> bits = Int64Of(object["bits"]);
  const std::optional<int64_t> group_size = Int64Of(object["group_size"]);
  if (!bits.has_value() || !group_size.has_value() || !object["symmetric"].is_boolean() ||
      !object["clip_ratio"].is_number()) {
    return Malformed(what, "a member has the wrong type");
  }
  if (*bits < 1 || *bits >= Rounding::kOff) {
    return Malformed(what, absl::StrCat(*bits, " bits, must be less than ", Rounding::kOff));
  }
  return Rounding{static_cast<int>(*bits), *group_size, object["symmetric"].get<bool>(),
                  object["clip_ratio"].get<double>()};
}

json RotationJson(const BlockRotation& rotation) {
  return {{"matrix", rotation.sequency ? "walsh" : "hadamard"}, {"block", rotation.block}};
}

json RoundingJson(const Rounding& rounding) {
  return {{"bits", rounding.bits},
          {"group_size", rounding.group_size},
          {"symmetric", rounding.symmetric},
          {"clip_ratio", rounding.clip_ratio}};
}

}  // namespace

double DefaultActivationClip(int bits) { return bits <= kClippedBitsMax ? 0.9 : 1.0; }
double DefaultKvClip(int bits) { return bits <= kClippedBitsMax ? 0.95 : 1.0; }

absl::Status CheckOnlineTransforms(const OnlineTransforms& online, const ModelConfig& config) {
  WALSH_RETURN_IF_ERROR(
      CheckRotation("rotation of down_proj's input", online.down_input, config.intermediate));
  WALSH_RETURN_IF_ERROR(
      CheckRotation("rotation of queries and keys", online.query_key, config.head_dim));
  if (online.query_key.block != 0 && online.query_key.block != config.head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("rotation of queries and keys: a block of ", online.query_key.block,
                     ", must be the head dimension ", config.head_dim));
  }
  WALSH_RETURN_IF_ERROR(CheckRounding("activations", online.activations, {4, 8}, "4 or 8",
                                      {config.hidden, config.q_width(), config.intermediate}));
  return CheckRounding("KV cache", online.kv_cache, {2, 4, 8}, "2, 4 or 8", {config.kv_width()});
}

json OnlineTransformsJson(const OnlineTransforms& online) {
  json out = json::object();
  if (online.down_input.block != 0) out["down_proj_input"] = RotationJson(online.down_input);
  if (online.query_key.block != 0) out["query_key"] = RotationJson(online.query_key);
  if (online.activations.is_on()) out["activations"] = RoundingJson(online.activations);
  if (online.kv_cache.is_on()) out["kv_cache"] = RoundingJson(online.kv_cache);
  return out;
}

absl::StatusOr<OnlineTransforms> ParseOnlineTransforms(const json& quantization_config,
                                                       const ModelConfig& config) {
  OnlineTransforms online;
  const auto member = quantization_config.find(kMember);
  if (member == quantization_config.end() || member->is_null()) return online;
  if (!member->is_object()) return Malformed("", "is no object");
  for (const auto& [name, value] : member->items()) {
    if (name == "down_proj_input") {
      WALSH_ASSIGN_OR_RETURN(online.down_input, ParseRotation(name, value));
    } else if (name == "query_key") {
      WALSH_ASSIGN_OR_RETURN(online.query_key, ParseRotation(name, value));
    } else if (name == "activations") {
      WALSH_ASSIGN_OR_RETURN(online.activations, ParseRounding(name, value));
    } else if (name == "kv_cache") {
      WALSH_ASSIGN_OR_RETURN(online.kv_cache, ParseRounding(name, value));
    } else {
      return absl::UnimplementedError(absl::StrCat("config.json: quantization_config.", kMember,
                                                   ": '", name.substr(0, 64),
                                                   "' is not known to this version of walsh"));
    }
  }
  WALSH_RETURN_IF_ERROR(CheckOnlineTransforms(online, config));
  return online;
}

}  // namespace walsh
