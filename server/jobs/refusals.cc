#include "server/jobs/refusals.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "common/grpc_status.h"
#include "server/jobs/job.h"

namespace walsh::jobs {
namespace {

// The message is cut where a long list of names would push the reasons out of it.
constexpr size_t kNamesMax = 4;
// A disk that is full or a device that is broken takes somebody's hand.
constexpr absl::Duration kRetryDelay = absl::Seconds(30);

std::string Names(std::vector<std::string> workers) {
  const size_t n_more = workers.size() - std::min(workers.size(), kNamesMax);
  workers.resize(workers.size() - n_more);
  std::string names = absl::StrJoin(workers, ", ");
  if (n_more > 0) absl::StrAppend(&names, " and ", n_more, " more");
  return names;
}

absl::StatusCode Code(const Refusals& refusals) {
  const absl::StatusCode first = refusals.begin()->second.code();
  const auto is_first = [&](const auto& refusal) { return refusal.second.code() == first; };
  if (std::all_of(refusals.begin(), refusals.end(), is_first)) return first;
  for (const auto& [worker, error] : refusals) {
    if (IsRetried(error.code())) return error.code();
  }
  return absl::StatusCode::kFailedPrecondition;
}

std::string Reason(const Refusals& refusals) {
  const std::string first = ErrorReason(refusals.begin()->second);
  const auto is_first = [&](const auto& refusal) { return ErrorReason(refusal.second) == first; };
  const bool is_common = std::all_of(refusals.begin(), refusals.end(), is_first);
  return is_common && !first.empty() ? first : "NO_SUITABLE_WORKER";
}

}  // namespace

bool IsRefusal(const absl::Status& error) {
  if (absl::IsUnimplemented(error)) return true;
  const std::string reason = ErrorReason(error);
  return reason == "INSUFFICIENT_MEMORY" || reason == "INSUFFICIENT_DISK" ||
         reason == "DEVICE_BROKEN";
}

// "workers/a, workers/b: too little memory; workers/c: …", in the order of the first of each.
std::string Summary(const Refusals& refusals) {
  std::vector<std::pair<std::string, std::vector<std::string>>> by_text;
  for (const auto& [worker, error] : refusals) {
    const std::string text(error.message());
    auto it = std::find_if(by_text.begin(), by_text.end(),
                           [&](const auto& said) { return said.first == text; });
    if (it == by_text.end()) it = by_text.insert(it, {text, {}});
    it->second.push_back(worker);
  }
  return absl::StrJoin(by_text, "; ", [](std::string* out, const auto& said) {
    absl::StrAppend(out, Names(said.second), ": ", said.first);
  });
}

absl::Status RefusedByAll(const Refusals& refusals) {
  absl::Status status(Code(refusals),
                      absl::StrCat("no worker can run the job: ", Summary(refusals)));
  const std::string reason = Reason(refusals);
  SetErrorInfo(status, reason);
  if (IsRetried(status.code())) SetRetryDelay(status, kRetryDelay);
  if (absl::IsFailedPrecondition(status)) {
    SetPreconditionFailure(status, reason, "workers", "none can run the job");
  }
  if (refusals.size() == 1) {
    refusals.begin()->second.ForEachPayload(
        [&](absl::string_view type_url, const absl::Cord& detail) {
          status.SetPayload(type_url, detail);
        });
  }
  return status;
}

}  // namespace walsh::jobs
