// What each tenant has running of requests, and that it is not too much.
//
// The coordinator has no tokenizer. What it knows of a request's tokens is the size of its prompt
// in bytes, each token of which has one at least, and how many new ones it may ask for.
//
// Threads: safe; the limits hold exactly, however many begin at once.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "server/access/access_control.h"

namespace walsh::access {

struct RequestSize {
  int64_t prompt_bytes = 0;
  int64_t new_tokens = 0;  // at most
};

class RunningRequests {
 public:
  // RESOURCE_EXHAUSTED (TENANT_LIMIT; RetryInfo, where it would fit alone) beyond one of the
  // caller's limits. Each one that began must end, with the same size.
  absl::Status Begin(const Caller& caller, const RequestSize& size);
  void End(const Caller& caller, const RequestSize& size);

 private:
  struct Running {
    int64_t requests = 0;
    RequestSize size;  // of all
  };

  absl::Mutex mu_;
  std::map<std::string, Running> running_ ABSL_GUARDED_BY(mu_);  // by tenant; none is empty
};

}  // namespace walsh::access
