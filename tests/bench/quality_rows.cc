// What the tables of docs/quality.md are made of: one whole job for each row that is asked for.
//
//   quality_rows MODEL --evaluation TEXT --rows ROWS --results RESULTS [--device cuda:0]
//
// ROWS holds one JSON object a line, see ReadRow() for its members; RESULTS gets one for each, with
// the losses and divergences of every window, so that differences between rows can be paired
// (quality_study.py writes the one and reads the other). A row whose id is in RESULTS already is
// left out: a run that was cut off goes on where it ended. A row of 16 bits is the original.
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/command_line.h"
#include "common/device_choice.h"
#include "common/status_macros.h"
#include "tests/bench/work_directory.h"
#include "worker/evaluate/layer_source.h"
#include "worker/evaluate/tasks/score_task.h"
#include "worker/io/artifact.h"
#include "worker/io/checkpoint.h"
#include "worker/kernels/kernels.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/cuda/cuda_backend.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::bench {
namespace {

using nlohmann::json;

constexpr int kOriginal = 16;  // bits

struct Flags {
  std::string model, evaluation, rows, results, work_directory, device = "cpu";
  int64_t evaluation_windows = 20, evaluation_length = 2048;
  int threads = ThreadPool::HardwareThreads();
};

struct Row {
  std::string id;
  pipeline::JobSpec spec;
  std::vector<std::string> tasks;
  int64_t task_limit = 0;
};

// Members of one object; the first that is wrong is remembered.
class Members {
 public:
  explicit Members(const json& object) : object_(object) {}

  void Read(const char* name, std::string& value) {
    if (const json* member = Find(name, &json::is_string)) value = member->get<std::string>();
  }
  void Read(const char* name, bool& value) {
    if (const json* member = Find(name, &json::is_boolean)) value = member->get<bool>();
  }
  void Read(const char* name, double& value) {
    if (const json* member = Find(name, &json::is_number)) value = member->get<double>();
  }
  void Read(const char* name, int64_t& value) {
    if (const json* member = Find(name, &json::is_number_integer)) value = member->get<int64_t>();
  }
  void Read(const char* name, int& value) {
    int64_t wide = value;
    Read(name, wide);
    value = static_cast<int>(wide);
  }
  void Read(const char* name, std::vector<std::string>& values) {
    const json* member = Find(name, &json::is_array);
    if (member == nullptr) return;
    for (const json& value : *member) {
      if (!value.is_string()) {
        Fail(absl::StrCat(name, ": not a list of strings"));
      } else {
        values.push_back(value.get<std::string>());
      }
    }
  }
  // One of `names`, whose position is the value.
  template <typename Enum, size_t n>
  void Read(const char* name, const std::array<const char*, n>& names, Enum& value) {
    std::string text;
    Read(name, text);
    if (text.empty()) return;
    for (size_t i = 0; i < n; ++i) {
      if (text == names[i]) {
        value = static_cast<Enum>(i);
        return;
      }
    }
    Fail(absl::StrCat(name, ": '", text, "' is not one of ", absl::StrJoin(names, ", ")));
  }
  void Read(const char* name, rotate::Kind& value) {
    std::string text;
    Read(name, text);
    if (text.empty()) return;
    if (const absl::StatusOr<rotate::Kind> kind = rotate::ParseKind(text); kind.ok()) {
      value = *kind;
    } else {
      Fail(std::string(kind.status().message()));
    }
  }

  absl::Status status() const {
    if (!error_.empty()) return absl::InvalidArgumentError(error_);
    for (const auto& [name, value] : object_.items()) {
      if (!known_.contains(name)) {
        return absl::InvalidArgumentError(absl::StrCat("unknown member '", name, "'"));
      }
    }
    return absl::OkStatus();
  }

 private:
  using Check = bool (json::*)() const noexcept;

  const json* Find(const char* name, Check has_type) {
    known_.insert(name);
    const auto member = object_.find(name);
    if (member == object_.end()) return nullptr;
    if (!((*member).*has_type)()) {
      Fail(absl::StrCat(name, ": ", member->dump(), " is of another type"));
      return nullptr;
    }
    return &*member;
  }
  void Fail(std::string error) {
    if (error_.empty()) error_ = std::move(error);
  }

  const json& object_;
  std::set<std::string> known_;
  std::string error_;
};

absl::StatusOr<Row> ReadRow(const std::string& line) {
  const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return absl::InvalidArgumentError("a row is a JSON object");
  Row row;
  pipeline::JobSpec& spec = row.spec;
  gptq::Options& quantizer = spec.quantizer;
  quantizer.group_size = 0;
  Members members(object);
  members.Read("id", row.id);
  members.Read("tasks", row.tasks);
  members.Read("task_limit", row.task_limit);
  members.Read("calibration", spec.calibration_path);
  members.Read("windows", spec.n_calibration_windows);
  members.Read("length", spec.sequence_length);
  int64_t seed = 0;
  members.Read("seed", seed);
  spec.seed = static_cast<uint64_t>(seed);
  members.Read("bits", quantizer.bits);
  members.Read("group", quantizer.group_size);  // 0: chosen by the job; -1: per channel
  members.Read("method", std::array{"rtn", "gptq", "gptaq"}, quantizer.method);
  members.Read("order", std::array{"natural", "group-aware", "act-order"}, quantizer.column_order);
  members.Read("grid", std::array{"uniform", "codebook"}, quantizer.grid);
  members.Read("zero_point", std::array{"integer", "float"}, quantizer.zero_point);
  members.Read("symmetric", quantizer.symmetric);
  members.Read("mse_clip", quantizer.mse_clip);
  members.Read("error_propagation", quantizer.error_propagation);
  members.Read("gptaq_alpha", quantizer.gptaq_alpha);
  members.Read("rotation", spec.rotation);
  members.Read("rotation_block", spec.rotation_block);
  members.Read("signs", spec.rotation_signs);
  members.Read("down_rotation", spec.online.down_rotation);  // R4
  bool rotates_query_key = false;                            // R3
  members.Read("query_key_rotation", rotates_query_key);
  if (object.contains("query_key_rotation")) spec.online.query_key = rotates_query_key;
  members.Read("activation_bits", spec.online.activation_bits);
  members.Read("activation_group", spec.online.activation_group);
  members.Read("activation_clip", spec.online.activation_clip);
  members.Read("kv_bits", spec.online.kv_bits);
  members.Read("kv_group", spec.online.kv_group);
  WALSH_RETURN_IF_ERROR(members.status());
  if (row.id.empty()) return absl::InvalidArgumentError("a row has no id");
  return row;
}

absl::StatusOr<std::vector<Row>> ReadRows(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  std::vector<Row> rows;
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    if (line.empty()) continue;
    absl::StatusOr<Row> row = ReadRow(line);
    if (!row.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ", line ", number, ": ", row.status().message()));
    }
    rows.push_back(*std::move(row));
  }
  return rows;
}

// Of the rows that a file of results has; none where there is no such file.
std::set<std::string> FinishedIds(const std::string& path) {
  std::set<std::string> ids;
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (object.is_object() && object.contains("id")) ids.insert(object["id"].get<std::string>());
  }
  return ids;
}

absl::StatusOr<json> ScoreTasks(const Row& row, const TokenizerSource& files,
                                evaluate::LayerSource& source, ThreadPool& pool) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Create(files));
  json scores = json::object();
  for (const std::string& path : row.tasks) {
    WALSH_ASSIGN_OR_RETURN(const evaluate::Task task,
                           evaluate::ReadTask({.path = path, .name = ""}, row.task_limit));
    WALSH_ASSIGN_OR_RETURN(const evaluate::TaskScore score,
                           evaluate::ScoreTask(task, *tokenizer, source, {}, pool,
                                               [](double) { return absl::OkStatus(); }));
    const evaluate::Estimate& normed =
        score.accuracy_norm.has_value() ? *score.accuracy_norm : score.accuracy;
    scores[task.name] = {{"items", task.items.size()},
                         {"accuracy", score.accuracy.mean},
                         {"standard_error", score.accuracy.standard_error},
                         {"accuracy_norm", normed.mean}};
  }
  return scores;
}

class Study {
 public:
  Study(const Flags& flags, pipeline::Backend& backend, ThreadPool& pool)
      : flags_(flags), backend_(backend), pool_(pool) {}

  absl::StatusOr<json> Run(Row row) {
    if (row.spec.quantizer.bits == kOriginal) return Original(row);
    pipeline::JobSpec& spec = row.spec;
    spec.job_name = "quality";
    spec.model_name = "quality";
    spec.source_path = flags_.model;
    spec.evaluation_path = flags_.evaluation;
    spec.n_evaluation_windows = flags_.evaluation_windows;
    spec.evaluation_length = flags_.evaluation_length;
    WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<WorkDirectory> work,
                           WorkDirectory::Create(flags_.work_directory));
    spec.output_directory = *work / "artifact";
    const auto start = std::chrono::steady_clock::now();
    WALSH_ASSIGN_OR_RETURN(const pipeline::JobReport report,
                           pipeline::RunJob(spec, backend_, pool_, {}));
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() -
        report.stage_seconds[static_cast<int>(pipeline::Stage::kEvaluating)];
    json result = {{"id", row.id},
                   {"device", flags_.device},
                   {"source_format", report.source_format},
                   {"losses_before", report.window_losses_before},
                   {"losses", report.window_losses_after},
                   {"divergences", report.window_divergences},
                   {"top1_agreement", report.top1_agreement},
                   {"error", MeanError(report)},
                   {"bits_per_weight", report.bits_per_weight},
                   {"group", report.group_size},
                   {"rotation_block", report.rotation_block},
                   {"calibration_windows", report.calibration_windows},
                   {"calibration_tokens", report.calibration_tokens},
                   {"calibration_fingerprint", report.calibration_fingerprint},
                   {"evaluation_length", flags_.evaluation_length},
                   {"seconds", seconds}};
    if (!row.tasks.empty()) {
      WALSH_ASSIGN_OR_RETURN(
          const std::unique_ptr<ArtifactReader> artifact,
          ArtifactReader::Open(spec.output_directory, /*verify=*/false, pool_.n_threads(), {}));
      evaluate::ArtifactSource source(*artifact);
      WALSH_ASSIGN_OR_RETURN(result["tasks"],
                             ScoreTasks(row, artifact->tokenizer(), source, pool_));
    }
    return result;
  }

 private:
  absl::StatusOr<json> Original(const Row& row) {
    WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                           Checkpoint::Open(flags_.model));
    evaluate::CheckpointSource source(*checkpoint);
    WALSH_ASSIGN_OR_RETURN(json tasks, ScoreTasks(row, checkpoint->tokenizer(), source, pool_));
    return json{{"id", row.id}, {"tasks", std::move(tasks)}};
  }

  // Geometric mean over the linears.
  static double MeanError(const pipeline::JobReport& report) {
    double sum = 0;
    for (const pipeline::LinearReport& linear : report.linears) {
      sum += std::log(linear.relative_error) / static_cast<double>(report.linears.size());
    }
    return std::exp(sum);
  }

  const Flags& flags_;
  pipeline::Backend& backend_;
  ThreadPool& pool_;
};

absl::Status Run(const Flags& flags) {
  ThreadPool pool(flags.threads);
  std::unique_ptr<pipeline::Backend> backend = pipeline::MakeCpuBackend();
  WALSH_ASSIGN_OR_RETURN(const DeviceChoice device, ParseDeviceChoice(flags.device));
  if (device.kind == DeviceChoice::Kind::kCuda) {
    WALSH_ASSIGN_OR_RETURN(backend, pipeline::MakeCudaBackend(device.cuda_device));
  }
  std::printf("on %s, kernels of the CPU %s, %d threads\n", flags.device.c_str(),
              kernels::DescribeCpuBackend().c_str(), flags.threads);
  WALSH_ASSIGN_OR_RETURN(const std::vector<Row> rows, ReadRows(flags.rows));
  std::set<std::string> finished = FinishedIds(flags.results);
  std::ofstream results(flags.results, std::ios::app);
  results << "\n";  // ends a line that was cut off; empty ones mean nothing
  Study study(flags, *backend, pool);
  int n_failed = 0;
  for (const Row& row : rows) {
    if (!finished.insert(row.id).second) continue;
    const absl::StatusOr<json> result = study.Run(row);
    if (!result.ok()) {
      ++n_failed;
      std::fprintf(stderr, "%s: %s\n", row.id.c_str(), result.status().ToString().c_str());
      continue;
    }
    results << result->dump() << std::endl;  // a run that is cut off keeps what it has
    if (!results) return absl::InternalError(absl::StrCat(flags.results, ": cannot be written"));
    std::printf("%s\n", row.id.c_str());
    std::fflush(stdout);
  }
  if (n_failed > 0) return absl::UnknownError(absl::StrCat(n_failed, " rows failed"));
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Runs the jobs of a quality study and writes what each cost, as JSON lines");
  app.add_option("model", flags.model, "HF directory or .gguf file");
  app.add_option("--evaluation", flags.evaluation, "Evaluation text");
  app.add_option("--rows", flags.rows, "What to run: a JSON object a line");
  app.add_option("--results", flags.results, "Appended to; rows that it has are left out");
  app.add_option("--device", flags.device, "cpu or cuda:N; tasks always run on the CPU");
  app.add_option("--eval-windows", flags.evaluation_windows);
  app.add_option("--eval-length", flags.evaluation_length);
  app.add_option("--threads", flags.threads);
  app.add_option("--work-dir", flags.work_directory, "Where artifacts are written for a while");
  if (const auto exit_code = ParseCommandLine(app, argc, argv)) return *exit_code;
  if (flags.model.empty() || flags.evaluation.empty() || flags.rows.empty() ||
      flags.results.empty()) {
    std::printf("skipped: quality_study.py runs this program (docs/quality.md)\n");
    return kExitOk;
  }
  if (const absl::Status status = Run(flags); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    return kExitFailed;
  }
  return kExitOk;
}

}  // namespace
}  // namespace walsh::bench

int main(int argc, char** argv) { return walsh::bench::Main(argc, argv); }
