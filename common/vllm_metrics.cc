#include "common/vllm_metrics.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

namespace walsh::metrics {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;

struct Alias {
  std::string_view vllm;
  std::string_view walsh;
};
constexpr Alias kAliases[] = {
    {"vllm:num_requests_running", "walsh_num_requests_running"},
    {"vllm:num_requests_waiting", "walsh_num_requests_waiting"},
    {"vllm:kv_cache_usage_perc", "walsh_kv_cache_usage_perc"},
    {"vllm:cache_config_info", "walsh_kv_cache_config_info"},
    {"vllm:prompt_tokens_total", "walsh_prompt_tokens_total"},
    {"vllm:generation_tokens_total", "walsh_generation_tokens_total"},
    // Every prompt's tokens are looked up.
    {"vllm:prefix_cache_queries_total", "walsh_prompt_tokens_total"},
    {"vllm:prefix_cache_hits_total", "walsh_prefix_cache_hit_tokens_total"},
    {"vllm:num_preemptions_total", "walsh_num_preemptions_total"},
    {"vllm:request_success_total", "walsh_request_success_total"},
    {"vllm:time_to_first_token_seconds", "walsh_time_to_first_token_seconds"},
    {"vllm:inter_token_latency_seconds", "walsh_inter_token_latency_seconds"},
    {"vllm:request_time_per_output_token_seconds", "walsh_request_time_per_output_token_seconds"},
    {"vllm:e2e_request_latency_seconds", "walsh_e2e_request_latency_seconds"},
    {"vllm:request_queue_time_seconds", "walsh_request_queue_time_seconds"},
    {"vllm:request_prefill_time_seconds", "walsh_request_prefill_time_seconds"},
    {"vllm:request_decode_time_seconds", "walsh_request_decode_time_seconds"},
    {"vllm:request_prompt_tokens", "walsh_request_prompt_tokens"},
    {"vllm:request_generation_tokens", "walsh_request_generation_tokens"},
    {"vllm:iteration_tokens_total", "walsh_iteration_tokens"},
};

void Rename(ClientMetric::Label& label) {
  if (label.name == "num_blocks") {
    label.name = "num_gpu_blocks";
  } else if (label.name == "prefix_cache") {
    label.name = "enable_prefix_caching";
  } else if (label.name == "finished_reason") {
    // vLLM has "stop" for whatever ended a text by itself.
    if (label.value == "eos" || label.value == "stop_sequence") label.value = "stop";
    if (label.value == "deadline") label.value = "abort";
  }
}

ClientMetric WithVllmLabels(ClientMetric metric) {
  for (ClientMetric::Label& label : metric.label) Rename(label);
  metric.label.push_back({.name = "engine", .value = "0"});
  return metric;
}

// Reasons that are apart here and one in vLLM share a series.
void AddOrMerge(ClientMetric metric, std::vector<ClientMetric>& metrics) {
  const auto same = std::find_if(metrics.begin(), metrics.end(), [&](const ClientMetric& other) {
    return other.label == metric.label;
  });
  if (same == metrics.end()) {
    metrics.push_back(std::move(metric));
  } else {
    same->counter.value += metric.counter.value;
  }
}

}  // namespace

std::vector<MetricFamily> VllmAliases(const std::vector<MetricFamily>& families) {
  std::vector<MetricFamily> aliases;
  for (const Alias& alias : kAliases) {
    const auto ours = std::find_if(families.begin(), families.end(),
                                   [&](const MetricFamily& f) { return f.name == alias.walsh; });
    if (ours == families.end()) continue;
    MetricFamily& family = aliases.emplace_back();
    family.name = std::string(alias.vllm);
    family.help = ours->help;
    family.type = ours->type;
    for (const ClientMetric& metric : ours->metric) {
      AddOrMerge(WithVllmLabels(metric), family.metric);
    }
  }
  return aliases;
}

}  // namespace walsh::metrics
