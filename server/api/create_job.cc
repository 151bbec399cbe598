#include "server/api/create_job.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/api/stored_bytes.h"
#include "server/fleet/forwarding.h"
#include "server/jobs/job_validation.h"
#include "server/jobs/refusals.h"

namespace walsh::api {
namespace {

using walsh::internal::v1::ValidateJobRequest;
using walsh::internal::v1::ValidateJobResponse;

// Workers that are asked about one job: of a large fleet, most are alike.
constexpr size_t kAskedMax = 8;
constexpr absl::Duration kUndecidedRetry = absl::Seconds(5);

struct Creation {
  Core* core;
  Call call;
  access::Caller caller;
  const v1::CreateQuantizationJobRequest* request;
  v1::QuantizationJob* response;
  v1::QuantizationJob job;  // validated
  jobs::RequestKey key;
  std::vector<fleet::WorkerAddress> workers;  // asked one after the other
  absl::Duration ask_until;                   // monotonic
  size_t n_asked = 0;                         // the first of them
  jobs::Refusals refusals;                    // of those that were asked
};

absl::Status Store(const Creation& creation) {
  WALSH_ASSIGN_OR_RETURN(*creation.response,
                         creation.core->queue->Submit(
                             creation.job, creation.request->quantization_job_id(), creation.key,
                             {.tenant = creation.caller.tenant.value_or(""),
                              .live_jobs_max = creation.caller.limits.live_jobs}));
  return absl::OkStatus();
}

// What an earlier or a parallel form of this request led to, else `refused`: the names that this
// one found taken may be those of its twin, stored a moment ago.
absl::Status EarlierResultOr(const Creation& creation, const absl::Status& refused) {
  if (creation.request->validate_only()) return refused;
  WALSH_ASSIGN_OR_RETURN(std::optional<v1::QuantizationJob> before,
                         creation.core->queue->FindSubmitted(creation.key));
  if (!before.has_value()) return refused;
  *creation.response = *std::move(before);
  return absl::OkStatus();
}

void SetSupply(int64_t needed, int64_t total, int64_t free,
               v1::QuantizationJob::Preflight::Supply* supply) {
  supply->set_bytes_needed(needed);
  supply->set_bytes_total(total);
  supply->set_bytes_free(free);
}

// The validated job with what `worker` found.
void Describe(const Creation& creation, const std::string& worker,
              const ValidateJobResponse& validated) {
  *creation.response = creation.job;
  v1::QuantizationConfig* config = creation.response->mutable_config();
  if (config->group_size() == 0) config->set_group_size(validated.group_size());
  if (config->rotation().block_size() == 0) {
    config->mutable_rotation()->set_block_size(validated.rotation_block_size());
  }
  if (config->rotation().online_block_size() == 0) {
    config->mutable_rotation()->set_online_block_size(validated.online_block_size());
  }
  v1::QuantizationJob::Preflight* preflight = creation.response->mutable_preflight();
  preflight->set_worker(worker);
  preflight->set_device(validated.device());
  SetSupply(validated.memory_bytes_needed(), validated.memory_bytes_total(),
            validated.memory_bytes_free(), preflight->mutable_memory());
  if (validated.device_memory_bytes_needed() > 0) {
    SetSupply(validated.device_memory_bytes_needed(), validated.device_memory_bytes_total(),
              validated.device_memory_bytes_free(), preflight->mutable_device_memory());
  }
  SetSupply(validated.disk_bytes_needed(), 0, validated.disk_bytes_free(),
            preflight->mutable_disk());
  *preflight->mutable_warnings() = validated.warnings();
}

// `validated` is the last word: no other worker is asked.
absl::Status Conclude(const Creation& creation, const std::string& worker,
                      const absl::StatusOr<ValidateJobResponse>& validated) {
  if (!validated.ok()) return EarlierResultOr(creation, validated.status());
  if (!creation.request->validate_only()) return Store(creation);
  Describe(creation, worker, *validated);
  return absl::OkStatus();
}

// Of a job that some worker might run, and none has said so.
absl::Status Undecided(const Creation& creation) {
  if (creation.refusals.empty()) return fleet::NoWorker();
  absl::Status status = absl::UnavailableError(
      absl::StrCat(creation.refusals.size(), " of ", creation.workers.size(),
                   " workers cannot run the job, the others were not asked or gave no answer: ",
                   jobs::Summary(creation.refusals)));
  SetErrorInfo(status, "NO_WORKER");
  SetRetryDelay(status, kUndecidedRetry);
  return status;
}

// No worker is asked any more, and none had the last word.
absl::Status ConcludeWithoutVerdict(const Creation& creation) {
  const jobs::Refusals& refusals = creation.refusals;
  if (refusals.size() == creation.workers.size()) {
    return EarlierResultOr(
        creation, refusals.size() == 1 ? refusals.begin()->second : jobs::RefusedByAll(refusals));
  }
  if (creation.request->validate_only()) return Undecided(creation);
  WALSH_LOG(Warning, "job is queued unchecked", {"request_id", creation.call.request_id()},
            {"workers", uint64_t{creation.workers.size()}}, {"asked", uint64_t{creation.n_asked}},
            {"refused", uint64_t{refusals.size()}});
  return Store(creation);
}

void AskNextWorker(const std::shared_ptr<Creation>& creation);

void OnAnswer(const std::shared_ptr<Creation>& creation, const std::string& worker,
              const absl::StatusOr<ValidateJobResponse>& validated) {
  const bool is_refusal = jobs::IsRefusal(validated.status());
  if (!is_refusal && !fleet::GaveNoAnswer(validated.status())) {
    return creation->call.Finish(Conclude(*creation, worker, validated));
  }
  if (is_refusal) creation->refusals[worker] = validated.status();
  AskNextWorker(creation);
}

void AskNextWorker(const std::shared_ptr<Creation>& creation) {
  const absl::Duration left = creation->ask_until - creation->core->clock->Monotonic();
  if (creation->n_asked == std::min(creation->workers.size(), kAskedMax) ||
      left <= absl::ZeroDuration()) {
    return creation->call.Finish(ConcludeWithoutVerdict(*creation));
  }
  const fleet::WorkerAddress& address = creation->workers[creation->n_asked++];
  ValidateJobRequest validate;
  *validate.mutable_job() = creation->job;
  creation->core->clients->Get(address)->ValidateJob(
      validate, std::min(left, fleet::kValidateTimeout), creation->call.cancellation(),
      [creation, worker = WorkerName(address.worker_id)](
          const absl::StatusOr<ValidateJobResponse>& validated) {
        // Off gRPC's thread: the store may wait for the disk.
        creation->call.RunAsync(creation->core->executor, [creation, worker, validated] {
          OnAnswer(creation, worker, validated);
        });
      });
}

// False: the answer is in the response; a worker need not be asked.
absl::StatusOr<bool> CheckHere(Creation* creation) {
  WALSH_ASSIGN_OR_RETURN(creation->job, jobs::ValidateNewJob(*creation->request));
  creation->key = {.request_id = creation->request->request_id(),
                   .body_sha256 = jobs::BodySha256(*creation->request),
                   .tenant = creation->caller.tenant.value_or("")};
  // The names first: a twin that is stored in between is found then.
  absl::Status free = creation->core->queue->CheckNamesAreFree(
      creation->request->quantization_job_id(), creation->job.model_name());
  if (creation->request->validate_only()) {
    if (!free.ok()) return free;
    return true;
  }
  WALSH_ASSIGN_OR_RETURN(std::optional<v1::QuantizationJob> before,
                         creation->core->queue->FindSubmitted(creation->key));
  if (before.has_value()) {
    *creation->response = *std::move(before);
    return false;
  }
  if (!free.ok()) return free;
  WALSH_RETURN_IF_ERROR(CheckStoredBytes(*creation->core, creation->caller));
  return true;
}

}  // namespace

void CreateJob(Core* core, const Call& call, const access::Caller& caller, absl::Duration ask_max,
               const v1::CreateQuantizationJobRequest* request, v1::QuantizationJob* response) {
  const auto creation =
      std::make_shared<Creation>(Creation{.core = core,
                                          .call = call,
                                          .caller = caller,
                                          .request = request,
                                          .response = response,
                                          .job = {},
                                          .key = {},
                                          .workers = {},
                                          .ask_until = core->clock->Monotonic() + ask_max,
                                          .refusals = {}});
  const absl::StatusOr<bool> must_go_on = CheckHere(creation.get());
  if (!must_go_on.ok() || !*must_go_on) return call.Finish(must_go_on.status());
  creation->workers = core->registry->Online();
  if (creation->workers.empty()) {
    return call.Finish(request->validate_only() ? fleet::NoWorker() : Store(*creation));
  }
  AskNextWorker(creation);
}

}  // namespace walsh::api
