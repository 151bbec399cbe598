#include "server/jobs/job_query.h"

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/jobs/page_token.h"

namespace walsh::jobs {
namespace {

std::string Fingerprint(const JobQuery& query) {
  return absl::StrCat(query.newest_first ? "desc" : "asc", "|",
                      query.state.has_value() ? static_cast<int>(*query.state) : -1, "|",
                      query.model_name.value_or(""), "|", query.tenant.value_or(""));
}

// Takes the surrounding quotes off, as in state="RUNNING".
std::string Unquote(std::string value) {
  if (value.size() >= 2 && value.front() == '"' && value.back() == '"') {
    return value.substr(1, value.size() - 2);
  }
  return value;
}

absl::Status ParseTerm(const std::string& term, JobQuery* query) {
  std::pair<std::string, std::string> parts = absl::StrSplit(term, absl::MaxSplits('=', 1));
  absl::StripAsciiWhitespace(&parts.first);
  absl::StripAsciiWhitespace(&parts.second);
  const std::string value = Unquote(parts.second);
  if (parts.first == "state" && !query->state.has_value()) {
    QuantizationJob::State state;
    if (!QuantizationJob::State_Parse(value, &state)) {
      return InvalidField("filter", absl::StrCat("'", value, "' is not a state"));
    }
    query->state = state;
    return absl::OkStatus();
  }
  if (parts.first == "model_name" && !query->model_name.has_value()) {
    if (!IsModelId(value)) {
      return InvalidField("filter", absl::StrCat("'", value, "' is not a model name"));
    }
    query->model_name = value;
    return absl::OkStatus();
  }
  return InvalidField("filter", absl::StrCat("'", term,
                                             "' is not state=… or model_name=…, each at most once, "
                                             "joined by AND"));
}

absl::Status ParseFilter(const std::string& filter, JobQuery* query) {
  if (filter.size() > limits::kDisplayNameBytesMax) {
    return InvalidField("filter", absl::StrCat("has ", filter.size(), " bytes, at most ",
                                               limits::kDisplayNameBytesMax, " are taken"));
  }
  if (absl::StripAsciiWhitespace(filter).empty()) return absl::OkStatus();
  for (const std::string& term :
       std::vector<std::string>(absl::StrSplit(filter, absl::ByString(" AND ")))) {
    WALSH_RETURN_IF_ERROR(ParseTerm(term, query));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<JobQuery> ParseQuery(const v1::ListQuantizationJobsRequest& request,
                                    TenantView tenant) {
  JobQuery query;
  query.tenant = std::move(tenant);
  WALSH_ASSIGN_OR_RETURN(query.page_size, PageSize(request.page_size()));
  WALSH_RETURN_IF_ERROR(ParseFilter(request.filter(), &query));
  if (request.order_by() == "create_time" || request.order_by() == "create_time asc") {
    query.newest_first = false;
  } else if (!request.order_by().empty() && request.order_by() != "create_time desc") {
    return InvalidField("order_by", "must be 'create_time' or 'create_time desc'");
  }
  if (!request.page_token().empty()) {
    WALSH_ASSIGN_OR_RETURN(const std::string position,
                           ReadPageToken(Fingerprint(query), request.page_token()));
    int64_t ordinal = 0;
    if (!absl::SimpleAtoi(position, &ordinal)) return InvalidField("page_token", "is damaged");
    query.after = ordinal;
  }
  return query;
}

std::string PageToken(const JobQuery& query, int64_t ordinal) {
  return MakePageToken(Fingerprint(query), absl::StrCat(ordinal));
}

}  // namespace walsh::jobs
