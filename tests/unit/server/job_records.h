// Jobs for tests of the store and the queue.
#pragma once

#include <string>

#include "server/jobs/job.h"

namespace walsh::jobs {

inline QuantizationJob SomeJob(const std::string& model_name) {
  QuantizationJob job;
  job.set_source_model("/models/tiny");
  job.set_model_name(model_name);
  return job;
}

// A queued job "quantizationJobs/{id}" that makes model "{id}-model", and its first event.
inline Transition SomeNewJob(const std::string& id, absl::Time now = absl::FromUnixSeconds(1e9)) {
  QuantizationJob job = SomeJob(id + "-model");
  job.set_name("quantizationJobs/" + id);
  Transition created = NewJob(std::move(job), now);
  created.next.last_sequence = 1;
  created.event->set_sequence(1);
  return created;
}

}  // namespace walsh::jobs
