#include "client/terminal/preset_table.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/table.h"

namespace walsh::client {
namespace {

std::string FlagName(const std::string& enum_name) {
  return absl::AsciiStrToLower(absl::StrReplaceAll(enum_name, {{"_", "-"}}));
}

std::string GroupText(int group_size) {
  if (group_size == 0) return "auto";
  return group_size < 0 ? "channel" : absl::StrCat(group_size);
}

std::string BitsText(int bits) { return bits == 0 ? "16" : absl::StrCat(bits); }

// "gsr", "hadamard with signs, online hadamard"
std::string RotationText(const v1::Rotation& rotation) {
  std::string text = FlagName(v1::Rotation::Kind_Name(rotation.kind()));
  if (rotation.signs() == v1::Rotation::SEEDED) text += " with signs";
  const v1::Rotation::Kind online = rotation.online_kind();
  if (online != v1::Rotation::KIND_UNSPECIFIED && online != v1::Rotation::NONE) {
    absl::StrAppend(&text, ", online ", FlagName(v1::Rotation::Kind_Name(online)));
  }
  return text;
}

// "gptq", "gptq, propagated 0.5"
std::string MethodText(const v1::QuantizationConfig& config) {
  std::string text = FlagName(v1::QuantizationConfig::Method_Name(config.method()));
  if (config.error_propagation() > 0) {
    absl::StrAppendFormat(&text, ", propagated %g", config.error_propagation());
  }
  return text;
}

}  // namespace

std::string PresetTable(const v1::ListQuantizationPresetsResponse& response) {
  Table table({{"PRESET"},
               {"WEIGHTS", Align::kRight},
               {"GROUP", Align::kRight},
               {"ACTIVATIONS", Align::kRight},
               {"KV", Align::kRight},
               {"ROTATION"},
               {"METHOD"},
               {"PORTABLE"},
               {"DEVICES"},
               {"REPRODUCES"}});
  for (const v1::QuantizationPreset& preset : response.presets()) {
    const v1::QuantizationConfig& config = preset.config();
    table.AddRow({preset.name(),
                  absl::StrCat(config.bits(), config.symmetric() ? " symmetric" : ""),
                  GroupText(config.group_size()), BitsText(config.activation_quantization().bits()),
                  BitsText(config.kv_cache_quantization().bits()), RotationText(config.rotation()),
                  MethodText(config), preset.portable() ? "yes" : "no",
                  absl::StrJoin(preset.devices(), ","), preset.reproduces()});
  }
  return SafeText(table.Text());
}

}  // namespace walsh::client
