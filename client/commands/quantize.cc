#include "client/commands/quantize.h"

#include <cstdio>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/address.h"
#include "client/commands/evaluation_flags.h"
#include "client/commands/follow_job.h"
#include "client/resource_name.h"
#include "client/terminal/job_report.h"
#include "client/terminal/json_text.h"
#include "client/terminal/preset_table.h"
#include "common/command_line.h"
#include "common/status_macros.h"

namespace walsh::client {
namespace {

using Config = v1::QuantizationConfig;

const std::map<std::string, Config::Method> kMethods = {
    {"rtn", Config::RTN}, {"gptq", Config::GPTQ}, {"gptaq", Config::GPTAQ}};
const std::map<std::string, v1::Rotation::Kind> kRotations = {
    {"none", v1::Rotation::NONE},
    {"hadamard", v1::Rotation::HADAMARD},
    {"walsh", v1::Rotation::WALSH},
    {"local-hadamard", v1::Rotation::LOCAL_HADAMARD},
    {"gsr", v1::Rotation::GSR}};
const std::map<std::string, v1::Rotation::Signs> kSigns = {{"none", v1::Rotation::NO_SIGNS},
                                                           {"seeded", v1::Rotation::SEEDED}};
const std::map<std::string, Config::ColumnOrder> kColumnOrders = {
    {"natural", Config::NATURAL},
    {"group-aware", Config::GROUP_AWARE},
    {"act-order", Config::ACT_ORDER}};

const std::map<std::string, Config::Grid> kGrids = {{"uniform", Config::UNIFORM},
                                                    {"codebook", Config::CODEBOOK}};
const std::map<std::string, Config::ZeroPoint> kZeroPoints = {{"integer", Config::INTEGER_ZERO},
                                                              {"float", Config::FLOAT_ZERO}};

template <typename Value>
std::vector<std::string> Names(const std::map<std::string, Value>& values) {
  std::vector<std::string> names;
  for (const auto& [name, value] : values) names.push_back(name);
  return names;
}

absl::StatusOr<int> ParseGroupSize(const std::string& text) {
  if (text == "auto") return 0;
  if (text == "channel") return -1;
  int group_size = 0;
  if (!absl::SimpleAtoi(text, &group_size) || group_size <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not auto, channel or a number"));
  }
  return group_size;
}

absl::StatusOr<v1::BitsOverride> ParseOverride(const std::string& text) {
  v1::BitsOverride result;
  const size_t at = text.rfind('=');
  int bits = 0;
  if (at == std::string::npos || at == 0 || !absl::SimpleAtoi(text.substr(at + 1), &bits)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not PATTERN=BITS, such as 'layers.{0,1}.*=4'"));
  }
  result.set_pattern(text.substr(0, at));
  result.set_bits(bits);
  return result;
}

// The groups of activations ("token") and of the KV cache ("head"), where 0 is that word.
absl::StatusOr<int> ParseRunTimeGroup(const std::string& text, const std::string& whole) {
  if (text == whole) return 0;
  int group_size = 0;
  if (!absl::SimpleAtoi(text, &group_size) || group_size <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not ", whole, " or a number"));
  }
  return group_size;
}

// Under `walsh up` (one worker, on this machine) the person who quantizes is the one who chats
// next; in a fleet loading is a decision about other people's memory.
absl::StatusOr<bool> ShouldLoad(Client& client, const QuantizeFlags& flags) {
  if (flags.load.has_value()) return *flags.load;
  if (flags.validate_only || !IsLoopback(client.address())) return false;
  WALSH_ASSIGN_OR_RETURN(const v1::ListWorkersResponse response, client.ListWorkers());
  int n_online = 0;
  for (const auto& worker : response.workers()) n_online += worker.state() == v1::Worker::ONLINE;
  return n_online == 1;
}

// After Ctrl-C before the service has answered.
int LeaveSubmission(const v1::CreateQuantizationJobRequest& request, const GlobalFlags& global) {
  if (request.validate_only()) return Fail(absl::CancelledError("interrupted"));
  std::fprintf(stderr,
               "\ninterrupted before the service answered: it may have accepted the job\n"
               "  look for it:  %s jobs list --filter model_name=%s\n"
               "  follow it:    the same command with --request-id %s starts no second one\n",
               WalshCommand(global).c_str(), request.quantization_job().model_name().c_str(),
               request.request_id().c_str());
  return kExitFailed;
}

int RunListPresets(const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto response = client.ListQuantizationPresets();
  if (!response.ok()) return Fail(response.status());
  PrintOut(global.json() ? JsonText(*response) : PresetTable(*response));
  return kExitOk;
}

int RunQuantize(const QuantizeFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  const auto load = ShouldLoad(client, flags);
  if (!load.ok()) return Fail(load.status());
  auto request = MakeQuantizeRequest(flags, *load);
  if (!request.ok()) return Fail(request.status());
  if (request->request_id().empty()) request->set_request_id(NewRequestId());
  // From here on Ctrl-C leaves a job behind, which the person must be able to find.
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  const auto job = client.CreateJob(*request, &cancellation);
  if (cancellation.cancelled() && !job.ok()) return LeaveSubmission(*request, global);
  if (!job.ok()) return Fail(job.status());
  if (flags.validate_only || flags.detach) {
    if (global.json()) {
      PrintOut(JsonText(*job));
    } else if (flags.validate_only) {
      PrintOut(absl::StrCat("valid: bits ", RecipeText(*job), "\n", PreflightText(*job)));
    } else {
      PrintOut(ResourceId(job->name()) + "\n");
    }
    return kExitOk;
  }
  std::fprintf(stderr, "job %s accepted\n", ResourceId(job->name()).c_str());
  return FollowJob(client, interrupts, cancellation,
                   {.name = job->name(), .walsh = WalshCommand(global), .json = global.json()});
}

void AddRecipeFlags(CLI::App& command, QuantizeFlags& flags) {
  command.add_option("--preset", flags.preset,
                     "Recipe with a name, which the other flags change; --list-presets shows them");
  command.add_option("--bits", flags.bits, "Bits of a weight: 2, 3, 4 or 8; default 4");
  command
      .add_option("--group-size", flags.group_size,
                  "Input columns that share a scale: auto, 32, 64, 128 or channel; default auto")
      ->check([](const std::string& text) {
        return std::string(ParseGroupSize(text).status().message());
      });
  command.add_flag_function(
      "--symmetric,!--asymmetric", [&flags](int64_t count) { flags.symmetric = count > 0; },
      "No zero points; default: with zero points");
  command.add_option("--method", flags.method, "How weights are rounded; default gptq")
      ->check(CLI::IsMember(Names(kMethods)));
  command.add_option("--rotation", flags.rotation, "Rotation of the residual stream; default gsr")
      ->check(CLI::IsMember(Names(kRotations)));
  command.add_option("--rotation-block", flags.rotation_block,
                     "Width of a block of gsr and local-hadamard; 0 takes it from the group");
  command
      .add_option("--rotation-signs", flags.rotation_signs,
                  "Random signs before the rotation; default none")
      ->check(CLI::IsMember(Names(kSigns)));
  command
      .add_option("--online-rotation", flags.online_rotation,
                  "Rotation of down_proj's input at run time (R4); only walsh serves such a model; "
                  "default none")
      ->check(CLI::IsMember(Names(kRotations)));
  command.add_option("--online-rotation-block", flags.online_rotation_block,
                     "Width of its block, of gsr and local-hadamard; 0 takes it from the group");
  command
      .add_option(
          "--qk-rotation", flags.qk_rotation,
          "Rotation of queries and keys at run time (R3), for a quantized KV cache; auto is "
          "on where that is and anything is rotated")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  command
      .add_option("--head-rotation", flags.head_rotation,
                  "Rotation of attention values by head, folded into the weights (R2); auto is on "
                  "with --rotation where the head's width has a Walsh matrix")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  CLI::Option* column_order = command
                                  .add_option("--column-order", flags.column_order,
                                              "Order in which GPTQ and GPTAQ take the columns; "
                                              "default group-aware")
                                  ->check(CLI::IsMember(Names(kColumnOrders)));
  command
      .add_flag_callback(
          "--act-order", [&flags] { flags.column_order = "act-order"; },
          "The same as --column-order act-order: by the size of their inputs, with the groups' "
          "scales chosen before")
      ->excludes(column_order);
  command.add_option("--damp", flags.damp,
                     "Share of the mean Hessian diagonal added to it; 0 means 0.01");
  command.add_flag_function(
      "--no-mse-clip,!--mse-clip", [&flags](int64_t count) { flags.no_mse_clip = count > 0; },
      "Do not search the clip that minimises the weights' error; default: search it");
  command.add_option("--error-propagation", flags.error_propagation,
                     "From 0 to 1: how much of earlier layers' errors GPTQ makes up for; default "
                     "0.5, 0 takes half the time");
  command.add_option("--gptaq-alpha", flags.gptaq_alpha,
                     "From 0 to 1: how much of earlier layers' errors GPTAQ makes up for; default "
                     "0.25");
  command
      .add_option(
          "--override", flags.overrides,
          "PATTERN=BITS: other bits for the linears that the pattern matches, such as "
          "'layers.{0,1}.mlp.down_proj=4' (* any text, ? a character, {a,b} either, {0-3} a "
          "range); may be repeated, and the last that matches counts")
      ->allow_extra_args(false)
      ->check([](const std::string& text) {
        return std::string(ParseOverride(text).status().message());
      });
  command
      .add_option("--grid", flags.grid,
                  "Values that codes stand for: uniform, or a codebook of four levels for each "
                  "group, at 2 bits; default uniform")
      ->check(CLI::IsMember(Names(kGrids)));
  command
      .add_option("--zero-point", flags.zero_point,
                  "Zero points of a uniform grid: integer, or float for ranges without 0; default "
                  "integer")
      ->check(CLI::IsMember(Names(kZeroPoints)));
  command.add_option("--seed", flags.seed, "Seed of everything random")->capture_default_str();
}

// What is rounded at run time; only walsh serves such a model.
void AddRunTimeFlags(CLI::App& command, QuantizeFlags& flags) {
  command
      .add_option(
          "--act-bits", flags.act_bits,
          "Bits of an activation that enters a quantized linear: 4, 8 or 16 (not quantized); "
          "default 16")
      ->check(CLI::IsMember({4, 8, 16}));
  command
      .add_option("--act-group-size", flags.act_group_size,
                  "Channels that share an activation's scale: token (all), 32, 64 or 128")
      ->check([](const std::string& text) {
        return std::string(ParseRunTimeGroup(text, "token").status().message());
      })
      ->capture_default_str();
  command.add_flag("--act-asymmetric", flags.act_asymmetric, "Activations with zero points");
  command.add_option("--act-clip", flags.act_clip,
                     "Share of the largest activation that is kept; 0 means 0.9 at 4 bits, 1 at 8");
  command
      .add_option("--kv-bits", flags.kv_bits,
                  "Bits of a key or value in the cache: 2, 4, 8 or 16 (not quantized); default 16")
      ->check(CLI::IsMember({2, 4, 8, 16}));
  command
      .add_option("--kv-group-size", flags.kv_group_size,
                  "Channels that share a scale in the cache: head (all of one), 32, 64 or 128")
      ->check([](const std::string& text) {
        return std::string(ParseRunTimeGroup(text, "head").status().message());
      })
      ->capture_default_str();
  command.add_option("--kv-clip", flags.kv_clip,
                     "Share of the largest that is kept; 0 means 0.95 at 2 and 4 bits, 1 at 8");
}

void AddDataFlags(CLI::App& command, QuantizeFlags& flags) {
  command
      .add_option("--calibration", flags.calibration,
                  "Text, .jsonl or .json file, or self: text that the model writes")
      ->capture_default_str();
  command.add_option("--num-samples", flags.num_samples, "Calibration windows; 0 means 128");
  command.add_option("--seq-len", flags.seq_len, "Tokens of a window; 0 means 2048");
  command.add_option("--eval-text", flags.eval_text,
                     "Text for the perplexity before and after; else part of the calibration");
  AddTextFormatFlag(command, "--eval-text-format", flags.eval_text_format);
  command.add_option("--eval-window", flags.eval_window, "Tokens of its windows; 0 means 2048");
  command.add_option("--eval-stride", flags.eval_stride,
                     "Tokens from window to window; 0 means no overlap");
  command.add_option("--eval-windows", flags.eval_windows, "Windows of it; 0 means 20");
  command.add_option("--eval-tasks", flags.eval_tasks,
                     "Files of zero-shot tasks, scored before and after: PIQA, ARC, HellaSwag, "
                     "WinoGrande, LAMBADA");
  command.add_option("--eval-limit", flags.eval_limit, "Items of each task; 0 means all");
  command.add_flag(
      "--eval-no-bos", flags.eval_no_bos,
      "Leave out the BOS with which the tokenizer begins the --eval-text and contexts");
  command.add_flag("--no-eval", flags.no_eval, "Evaluate nothing");
  command.add_option("--max-perplexity-ratio", flags.max_perplexity_ratio,
                     "Quality gate: publish only if the perplexity grows at most so many times");
  command.add_option("--max-kl", flags.max_kl,
                     "Quality gate: publish only if the KL divergence from the original is at most "
                     "so many nats a token");
}

void AddJobFlags(CLI::App& command, QuantizeFlags& flags) {
  command.add_flag_function(
      "--load,!--no-load", [&flags](int64_t count) { flags.load = count > 0; },
      "Load the model when it is done; default: when one worker runs on this machine");
  command.add_flag("--detach", flags.detach, "Print the job's id and do not wait");
  command.add_flag("--validate-only", flags.validate_only,
                   "Check everything, print what the job needs and the worker has, start nothing");
  command.add_option("--request-id", flags.request_id,
                     "Idempotency key: the same key and flags give the same job");
}

absl::Status OffButSet(const char* flag, const char* bits_flag) {
  return absl::InvalidArgumentError(
      absl::StrCat(flag, " has no meaning without ", bits_flag, " of less than 16"));
}

absl::Status SetRunTimeQuantizers(const QuantizeFlags& flags, Config& config) {
  constexpr int kOff = 16;
  // With a preset it is for the service to say.
  const auto is_off = [&](std::optional<int> bits) {
    return bits.has_value() ? *bits == kOff : flags.preset.empty();
  };
  WALSH_ASSIGN_OR_RETURN(const int act_group, ParseRunTimeGroup(flags.act_group_size, "token"));
  WALSH_ASSIGN_OR_RETURN(const int kv_group, ParseRunTimeGroup(flags.kv_group_size, "head"));
  if (is_off(flags.act_bits)) {
    if (act_group != 0) return OffButSet("--act-group-size", "--act-bits");
    if (flags.act_asymmetric) return OffButSet("--act-asymmetric", "--act-bits");
    if (flags.act_clip != 0) return OffButSet("--act-clip", "--act-bits");
  }
  if (is_off(flags.kv_bits)) {
    if (kv_group != 0) return OffButSet("--kv-group-size", "--kv-bits");
    if (flags.kv_clip != 0) return OffButSet("--kv-clip", "--kv-bits");
  }
  if (flags.act_bits || act_group != 0 || flags.act_asymmetric || flags.act_clip != 0) {
    v1::ActivationQuantization& activations = *config.mutable_activation_quantization();
    activations.set_bits(flags.act_bits.value_or(0));
    activations.set_group_size(act_group);
    activations.set_asymmetric(flags.act_asymmetric);
    activations.set_clip_ratio(flags.act_clip);
  }
  if (flags.kv_bits || kv_group != 0 || flags.kv_clip != 0) {
    v1::KvCacheQuantization& kv = *config.mutable_kv_cache_quantization();
    kv.set_bits(flags.kv_bits.value_or(0));
    kv.set_group_size(kv_group);
    kv.set_clip_ratio(flags.kv_clip);
  }
  return absl::OkStatus();
}

void SetRotation(const QuantizeFlags& flags, v1::Rotation& rotation) {
  if (!flags.rotation.empty()) rotation.set_kind(kRotations.at(flags.rotation));
  rotation.set_block_size(flags.rotation_block);
  if (!flags.rotation_signs.empty()) rotation.set_signs(kSigns.at(flags.rotation_signs));
  if (!flags.online_rotation.empty()) {
    rotation.set_online_kind(kRotations.at(flags.online_rotation));
  }
  rotation.set_online_block_size(flags.online_rotation_block);
  if (flags.qk_rotation != "auto") rotation.set_query_key(flags.qk_rotation == "on");
  if (flags.head_rotation != "auto") rotation.set_head(flags.head_rotation == "on");
}

absl::Status SetQuantizer(const QuantizeFlags& flags, Config& config) {
  if (!flags.method.empty()) config.set_method(kMethods.at(flags.method));
  if (flags.bits) config.set_bits(*flags.bits);
  if (!flags.group_size.empty()) {
    WALSH_ASSIGN_OR_RETURN(const int group_size, ParseGroupSize(flags.group_size));
    config.set_group_size(group_size);
  }
  if (flags.symmetric) config.set_symmetric(*flags.symmetric);
  if (!flags.column_order.empty()) config.set_column_order(kColumnOrders.at(flags.column_order));
  config.set_damp_percent(flags.damp);
  if (flags.no_mse_clip) config.set_disable_mse_clip(*flags.no_mse_clip);
  if (flags.error_propagation) config.set_error_propagation(*flags.error_propagation);
  if (flags.gptaq_alpha) config.set_gptaq_alpha(*flags.gptaq_alpha);
  for (const std::string& text : flags.overrides) {
    WALSH_ASSIGN_OR_RETURN(*config.add_overrides(), ParseOverride(text));
  }
  if (!flags.grid.empty()) config.set_grid(kGrids.at(flags.grid));
  if (!flags.zero_point.empty()) config.set_zero_point(kZeroPoints.at(flags.zero_point));
  return absl::OkStatus();
}

absl::Status SetEvaluation(const QuantizeFlags& flags, v1::Evaluation& evaluation) {
  if (flags.eval_limit != 0 && flags.eval_tasks.empty()) {
    return absl::InvalidArgumentError("--eval-limit has no meaning without --eval-tasks");
  }
  if (!flags.eval_text.empty()) evaluation.set_uri(SourceReference(flags.eval_text));
  evaluation.set_format(TextFormatOf(flags.eval_text_format));
  evaluation.set_sequence_length(flags.eval_window);
  evaluation.set_stride(flags.eval_stride);
  evaluation.set_max_windows(flags.eval_windows);
  evaluation.set_skip_bos(flags.eval_no_bos);
  evaluation.set_disable(flags.no_eval);
  return AddTasks(flags.eval_tasks, flags.eval_limit, evaluation.mutable_tasks());
}

}  // namespace

absl::StatusOr<v1::CreateQuantizationJobRequest> MakeQuantizeRequest(const QuantizeFlags& flags,
                                                                     bool auto_load) {
  v1::CreateQuantizationJobRequest request;
  request.set_request_id(flags.request_id);
  request.set_validate_only(flags.validate_only);
  v1::QuantizationJob& job = *request.mutable_quantization_job();
  job.set_source_model(SourceReference(flags.model));
  job.set_model_name(flags.name);
  Config& config = *job.mutable_config();
  config.set_preset(flags.preset);
  WALSH_RETURN_IF_ERROR(SetQuantizer(flags, config));
  SetRotation(flags, *config.mutable_rotation());
  WALSH_RETURN_IF_ERROR(SetRunTimeQuantizers(flags, config));
  if (flags.calibration != "self") {
    config.mutable_calibration()->set_uri(SourceReference(flags.calibration));
  }
  config.mutable_calibration()->set_num_samples(flags.num_samples);
  config.mutable_calibration()->set_sequence_length(flags.seq_len);
  WALSH_RETURN_IF_ERROR(SetEvaluation(flags, *config.mutable_evaluation()));
  if (flags.max_perplexity_ratio) {
    config.mutable_quality_gate()->set_max_perplexity_ratio(*flags.max_perplexity_ratio);
  }
  if (flags.max_kl) config.mutable_quality_gate()->set_max_kl_divergence(*flags.max_kl);
  config.set_seed(flags.seed);
  if (auto_load) config.mutable_auto_load();
  for (const auto& [what, text] :
       {std::pair("model path", job.source_model()), std::pair("name", job.model_name()),
        std::pair("preset", config.preset()),
        std::pair("calibration path", config.calibration().uri()),
        std::pair("evaluation path", config.evaluation().uri()),
        std::pair("request id", request.request_id())}) {
    WALSH_RETURN_IF_ERROR(CheckUtf8(text, what));
  }
  for (const v1::BitsOverride& entry : config.overrides()) {
    WALSH_RETURN_IF_ERROR(CheckUtf8(entry.pattern(), "override"));
  }
  return request;
}

void AddQuantizeCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<QuantizeFlags>();
  CLI::App& command = *app.add_subcommand("quantize", "Quantize a model and follow the job");
  CLI::Option* model =
      command
          .add_option(
              "MODEL", flags->model,
              "Folder with config.json and safetensors, or a .gguf file: on the worker's machine "
              "or, as all files that are named here, in a bucket that it may read "
              "(s3://BUCKET/KEY)")
          ->required();
  CLI::Option* name =
      command.add_option("--name", flags->name, "Name of the new model")->required();
  command.add_flag_callback(
      "--list-presets",
      [flags, model, name] {
        flags->list_presets = true;
        model->required(false);
        name->required(false);
      },
      "Show the presets that the service has, and do nothing else");
  AddRecipeFlags(command, *flags);
  AddRunTimeFlags(command, *flags);
  AddDataFlags(command, *flags);
  AddJobFlags(command, *flags);
  command.callback([flags, &global, &chosen] {
    chosen = [flags, &global] {
      return flags->list_presets ? RunListPresets(global) : RunQuantize(*flags, global);
    };
  });
}

}  // namespace walsh::client
