// What ListQuantizationJobs asks: filter, order and page, parsed from the request's strings.
//
// A page token names the last job of the page before it by its ordinal (its place in order of
// creation) and the query that it belongs to, so that jobs created or deleted meanwhile neither
// repeat nor hide others.
//
// Errors: INVALID_ARGUMENT with the field.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/jobs/job.h"

namespace walsh::jobs {

struct JobQuery {
  std::optional<QuantizationJob::State> state = std::nullopt;
  std::optional<std::string> model_name = std::nullopt;
  TenantView tenant = std::nullopt;  // of the caller, not of the request
  bool newest_first = true;
  int page_size = 0;
  // Ordinal of the last job already seen.
  std::optional<int64_t> after = std::nullopt;
};

struct JobPage {
  std::vector<JobRecord> jobs;
  // Of the last job; set when there are more.
  std::optional<int64_t> next;
  int64_t total_size = 0;
};

absl::StatusOr<JobQuery> ParseQuery(const v1::ListQuantizationJobsRequest& request,
                                    TenantView tenant = std::nullopt);
// The token that continues `query` after the job with this ordinal.
std::string PageToken(const JobQuery& query, int64_t ordinal);

}  // namespace walsh::jobs
