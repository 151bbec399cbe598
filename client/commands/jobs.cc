#include "client/commands/jobs.h"

#include <cstdio>

#include "client/commands/follow_job.h"
#include "client/resource_name.h"
#include "client/terminal/html_report.h"
#include "client/terminal/job_report.h"
#include "client/terminal/json_text.h"
#include "common/command_line.h"
#include "common/publish.h"

namespace walsh::client {
namespace {

struct JobsFlags {
  std::string id;
  std::string filter;
  int limit = 50;
  int64_t after_sequence = 0;
  std::string report_path;
};

int RunList(const JobsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto response = client.ListJobs(flags.filter, "create_time desc", flags.limit);
  if (!response.ok()) return Fail(response.status());
  if (global.json()) {
    PrintOut(JsonText(*response));
  } else if (response->quantization_jobs().empty()) {
    std::fputs("no jobs\n", stderr);
  } else {
    PrintOut(
        JobTable({response->quantization_jobs().begin(), response->quantization_jobs().end()}));
    if (!response->next_page_token().empty()) {
      std::fprintf(stderr, "there are more; see --limit\n");
    }
  }
  return kExitOk;
}

int PrintJob(const absl::StatusOr<v1::QuantizationJob>& job, const GlobalFlags& global) {
  if (!job.ok()) return Fail(job.status());
  PrintOut(global.json() ? JsonText(*job) : JobReport(*job));
  return kExitOk;
}

int RunGet(const JobsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  return PrintJob(client.GetJob(flags.id), global);
}

int RunWatch(const JobsFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  return FollowJob(client, interrupts, cancellation,
                   {.name = flags.id,
                    .walsh = WalshCommand(global),
                    .after_sequence = flags.after_sequence,
                    .json_events = global.json()});
}

int RunReport(const JobsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto job = client.GetJob(flags.id);
  if (!job.ok()) return Fail(job.status());
  const std::string html = HtmlReport(*job);
  if (flags.report_path.empty()) {
    PrintOut(html);
    return kExitOk;
  }
  if (const absl::Status written = PublishFile(flags.report_path, html); !written.ok()) {
    return Fail(written);
  }
  std::fprintf(stderr, "wrote %s\n", flags.report_path.c_str());
  return kExitOk;
}

int RunCancel(const JobsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto job = client.CancelJob(flags.id);
  if (!job.ok()) return Fail(job.status());
  PrintOut(global.json() ? JsonText(*job)
                         : ResourceId(job->name()) + ": " +
                               v1::QuantizationJob::State_Name(job->state()) + "\n");
  return kExitOk;
}

int RunDelete(const JobsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const absl::Status status = client.DeleteJob(flags.id);
  return status.ok() ? kExitOk : Fail(status);
}

}  // namespace

void AddJobsCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<JobsFlags>();
  CLI::App& jobs = *app.add_subcommand("jobs", "Quantization jobs");
  jobs.require_subcommand(1);
  const auto add = [&](const char* name, const char* help,
                       int (*run)(const JobsFlags&, const GlobalFlags&)) -> CLI::App& {
    CLI::App& command = *jobs.add_subcommand(name, help);
    command.callback([flags, run, &global, &chosen] {
      chosen = [flags, run, &global] { return run(*flags, global); };
    });
    return command;
  };
  CLI::App& list = add("list", "List jobs, newest first", RunList);
  list.add_option("--filter", flags->filter, "For example: state=RUNNING AND model_name=demo");
  list.add_option("--limit", flags->limit, "At most so many jobs")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  add("get", "Show a job", RunGet).add_option("ID", flags->id)->required();
  CLI::App& watch = add("watch", "Follow a job to its end", RunWatch);
  watch.add_option("ID", flags->id)->required();
  watch.add_option("--after-sequence", flags->after_sequence, "Only events after this one");
  CLI::App& report = add("report", "Write a job's report as one HTML page with plots", RunReport);
  report.add_option("ID", flags->id)->required();
  // Not --output, which says for all commands how answers are printed.
  report.add_option("--file,-f", flags->report_path, "File of the page; standard output without");
  add("cancel", "Cancel a job", RunCancel).add_option("ID", flags->id)->required();
  add("delete", "Forget a finished job; its model stays", RunDelete)
      .add_option("ID", flags->id)
      ->required();
}

}  // namespace walsh::client
