#include "server/api/create_job.h"

#include <optional>
#include <utility>

#include "common/grpc_status.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "server/fleet/forwarding.h"
#include "server/jobs/job_validation.h"

namespace walsh::api {
namespace {

using walsh::internal::v1::ValidateJobRequest;
using walsh::internal::v1::ValidateJobResponse;

struct Creation {
  Core* core;
  Call call;
  const v1::CreateQuantizationJobRequest* request;
  v1::QuantizationJob* response;
  v1::QuantizationJob job;  // validated
  jobs::RequestKey key;
};

absl::Status Store(const Creation& creation) {
  WALSH_ASSIGN_OR_RETURN(*creation.response,
                         creation.core->queue->Submit(
                             creation.job, creation.request->quantization_job_id(), creation.key));
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

// True: the worker's answer says nothing about the job.
bool GaveNoAnswer(const absl::Status& status) {
  return absl::IsDeadlineExceeded(status) || ErrorReason(status) == "WORKER_LOST";
}

absl::Status OnValidated(const Creation& creation,
                         const absl::StatusOr<ValidateJobResponse>& validated) {
  const bool is_unchecked = GaveNoAnswer(validated.status());
  if (!validated.ok() && !is_unchecked) return EarlierResultOr(creation, validated.status());
  if (!creation.request->validate_only()) {
    if (is_unchecked) {
      WALSH_LOG(Warning, "job is queued unchecked", {"request_id", creation.call.request_id()},
                {"status", validated.status()});
    }
    return Store(creation);
  }
  if (is_unchecked) return fleet::NoWorker();
  *creation.response = creation.job;
  v1::QuantizationConfig* config = creation.response->mutable_config();
  if (config->group_size() == 0) config->set_group_size(validated->group_size());
  if (config->rotation().block_size() == 0) {
    config->mutable_rotation()->set_block_size(validated->rotation_block_size());
  }
  return absl::OkStatus();
}

// False: the answer is in the response; a worker need not be asked.
absl::StatusOr<bool> CheckHere(Creation* creation) {
  WALSH_ASSIGN_OR_RETURN(creation->job, jobs::ValidateNewJob(*creation->request));
  creation->key = {.request_id = creation->request->request_id(),
                   .body_sha256 = jobs::BodySha256(*creation->request)};
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
  return true;
}

}  // namespace

void CreateJob(Core* core, const Call& call, const v1::CreateQuantizationJobRequest* request,
               v1::QuantizationJob* response) {
  Creation creation = {core, call, request, response, {}, {}};
  const absl::StatusOr<bool> must_go_on = CheckHere(&creation);
  if (!must_go_on.ok() || !*must_go_on) return call.Finish(must_go_on.status());
  const std::optional<fleet::WorkerAddress> worker = core->registry->AnyOnline();
  if (!worker.has_value()) {
    return call.Finish(request->validate_only() ? fleet::NoWorker() : Store(creation));
  }
  ValidateJobRequest validate;
  *validate.mutable_job() = creation.job;
  core->clients->Get(*worker)->ValidateJob(
      validate, fleet::kValidateTimeout, call.cancellation(),
      [creation](absl::StatusOr<ValidateJobResponse> validated) {
        // Off gRPC's thread: the store may wait for the disk.
        creation.call.Run(creation.core->executor,
                          [creation, validated] { return OnValidated(creation, validated); });
      });
}

}  // namespace walsh::api
