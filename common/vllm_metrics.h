// The metrics of a worker under the names that vLLM gives them, so that dashboards, autoscalers and
// gateways made for vLLM read a walsh worker as it is.
//
// An alias is the same series once more, made when the page is rendered: nothing is counted twice.
// Labels are vLLM's, too: `engine` is always "0", and `finished_reason` is one of its three.
// docs/metrics.md lists the names.
//
// Source:  vLLM 0.11, vllm/v1/metrics/loggers.py
// Threads: safe
#pragma once

#include <prometheus/metric_family.h>

#include <vector>

namespace walsh::metrics {

// Families that vLLM has no counterpart of have no alias.
std::vector<prometheus::MetricFamily> VllmAliases(
    const std::vector<prometheus::MetricFamily>& families);

}  // namespace walsh::metrics
