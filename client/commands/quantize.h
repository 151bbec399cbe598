// walsh quantize: submits a job and follows it; --list-presets shows the recipes with names.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "client/commands/command.h"

namespace walsh::client {

// The flags as they were given. Empty and unset ones are not sent, and so left to the preset, if
// one is named, and to the service's defaults.
struct QuantizeFlags {
  std::string model;
  std::string name;
  std::string preset;
  std::optional<int> bits;
  std::string group_size;
  std::optional<bool> symmetric;
  std::string method;
  std::string rotation;
  int rotation_block = 0;
  std::string rotation_signs;
  std::string online_rotation;
  int online_rotation_block = 0;
  std::string qk_rotation = "auto";
  std::string head_rotation = "auto";
  std::optional<int> act_bits;
  std::string act_group_size = "token";
  bool act_asymmetric = false;
  double act_clip = 0;
  std::optional<int> kv_bits;
  std::string kv_group_size = "head";
  double kv_clip = 0;
  uint64_t seed = 0;
  std::string calibration = "self";
  int num_samples = 0;
  int seq_len = 0;
  std::string column_order;
  double damp = 0;
  std::optional<bool> no_mse_clip;
  std::vector<std::string> overrides;  // PATTERN=BITS
  std::string grid;
  std::string zero_point;
  std::optional<double> error_propagation;
  std::optional<double> gptaq_alpha;
  std::string eval_text;
  std::string eval_text_format = "auto";
  int eval_window = 0;
  int eval_stride = 0;
  int eval_windows = 0;
  std::vector<std::string> eval_tasks;
  int eval_limit = 0;
  bool eval_no_bos = false;
  bool no_eval = false;
  std::optional<double> max_perplexity_ratio;
  std::optional<double> max_kl;
  std::optional<bool> load;
  bool detach = false;
  bool validate_only = false;
  std::string request_id;
  bool list_presets = false;  // do nothing else
};

// INVALID_ARGUMENT for a group size that is no number, an override that is not PATTERN=BITS, what
// is set of a quantizer that is off (with a preset only the service knows whether it is), and a
// limit of tasks without any.
// `auto_load` is what --load resolved to.
absl::StatusOr<v1::CreateQuantizationJobRequest> MakeQuantizeRequest(const QuantizeFlags& flags,
                                                                     bool auto_load);

void AddQuantizeCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
