#include "client/commands/follow_job.h"

#include <unistd.h>

#include <cstdio>

#include "client/commands/command.h"
#include "client/resource_name.h"
#include "client/terminal/job_report.h"
#include "client/terminal/json_text.h"
#include "client/terminal/progress.h"
#include "client/terminal/terminal.h"
#include "common/command_line.h"
#include "common/grpc_status.h"

namespace walsh::client {
namespace {

// After Ctrl-C: the job is the service's, so it goes on; say how to come back, and offer to cancel.
int LeaveJob(Client& client, Interrupts& interrupts, const FollowOptions& options) {
  const std::string id = ResourceId(options.name);
  std::fprintf(stderr,
               "\nthe service goes on with job %s\n"
               "  watch it:   %s jobs watch %s\n"
               "  cancel it:  %s jobs cancel %s\n",
               id.c_str(), options.walsh.c_str(), id.c_str(), options.walsh.c_str(), id.c_str());
  if (!IsTerminal(STDIN_FILENO) || !IsTerminal(STDERR_FILENO)) return kExitFailed;
  std::fputs("cancel the job? [y/N] ", stderr);
  std::string answer;
  if (interrupts.ReadLine(&answer) != Interrupts::Read::kLine) {
    std::fputc('\n', stderr);
    return kExitFailed;
  }
  if (answer != "y" && answer != "Y" && answer != "yes") return kExitFailed;
  const auto job = client.CancelJob(options.name);
  if (!job.ok()) return Fail(job.status());
  std::fprintf(stderr, "job %s: %s\n", id.c_str(),
               v1::QuantizationJob::State_Name(job->state()).c_str());
  return kExitFailed;
}

}  // namespace

int FollowJob(Client& client, Interrupts& interrupts, Cancellation& cancellation,
              const FollowOptions& options) {
  absl::StatusOr<v1::QuantizationJob> job;
  {
    ProgressPrinter progress({.out = stderr, .redraw = IsTerminal(STDERR_FILENO)});
    WatchObserver observer;
    observer.on_event = [&](const v1::QuantizationJobEvent& event) {
      if (!options.json_events) return progress.OnEvent(event);
      PrintOut(JsonLine(event));
      std::fflush(stdout);
    };
    observer.on_disconnect = [&](const absl::Status& reason, absl::Duration pause) {
      progress.OnDisconnect(reason, pause);
    };
    job = client.WatchJob(options.name, options.after_sequence, observer, &cancellation);
  }
  if (cancellation.cancelled() && !job.ok()) return LeaveJob(client, interrupts, options);
  if (!job.ok()) return Fail(job.status());
  if (!options.json_events) PrintOut(options.json ? JsonText(*job) : JobReport(*job));
  if (job->state() == v1::QuantizationJob::SUCCEEDED) return kExitOk;
  if (job->state() == v1::QuantizationJob::CANCELLED) {
    return Fail(absl::CancelledError("the job was cancelled"));
  }
  absl::Status error = FromProtoStatus(job->error());
  if (!job->error_reason().empty() && ErrorReason(error).empty()) {
    SetErrorInfo(error, job->error_reason());
  }
  return Fail(error);
}

}  // namespace walsh::client
