// walsh quantize: submits a job and follows it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "client/commands/command.h"

namespace walsh::client {

// The flags as they were given; empty and unset ones are left to the service's defaults.
struct QuantizeFlags {
  std::string model;
  std::string name;
  int bits = 4;
  std::string group_size = "auto";
  bool symmetric = false;
  std::string method = "gptq";
  std::string rotation = "gsr";
  int rotation_block = 0;
  std::string rotation_signs = "none";
  std::string online_rotation = "none";
  int online_rotation_block = 0;
  std::string qk_rotation = "auto";
  int act_bits = 16;
  std::string act_group_size = "token";
  bool act_asymmetric = false;
  double act_clip = 0;
  int kv_bits = 16;
  std::string kv_group_size = "head";
  double kv_clip = 0;
  uint64_t seed = 0;
  std::string calibration = "self";
  int num_samples = 0;
  int seq_len = 0;
  std::string column_order = "group-aware";
  double damp = 0;
  bool no_mse_clip = false;
  std::vector<std::string> overrides;  // PATTERN=BITS
  std::string grid = "uniform";
  std::string zero_point = "integer";
  std::optional<double> error_propagation;
  std::optional<double> gptaq_alpha;
  std::string eval_text;
  int eval_windows = 0;
  bool no_eval = false;
  std::optional<double> max_perplexity_ratio;
  std::optional<double> max_kl;
  std::optional<bool> load;
  bool detach = false;
  bool validate_only = false;
  std::string request_id;
};

// INVALID_ARGUMENT for a group size that is no number, an override that is not PATTERN=BITS, and
// for what is set of a quantizer that is off. `auto_load` is what --load resolved to.
absl::StatusOr<v1::CreateQuantizationJobRequest> MakeQuantizeRequest(const QuantizeFlags& flags,
                                                                     bool auto_load);

void AddQuantizeCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
