// The Prometheus registry of a process and the bucket lists that the service's histograms share.
//
// Names, labels and meanings are those of docs/metrics.md; each component declares its own families
// beside the code that counts. Labels take values from fixed sets and from the bounded set of model
// names only.
//
// Threads: safe.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>

namespace walsh::metrics {

// Process-wide; handed to the HTTP server that exposes it.
std::shared_ptr<prometheus::Registry> Registry();

struct RenderOptions {
  bool vllm_names = false;  // beside ours (vllm_metrics.h)
};
// Text exposition of everything registered.
std::string Render(const RenderOptions& options = {});

// Registers walsh_build_info{version,revision,cuda} = 1.
void RegisterBuildInfo();

prometheus::Family<prometheus::Counter>& Counter(const std::string& name, const std::string& help);
prometheus::Family<prometheus::Gauge>& Gauge(const std::string& name, const std::string& help);
prometheus::Family<prometheus::Histogram>& Histogram(const std::string& name,
                                                     const std::string& help);

using Buckets = prometheus::Histogram::BucketBoundaries;
const Buckets& TimeToFirstTokenBuckets();   // seconds, 0.001 … 2560
const Buckets& InterTokenLatencyBuckets();  // seconds, 0.001 … 80
const Buckets& RequestLatencyBuckets();     // seconds, 0.3 … 7680
const Buckets& TokenCountBuckets();         // 1-2-5 series to 1,000,000
const Buckets& JobDurationBuckets();        // seconds, 1 … 86,400

}  // namespace walsh::metrics
