#include "client/terminal/job_report.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "client/resource_name.h"
#include "client/terminal/evaluation_report.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/table.h"

namespace walsh::client {
namespace {

using Job = v1::QuantizationJob;
constexpr int kWorstLinearsMax = 5;

void AppendFact(std::string& text, const char* label, const std::string& value) {
  absl::StrAppendFormat(&text, "  %-14s %s\n", label, SafeText(value));
}

std::string GroupText(int group_size) {
  if (group_size == 0) return "group auto";
  if (group_size < 0) return "one group a channel";
  return absl::StrCat("group ", group_size);
}

absl::Duration RunTime(const Job& job) {
  const auto to_time = [](const google::protobuf::Timestamp& t) {
    return absl::FromUnixSeconds(t.seconds()) + absl::Nanoseconds(t.nanos());
  };
  return to_time(job.end_time()) - to_time(job.start_time());
}

std::string KindText(v1::Rotation::Kind kind) {
  const std::string name = v1::Rotation::Kind_Name(kind);
  if (kind == v1::Rotation::GSR) return name;
  return absl::AsciiStrToLower(absl::StrReplaceAll(name, {{"_", "-"}}));
}

std::string RotationText(const v1::Rotation& rotation, int block_size) {
  const auto kind =
      rotation.kind() == v1::Rotation::KIND_UNSPECIFIED ? v1::Rotation::GSR : rotation.kind();
  if (kind == v1::Rotation::NONE) {
    return rotation.head() ? "no rotation but of values by head" : "no rotation";
  }
  std::string text = absl::StrCat(KindText(kind), " rotation");
  if (block_size > 0) absl::StrAppend(&text, " in blocks of ", block_size);
  if (rotation.signs() == v1::Rotation::SEEDED) text += " with seeded signs";
  if (rotation.has_head() && !rotation.head()) text += ", values not rotated";
  return text;
}

// ", online GSR rotation in blocks of 64, activations 4 bits, KV cache 4 bits": what is done at run
// time.
std::string RunTimeText(const v1::QuantizationConfig& config, int online_block_size) {
  constexpr int kOff = 16;
  std::string text;
  const v1::Rotation::Kind online = config.rotation().online_kind();
  if (online != v1::Rotation::KIND_UNSPECIFIED && online != v1::Rotation::NONE) {
    absl::StrAppend(&text, ", online ", KindText(online), " rotation");
    if (online_block_size > 0) absl::StrAppend(&text, " in blocks of ", online_block_size);
  }
  const int activation_bits = config.activation_quantization().bits();
  if (activation_bits != 0 && activation_bits != kOff) {
    absl::StrAppend(&text, ", activations ", activation_bits, " bits");
  }
  const int kv_bits = config.kv_cache_quantization().bits();
  if (kv_bits != 0 && kv_bits != kOff) absl::StrAppend(&text, ", KV cache ", kv_bits, " bits");
  return text;
}

// "x1.035" of perplexities; each is 0 when it was not measured.
std::string PerplexityText(const Job::Result& result) {
  if (result.perplexity_before() <= 0 || result.perplexity_after() <= 0) return "not evaluated";
  return absl::StrFormat(
      "%s before, %s after (x%.3f%s), on %s tokens", SignificantText(result.perplexity_before(), 5),
      SignificantText(result.perplexity_after(), 5),
      result.perplexity_after() / result.perplexity_before(),
      ErrorText(result.perplexity_ratio_stderr()), CountText(result.evaluation_tokens()));
}

// "0.0123 nats a token from the original; the likeliest token is the same at 95.2 %"
std::string DivergenceText(const Job::Result& result) {
  std::string text =
      absl::StrCat(EstimateText(result.kl_divergence(), result.kl_divergence_stderr(), 3),
                   " nats a token from the original");
  if (result.has_top1_agreement()) {
    absl::StrAppendFormat(&text, "; the likeliest token is the same at %.1f %%",
                          100 * result.top1_agreement());
  }
  return text;
}

std::string MemoryText(const Job::Result& result) {
  std::string text = BytesText(result.peak_memory_bytes()) + " at most";
  if (result.peak_device_memory_bytes() > 0) {
    absl::StrAppend(&text, ", and ", BytesText(result.peak_device_memory_bytes()),
                    " on the device");
  }
  return text;
}

std::string LinearBytesText(const Job::Result& result) {
  std::string text =
      absl::StrCat("linears ", BytesText(result.linear_bytes_before()), " as 16-bit floats, ",
                   BytesText(result.linear_bytes_after()), " after");
  if (result.linear_bytes_after() > 0) {
    absl::StrAppendFormat(&text, " (%.1f times smaller)",
                          static_cast<double>(result.linear_bytes_before()) /
                              static_cast<double>(result.linear_bytes_after()));
  }
  return text;
}

std::string FileBytesText(const Job::Result& result) {
  std::string text = absl::StrCat("source ", BytesText(result.source_size_bytes()));
  if (!result.source_format().empty()) absl::StrAppend(&text, " (", result.source_format(), ")");
  absl::StrAppend(&text, ", artifact ", BytesText(result.size_bytes()));
  return text;
}

std::string CalibrationText(const Job& job) {
  const auto& report = job.result().calibration();
  std::string text = absl::StrCat(CountText(report.tokens()), " tokens in ",
                                  CountText(report.windows()), " windows");
  absl::StrAppend(&text,
                  job.config().calibration().uri().empty()
                      ? " of the model's own text"
                      : absl::StrCat("; samples: ", CountText(report.samples_kept()), " kept, ",
                                     CountText(report.samples_dropped()), " dropped, ",
                                     CountText(report.samples_short()), " short"));
  return text;
}

// A row of the original and one of the result for each task.
std::string TaskTable(const Job::Result& result) {
  Table table({{"task"},
               {"items", Align::kRight},
               {"model"},
               {"accuracy %", Align::kRight},
               {"accuracy norm. %", Align::kRight},
               {"perplexity", Align::kRight}});
  for (const Job::TaskQuality& task : result.tasks()) {
    for (const v1::TaskResult* model : {&task.before(), &task.after()}) {
      const TaskTexts texts = TextsOf(*model);
      table.AddRow({SafeText(model->name()), CountText(model->items()),
                    model == &task.before() ? "original" : "quantized", texts.accuracy,
                    texts.accuracy_norm, texts.perplexity});
    }
  }
  return table.Text(2);
}

std::string StageTable(const Job::Result& result) {
  Table table({{"stage"}, {"seconds", Align::kRight}});
  double total = 0;
  for (const auto& time : result.stage_times()) {
    table.AddRow({Job::Stage_Name(time.stage()), absl::StrFormat("%.2f", time.seconds())});
    total += time.seconds();
  }
  table.AddRow({"all stages", absl::StrFormat("%.2f", total)});
  return table.Text(2);
}

// Where a job on a device spent its time: cuts across the stages, and is finer.
std::string StepTable(const Job::Result& result) {
  Table table({{"kind of work"}, {"seconds", Align::kRight}});
  for (const auto& time : result.step_times()) {
    table.AddRow({time.name(), absl::StrFormat("%.2f", time.seconds())});
  }
  return table.Text(2);
}

std::string WorstLinearsTable(const Job::Result& result) {
  std::vector<const Job::LinearResult*> linears;
  for (const auto& linear : result.per_layer()) linears.push_back(&linear);
  std::stable_sort(linears.begin(), linears.end(), [](const auto* a, const auto* b) {
    return a->relative_error() > b->relative_error();
  });
  if (linears.size() > kWorstLinearsMax) linears.resize(kWorstLinearsMax);
  Table table({{"worst linears"},
               {"bits", Align::kRight},
               {"relative error", Align::kRight},
               {"damping", Align::kRight},
               {"dead columns", Align::kRight},
               {"rounded because"}});
  for (const auto* linear : linears) {
    table.AddRow({linear->name(), absl::StrCat(linear->bits()),
                  SignificantText(linear->relative_error(), 3),
                  absl::StrFormat("%g %%", 100.0 * linear->damp_percent()),
                  absl::StrCat(linear->dead_columns()), linear->fallback()});
  }
  return table.Text(2);
}

// "1.2 GB needed, 20.1 GB of 24.7 GB free"
std::string SupplyText(const Job::Preflight::Supply& supply) {
  std::string text = BytesText(supply.bytes_needed()) + " needed";
  if (supply.bytes_free() > 0) {
    absl::StrAppend(&text, ", ", BytesText(supply.bytes_free()));
    if (supply.bytes_total() > 0) absl::StrAppend(&text, " of ", BytesText(supply.bytes_total()));
    text += " free";
  }
  return text;
}

std::string WarningsText(const google::protobuf::RepeatedPtrField<std::string>& warnings) {
  std::string text = warnings.empty() ? "" : "\n  warnings\n";
  for (const std::string& warning : warnings) {
    absl::StrAppend(&text, "  - ", SafeText(warning), "\n");
  }
  return text;
}

std::string ResultText(const Job& job) {
  const Job::Result& result = job.result();
  std::string text;
  AppendFact(text, "bits", RecipeText(job));
  AppendFact(
      text, "",
      absl::StrFormat("%.3f bits a weight, scales and zeros included", result.bits_per_weight()));
  AppendFact(text, "size", LinearBytesText(result));
  AppendFact(text, "", FileBytesText(result));
  AppendFact(text, "perplexity", PerplexityText(result));
  if (result.has_kl_divergence()) AppendFact(text, "divergence", DivergenceText(result));
  AppendFact(text, "rotation gate",
             absl::StrCat(SignificantText(result.rotation_gate(), 2),
                          " of the largest logit, before anything was quantized"));
  AppendFact(text, "calibration", CalibrationText(job));
  if (!result.device().empty()) AppendFact(text, "device", result.device());
  if (result.peak_memory_bytes() > 0) AppendFact(text, "memory", MemoryText(result));
  if (result.tasks_size() > 0) absl::StrAppend(&text, "\n", TaskTable(result));
  if (result.stage_times_size() > 0) absl::StrAppend(&text, "\n", StageTable(result));
  if (result.step_times_size() > 0) absl::StrAppend(&text, "\n", StepTable(result));
  if (result.per_layer_size() > 0) absl::StrAppend(&text, "\n", WorstLinearsTable(result));
  return text + WarningsText(result.warnings());
}

std::string ErrorFact(const Job& job) {
  std::string text =
      absl::StrCat(absl::StatusCodeToString(static_cast<absl::StatusCode>(job.error().code())),
                   ": ", job.error().message());
  if (!job.error_reason().empty()) absl::StrAppend(&text, " (", job.error_reason(), ")");
  return text;
}

std::string MethodText(v1::QuantizationConfig::Method method) {
  if (method == v1::QuantizationConfig::METHOD_UNSPECIFIED) return "GPTQ";
  return v1::QuantizationConfig::Method_Name(method);
}

// "2", "2 (layers.0.*: 4)", "2 (with 3 overrides)"
std::string BitsText(const v1::QuantizationConfig& config) {
  std::string text = absl::StrCat(config.bits() == 0 ? 4 : config.bits());
  if (config.overrides_size() == 1) {
    const v1::BitsOverride& entry = config.overrides(0);
    absl::StrAppend(&text, " (", SafeText(entry.pattern()), ": ", entry.bits(), ")");
  } else if (config.overrides_size() > 1) {
    absl::StrAppend(&text, " (with ", config.overrides_size(), " overrides)");
  }
  return text;
}

std::string GridText(const v1::QuantizationConfig& config) {
  if (config.symmetric()) return " symmetric";
  if (config.grid() == v1::QuantizationConfig::CODEBOOK) return " with codebooks";
  if (config.zero_point() == v1::QuantizationConfig::FLOAT_ZERO) return " with float zeros";
  return "";
}

}  // namespace

std::string RecipeText(const Job& job) {
  const v1::QuantizationConfig& config = job.config();
  const bool resolved = job.has_result() && job.result().group_size() != 0;
  return absl::StrCat(BitsText(config), ", ",
                      GroupText(resolved ? job.result().group_size() : config.group_size()), ", ",
                      MethodText(config.method()), GridText(config), ", ",
                      RotationText(config.rotation(), resolved ? job.result().rotation_block_size()
                                                               : config.rotation().block_size()),
                      RunTimeText(config, resolved ? job.result().online_block_size()
                                                   : config.rotation().online_block_size()));
}

std::string PreflightText(const Job& job) {
  const Job::Preflight& preflight = job.preflight();
  std::string text;
  if (!preflight.worker().empty()) {
    std::string worker = ResourceId(preflight.worker());
    if (!preflight.device().empty()) absl::StrAppend(&worker, ", jobs on ", preflight.device());
    AppendFact(text, "worker", worker);
  }
  if (preflight.has_memory()) AppendFact(text, "memory", SupplyText(preflight.memory()));
  if (preflight.has_device_memory()) {
    AppendFact(text, "device memory", SupplyText(preflight.device_memory()));
  }
  if (preflight.has_disk()) AppendFact(text, "disk", SupplyText(preflight.disk()));
  return text + WarningsText(preflight.warnings());
}

std::string JobReport(const Job& job) {
  std::string text = absl::StrCat("job ", ResourceId(job.name()), ": ",
                                  Job::State_Name(job.state()), ", model '", job.model_name(), "'");
  if (job.has_start_time() && job.has_end_time()) {
    absl::StrAppend(&text, ", ran ", ClockText(RunTime(job)));
  }
  text = SafeText(text) + "\n";
  AppendFact(text, "source", job.source_model());
  if (!job.display_name().empty()) AppendFact(text, "title", job.display_name());
  if (!job.config().preset().empty()) AppendFact(text, "preset", job.config().preset());
  if (job.attempt() > 0) {
    AppendFact(
        text, "attempt",
        absl::StrCat(job.attempt(), job.worker().empty() ? "" : " on ", ResourceId(job.worker())));
  }
  AppendFact(text, "created", TimeText(job.create_time()));
  if (job.state() == Job::RUNNING) {
    std::string progress = absl::StrFormat("%s, %.0f %%", Job::Stage_Name(job.stage()),
                                           100.0 * job.progress().fraction());
    if (job.progress().layers_total() > 0) {
      absl::StrAppend(&progress, ", ", job.progress().layers_done(), " of ",
                      job.progress().layers_total(), " layers");
    }
    AppendFact(text, "progress", progress);
  }
  if (job.error().code() != 0) AppendFact(text, "error", ErrorFact(job));
  if (job.has_result()) {
    text += ResultText(job);
  } else {
    AppendFact(text, "bits", RecipeText(job));
  }
  return text;
}

std::string JobTable(const std::vector<Job>& jobs) {
  Table table({{"JOB"},
               {"STATE"},
               {"STAGE"},
               {"DONE", Align::kRight},
               {"MODEL"},
               {"BITS", Align::kRight},
               {"CREATED"},
               {"ERROR"}});
  for (const Job& job : jobs) {
    table.AddRow({ResourceId(job.name()), Job::State_Name(job.state()),
                  job.state() == Job::RUNNING ? Job::Stage_Name(job.stage()) : "",
                  absl::StrFormat("%.0f %%", 100.0 * job.progress().fraction()), job.model_name(),
                  absl::StrCat(job.config().bits() == 0 ? 4 : job.config().bits()),
                  TimeText(job.create_time()), job.error().code() == 0 ? "" : ErrorFact(job)});
  }
  return table.Text();
}

}  // namespace walsh::client
