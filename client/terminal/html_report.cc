#include "client/terminal/html_report.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "client/resource_name.h"
#include "client/terminal/evaluation_report.h"
#include "client/terminal/job_report.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "common/limits.h"

namespace walsh::client {
namespace {

using Job = v1::QuantizationJob;

constexpr char kHead[] = R"html(<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
)html";

constexpr char kStyle[] = R"html(<style>
:root { color-scheme: light dark; --line: #8884; --bar: #4477aa; --soft: #999999; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr { border-top: 1px solid var(--line); }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.grid { stroke: var(--line); } .bar { fill: var(--bar); }
.error { border-left: 4px solid #cc3311; padding-left: .8rem; }
.soft { color: var(--soft); }
</style>
)html";

// Told apart also by those who do not see red and green (Tol's bright scheme).
constexpr std::array<const char*, 7> kColors = {"#4477aa", "#66ccee", "#228833", "#ccbb44",
                                                "#ee6677", "#aa3377", "#777777"};

std::string Number(double value) { return absl::StrFormat("%.1f", value); }

std::string SvgText(double x, double y, std::string_view anchor, std::string_view text) {
  return absl::StrCat("<text x=\"", Number(x), "\" y=\"", Number(y), "\" text-anchor=\"",
                      std::string(anchor), "\">", HtmlText(text), "</text>\n");
}

std::string SvgLine(double x1, double y1, double x2, double y2) {
  return absl::StrCat("<line class=\"grid\" x1=\"", Number(x1), "\" y1=\"", Number(y1), "\" x2=\"",
                      Number(x2), "\" y2=\"", Number(y2), "\"/>\n");
}

std::string SvgStart(double width, double height, std::string_view label) {
  return absl::StrFormat(
      "<svg viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" role=\"img\" "
      "aria-label=\"%s\">\n",
      width, height, width, height, HtmlText(label));
}

struct BarRow {
  std::string label;
  double value = 0;
  std::string text;
};

// Horizontal bars from 0.
std::string Bars(const std::vector<BarRow>& rows, std::string_view label) {
  constexpr double kWidth = 720, kLabel = 170, kValue = 110, kRow = 24;
  double highest = 0;
  for (const BarRow& row : rows) highest = std::max(highest, row.value);
  std::string svg = SvgStart(kWidth, kRow * static_cast<double>(rows.size()) + 4, label);
  double y = 2;
  for (const BarRow& row : rows) {
    const double length =
        highest > 0 ? std::max(1.0, (kWidth - kLabel - kValue) * row.value / highest) : 1.0;
    svg += SvgText(kLabel - 8, y + 16, "end", row.label);
    absl::StrAppend(&svg, "<rect class=\"bar\" x=\"", Number(kLabel), "\" y=\"", Number(y + 3),
                    "\" width=\"", Number(length), "\" height=\"", Number(kRow - 6), "\"/>\n");
    svg += SvgText(kLabel + length + 6, y + 16, "start", row.text);
    y += kRow;
  }
  return svg + "</svg>\n";
}

// "layers.3.mlp.down_proj" is of layer 3 and kind "mlp.down_proj".
std::string KindOf(const Job::LinearResult& linear) {
  const std::string prefix = absl::StrCat("layers.", linear.layer(), ".");
  const std::string& name = linear.name();
  return name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : name;
}

// Error over layers, a line for each kind of linear; the errors' axis is logarithmic.
class ErrorPlot {
 public:
  explicit ErrorPlot(const Job::Result& result) {
    for (const Job::LinearResult& linear : result.per_layer()) {
      // What is exact has no logarithm; no model has such a layer.
      const double error = linear.relative_error();
      if (!std::isfinite(error) || error <= 0) continue;
      if (linear.layer() < 0 || linear.layer() >= limits::kLayersMax) continue;
      const std::string kind = KindOf(linear);
      if (lines_.count(kind) == 0) kinds_.push_back(kind);
      lines_[kind].emplace_back(linear.layer(), error);
      layers_max_ = std::max(layers_max_, linear.layer());
      lowest_ = std::min(lowest_, error);
      highest_ = std::max(highest_, error);
    }
  }

  std::string Svg() const {
    if (kinds_.empty()) return "";
    std::string svg = SvgStart(kWidth, kHeight, "Relative error of each linear by layer");
    const int low = LowestDecade(), high = HighestDecade();
    for (int decade = low; decade <= high; ++decade) {
      const double y = Y(std::pow(10.0, decade));
      svg += SvgLine(kLeft, y, kRight, y);
      svg += SvgText(kLeft - 8, y + 4, "end", absl::StrFormat("1e%d", decade));
    }
    const int step = std::max(1, (layers_max_ + 10) / 10);
    for (int layer = 0; layer <= layers_max_; layer += step) {
      svg += SvgText(X(layer), kBottom + 18, "middle", absl::StrCat(layer));
    }
    svg += SvgText((kLeft + kRight) / 2, kHeight - 4, "middle", "layer");
    for (size_t i = 0; i < kinds_.size(); ++i) svg += Line(i);
    return svg + "</svg>\n";
  }

 private:
  static constexpr double kWidth = 860, kHeight = 340;
  static constexpr double kLeft = 60, kRight = 680, kTop = 12, kBottom = 294;

  int LowestDecade() const { return static_cast<int>(std::floor(std::log10(lowest_))); }
  int HighestDecade() const {
    return std::max(LowestDecade() + 1, static_cast<int>(std::ceil(std::log10(highest_))));
  }
  double X(int layer) const {
    return layers_max_ == 0 ? (kLeft + kRight) / 2
                            : kLeft + (kRight - kLeft) * layer / static_cast<double>(layers_max_);
  }
  double Y(double error) const {
    const double share = (std::log10(error) - LowestDecade()) / (HighestDecade() - LowestDecade());
    return kBottom - (kBottom - kTop) * share;
  }

  std::string Line(size_t index) const {
    const std::string& kind = kinds_[index];
    const char* color = kColors[std::min(index, kColors.size() - 1)];
    std::string points, dots;
    for (const auto& [layer, error] : lines_.at(kind)) {
      absl::StrAppend(&points, Number(X(layer)), ",", Number(Y(error)), " ");
      absl::StrAppend(
          &dots, "<circle cx=\"", Number(X(layer)), "\" cy=\"", Number(Y(error)),
          "\" r=\"2.5\" fill=\"", color, "\"><title>",
          HtmlText(absl::StrCat("layer ", layer, ", ", kind, ": ", SignificantText(error, 3))),
          "</title></circle>\n");
    }
    const double y = kTop + 8 + 20 * static_cast<double>(index);
    return absl::StrCat("<polyline fill=\"none\" stroke=\"", color,
                        "\" stroke-width=\"1.5\" points=\"", points, "\"/>\n", dots, "<rect x=\"",
                        Number(kRight + 16), "\" y=\"", Number(y - 9),
                        "\" width=\"12\" height=\"10\" fill=\"", color, "\"/>\n",
                        SvgText(kRight + 34, y, "start", kind));
  }

  std::vector<std::string> kinds_;  // in the order of their first linear
  std::map<std::string, std::vector<std::pair<int, double>>> lines_;
  int layers_max_ = 0;
  double lowest_ = 1e300, highest_ = 1e-300;
};

class Facts {
 public:
  void Add(std::string_view name, std::string_view fact) {
    if (fact.empty()) return;
    absl::StrAppend(&rows_, "<tr><th>", HtmlText(name), "</th><td>", HtmlText(fact),
                    "</td></tr>\n");
  }
  std::string Html() const { return absl::StrCat("<table>\n", rows_, "</table>\n"); }

 private:
  std::string rows_;
};

std::string JobFacts(const Job& job) {
  Facts facts;
  facts.Add("state", Job::State_Name(job.state()));
  facts.Add("source", job.source_model());
  facts.Add("title", job.display_name());
  facts.Add("preset", job.config().preset());
  facts.Add("recipe", absl::StrCat("bits ", RecipeText(job)));
  facts.Add("created", job.has_create_time() ? TimeText(job.create_time()) : "");
  facts.Add("worker", ResourceId(job.worker()));
  if (!job.has_result()) return facts.Html();
  const Job::Result& result = job.result();
  facts.Add("device", result.device());
  facts.Add("stored",
            absl::StrFormat("%.3f bits a weight in the linears, scales and zeros included",
                            result.bits_per_weight()));
  facts.Add("files",
            absl::StrCat("source ", BytesText(result.source_size_bytes()),
                         result.source_format().empty() ? "" : " as ", result.source_format(),
                         ", artifact ", BytesText(result.size_bytes())));
  facts.Add("calibration", absl::StrCat(CountText(result.calibration().tokens()), " tokens in ",
                                        CountText(result.calibration().windows()), " windows"));
  if (result.rotation_gate() > 0) {
    facts.Add("rotation", absl::StrFormat("changes logits by %.1e of the largest, before anything "
                                          "was quantized",
                                          result.rotation_gate()));
  }
  if (result.peak_memory_bytes() > 0) {
    facts.Add("memory", absl::StrCat(BytesText(result.peak_memory_bytes()), " at most"));
  }
  return facts.Html();
}

std::string TaskRow(std::string_view name, std::string_view items, std::string_view model,
                    const TaskTexts& texts) {
  std::string html = absl::StrCat("<tr><td>", HtmlText(name), "</td><td class=\"n\">",
                                  HtmlText(items), "</td><td>", HtmlText(model), "</td>");
  for (const std::string& text : {texts.accuracy, texts.accuracy_norm, texts.perplexity}) {
    absl::StrAppend(&html, "<td class=\"n\">", HtmlText(text), "</td>");
  }
  return html + "</tr>\n";
}

std::string TasksSection(const Job::Result& result) {
  if (result.tasks().empty()) return "";
  std::string html =
      "<h2>Zero-shot tasks</h2>\n<table>\n<thead><tr><th>task</th><th class=\"n\">items</th>"
      "<th>model</th><th class=\"n\">accuracy %</th><th class=\"n\">accuracy norm. %</th>"
      "<th class=\"n\">perplexity</th></tr></thead>\n<tbody>\n";
  for (const Job::TaskQuality& task : result.tasks()) {
    html += TaskRow(task.after().name(), CountText(task.after().items()), "original",
                    TextsOf(task.before()));
    html += TaskRow("", "", "quantized", TextsOf(task.after()));
  }
  return html + "</tbody>\n</table>\n<p class=\"soft\">\u00b1 standard error over the items</p>\n";
}

std::string QualitySection(const Job::Result& result, const v1::QualityGate& gate) {
  std::string html = "<h2>Quality</h2>\n";
  const double before = result.perplexity_before(), after = result.perplexity_after();
  if (before <= 0 || after <= 0) return html + "<p>No perplexity was measured.</p>\n";
  html += Bars(
      {{"perplexity before", before, EstimateText(before, result.perplexity_before_stderr(), 5)},
       {"perplexity after", after, EstimateText(after, result.perplexity_after_stderr(), 5)}},
      "Perplexity before and after");
  Facts facts;
  std::string ratio = absl::StrFormat("x%.4f%s on %s tokens", after / before,
                                      ErrorText(result.perplexity_ratio_stderr()),
                                      CountText(result.evaluation_tokens()));
  if (gate.has_max_perplexity_ratio()) {
    absl::StrAppend(&ratio, "; the gate allows x", SignificantText(gate.max_perplexity_ratio(), 4));
  }
  facts.Add("perplexity", ratio);
  if (result.has_kl_divergence()) {
    std::string divergence =
        absl::StrCat(EstimateText(result.kl_divergence(), result.kl_divergence_stderr(), 4),
                     " nats a token from the original");
    if (gate.has_max_kl_divergence()) {
      absl::StrAppend(&divergence, "; the gate allows ",
                      SignificantText(gate.max_kl_divergence(), 4));
    }
    facts.Add("KL divergence", divergence);
  }
  if (result.has_top1_agreement()) {
    facts.Add("top-1 agreement",
              absl::StrFormat("%.2f %% of the tokens", 100 * result.top1_agreement()));
  }
  return html + facts.Html();
}

std::string SizeSection(const Job::Result& result) {
  if (result.linear_bytes_before() <= 0) return "";
  const auto row = [](const char* label, int64_t bytes) {
    return BarRow{label, static_cast<double>(bytes), BytesText(bytes)};
  };
  return "<h2>Size of the linears</h2>\n" +
         Bars({row("as 16-bit floats", result.linear_bytes_before()),
               row("as stored", result.linear_bytes_after())},
              "Bytes of the linears before and after");
}

template <typename Times, typename Name>
std::string TimeSection(std::string_view title, const Times& times, const Name& name) {
  if (times.empty()) return "";
  std::vector<BarRow> rows;
  double total = 0;
  for (const auto& time : times) {
    rows.push_back({name(time), time.seconds(), SecondsText(time.seconds())});
    total += time.seconds();
  }
  return absl::StrCat("<h2>", HtmlText(title), "</h2>\n", Bars(rows, title), "<p class=\"soft\">",
                      SecondsText(total), " in all</p>\n");
}

std::string LinearsSection(const Job::Result& result) {
  if (result.per_layer().empty()) return "";
  std::string html = "<h2>Error by layer</h2>\n";
  html += ErrorPlot(result).Svg();
  html +=
      "<p class=\"soft\">tr(\u0394W H \u0394W\u1d40) / tr(W H W\u1d40) over the calibration "
      "inputs</p>\n"
      "<details><summary>All linears</summary>\n<table>\n<thead><tr><th>linear</th>"
      "<th class=\"n\">bits</th><th class=\"n\">relative error</th><th class=\"n\">damping</th>"
      "<th class=\"n\">dead columns</th><th>rounded because</th></tr></thead>\n<tbody>\n";
  for (const Job::LinearResult& linear : result.per_layer()) {
    absl::StrAppend(&html, "<tr><td>", HtmlText(linear.name()), "</td><td class=\"n\">",
                    linear.bits(), "</td><td class=\"n\">",
                    SignificantText(linear.relative_error(), 3), "</td><td class=\"n\">",
                    absl::StrFormat("%g %%", 100 * linear.damp_percent()), "</td><td class=\"n\">",
                    linear.dead_columns(), "</td><td>", HtmlText(linear.fallback()),
                    "</td></tr>\n");
  }
  return html + "</tbody></table>\n</details>\n";
}

std::string WarningsSection(const Job::Result& result) {
  if (result.warnings().empty()) return "";
  std::string html = "<h2>Warnings</h2>\n<ul>\n";
  for (const std::string& warning : result.warnings()) {
    absl::StrAppend(&html, "<li>", HtmlText(warning), "</li>\n");
  }
  return html + "</ul>\n";
}

std::string ErrorSection(const Job& job) {
  if (job.error().code() == 0) return "";
  const auto code = static_cast<absl::StatusCode>(job.error().code());
  return absl::StrCat("<p class=\"error\"><strong>", HtmlText(absl::StatusCodeToString(code)),
                      "</strong> ", HtmlText(job.error_reason()), "<br>",
                      HtmlText(job.error().message()), "</p>\n");
}

}  // namespace

std::string HtmlText(std::string_view text) {
  return absl::StrReplaceAll(
      SafeText(text),
      {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"}});
}

std::string HtmlReport(const Job& job) {
  const std::string title =
      HtmlText(absl::StrCat("walsh: ", job.model_name(), " (job ", ResourceId(job.name()), ")"));
  std::string html = absl::StrCat(kHead, "<title>", title, "</title>\n", kStyle,
                                  "</head>\n<body>\n<h1>", title, "</h1>\n");
  html += ErrorSection(job);
  html += JobFacts(job);
  if (job.has_result()) {
    const Job::Result& result = job.result();
    html += QualitySection(result, job.config().quality_gate());
    html += TasksSection(result);
    html += LinearsSection(result);
    html += TimeSection("Time by stage", result.stage_times(), [](const Job::StageTime& time) {
      return std::string(Job::Stage_Name(time.stage()));
    });
    html += TimeSection("Time by kind of work", result.step_times(),
                        [](const Job::StepTime& time) { return time.name(); });
    html += SizeSection(result);
    html += WarningsSection(result);
  }
  return html + "</body>\n</html>\n";
}

}  // namespace walsh::client
