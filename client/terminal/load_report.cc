#include "client/terminal/load_report.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/table.h"

namespace walsh::client {
namespace {

void AppendFact(std::string& text, const char* name, const std::string& fact) {
  absl::StrAppend(&text, absl::StrFormat("  %-10s", name), fact, "\n");
}

std::string RateText(double per_second, const char* what) {
  return absl::StrCat(SignificantText(per_second, 4), " ", what, " a second");
}

std::string LoadText(const LoadDescription& description) {
  if (description.rate > 0) {
    return absl::StrCat("Poisson arrivals, ", RateText(description.rate, "requests"), ", at most ",
                        CountText(description.concurrency), " at once");
  }
  return absl::StrCat("closed loop, ", CountText(description.concurrency),
                      description.concurrency == 1 ? " stream" : " streams");
}

void AddTimes(Table& table, const char* name, const Distribution& times) {
  const auto text = [](double seconds) { return SignificantText(1000 * seconds, 4); };
  table.AddRow(
      {name, text(times.mean), text(times.p50), text(times.p90), text(times.p99), text(times.max)});
}

nlohmann::ordered_json Json(const Distribution& times) {
  return {{"mean", times.mean},
          {"p50", times.p50},
          {"p90", times.p90},
          {"p99", times.p99},
          {"max", times.max}};
}

}  // namespace

std::string LoadReport(const LoadDescription& description, const LoadSummary& summary) {
  std::string text =
      absl::StrCat("model '", SafeText(description.model), "', ", LoadText(description),
                   summary.is_stopped ? "; stopped early" : "", "\n");
  AppendFact(text, "requests",
             absl::StrCat(CountText(summary.n_done), " done, ", CountText(summary.n_failed()),
                          " failed in ", SecondsText(summary.seconds), "; ",
                          RateText(summary.PerSecond(summary.n_done), "requests"), ", at most ",
                          CountText(summary.concurrency_peak), " at once"));
  if (summary.n_unsent > 0) {
    AppendFact(text, "unsent",
               absl::StrCat(CountText(summary.n_unsent),
                            " more were due and not sent: the service fell behind the rate"));
  }
  AppendFact(text, "prompts",
             absl::StrCat(CountText(summary.n_prompt_tokens), " tokens, ",
                          RateText(summary.PerSecond(summary.n_prompt_tokens), "tokens")));
  AppendFact(text, "output",
             absl::StrCat(CountText(summary.n_output_tokens), " tokens, ",
                          RateText(summary.PerSecond(summary.n_output_tokens), "tokens")));
  Table table({{"milliseconds"},
               {"mean", Align::kRight},
               {"p50", Align::kRight},
               {"p90", Align::kRight},
               {"p99", Align::kRight},
               {"max", Align::kRight}});
  AddTimes(table, "time to first token", summary.time_to_first_token);
  AddTimes(table, "inter-token latency", summary.inter_token_latency);
  AddTimes(table, "time per output token", summary.time_per_output_token);
  AddTimes(table, "request latency", summary.request_latency);
  absl::StrAppend(&text, "\n", table.Text(2));
  if (!summary.failures.empty()) text += "\n  failures\n";
  for (const auto& [code, failed] : summary.failures) {
    absl::StrAppend(&text, "  - ", absl::StatusCodeToString(code), ", ", CountText(failed.count),
                    " times: ", SafeText(failed.example), "\n");
  }
  return text;
}

std::string LoadJson(const LoadDescription& description, const LoadSummary& summary) {
  nlohmann::ordered_json failures = nlohmann::ordered_json::object();
  for (const auto& [code, failed] : summary.failures) {
    failures[absl::StatusCodeToString(code)] = {{"count", failed.count},
                                                {"example", failed.example}};
  }
  const nlohmann::ordered_json json = {
      {"model", description.model},
      {"load", description.rate > 0 ? "poisson" : "closed"},
      {"concurrency", description.concurrency},
      {"rate", description.rate},
      {"prompt_tokens_each", description.prompt_tokens},
      {"shared_prefix_tokens", description.shared_tokens},
      {"max_tokens", description.max_tokens},
      {"stopped", summary.is_stopped},
      {"seconds", summary.seconds},
      {"requests", summary.n_done},
      {"failed", summary.n_failed()},
      {"failures", std::move(failures)},
      {"unsent", summary.n_unsent},
      {"concurrency_peak", summary.concurrency_peak},
      {"requests_per_second", summary.PerSecond(summary.n_done)},
      {"prompt_tokens", summary.n_prompt_tokens},
      {"prompt_tokens_per_second", summary.PerSecond(summary.n_prompt_tokens)},
      {"output_tokens", summary.n_output_tokens},
      {"output_tokens_per_second", summary.PerSecond(summary.n_output_tokens)},
      {"time_to_first_token_seconds", Json(summary.time_to_first_token)},
      {"inter_token_latency_seconds", Json(summary.inter_token_latency)},
      {"time_per_output_token_seconds", Json(summary.time_per_output_token)},
      {"request_latency_seconds", Json(summary.request_latency)}};
  return json.dump(2, ' ', /*ensure_ascii=*/false,
                   nlohmann::ordered_json::error_handler_t::replace) +
         "\n";
}

}  // namespace walsh::client
