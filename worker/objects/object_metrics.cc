#include "worker/objects/object_metrics.h"

#include "common/metrics.h"

namespace walsh::objects {
namespace {

constexpr const char* kMethods[] = {"GET", "PUT", "POST", "DELETE"};

struct Families {
  prometheus::Family<prometheus::Counter>& requests = metrics::Counter(
      "walsh_object_store_requests_total", "Requests to the endpoint of buckets, tries included.");
  prometheus::Family<prometheus::Histogram>& seconds = metrics::Histogram(
      "walsh_object_store_request_seconds", "From a request to the end of its answer.");
  prometheus::Family<prometheus::Counter>& bytes = metrics::Counter(
      "walsh_object_store_bytes_total", "Bytes of the bodies of requests and answers.");
  prometheus::Counter& sent = bytes.Add({{"direction", "sent"}});
  prometheus::Counter& received = bytes.Add({{"direction", "received"}});

  prometheus::Counter& Requests(const std::string& method, absl::StatusCode code) {
    return requests.Add({{"method", method}, {"code", absl::StatusCodeToString(code)}});
  }
  prometheus::Histogram& Seconds(const std::string& method) {
    return seconds.Add({{"method", method}}, metrics::TimeToFirstTokenBuckets());
  }
};

Families& AllFamilies() {
  static Families families;
  return families;
}

}  // namespace

void RegisterObjectMetrics() {
  for (const char* const method : kMethods) {
    AllFamilies().Requests(method, absl::StatusCode::kOk);
    AllFamilies().Requests(method, absl::StatusCode::kUnavailable);
    AllFamilies().Seconds(method);
  }
}

void ObserveRequest(const std::string& method, absl::StatusCode code, absl::Duration elapsed,
                    int64_t bytes_sent, int64_t bytes_received) {
  AllFamilies().Requests(method, code).Increment();
  AllFamilies().Seconds(method).Observe(absl::ToDoubleSeconds(elapsed));
  AllFamilies().sent.Increment(static_cast<double>(bytes_sent));
  AllFamilies().received.Increment(static_cast<double>(bytes_received));
}

}  // namespace walsh::objects
