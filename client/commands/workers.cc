#include "client/commands/workers.h"

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/resource_name.h"
#include "client/terminal/json_text.h"
#include "client/terminal/quantities.h"
#include "client/terminal/table.h"
#include "common/command_line.h"

namespace walsh::client {
namespace {

std::string WorkerTable(const v1::ListWorkersResponse& response) {
  Table table({{"WORKER"},
               {"STATE"},
               {"DEVICE"},
               {"FREE MEMORY", Align::kRight},
               {"RUNNING", Align::kRight},
               {"WAITING", Align::kRight},
               {"JOB"},
               {"MODELS"},
               {"VERSION"}});
  for (const auto& worker : response.workers()) {
    std::vector<std::string> models;
    for (const auto& model : worker.models()) models.push_back(ResourceId(model));
    table.AddRow({ResourceId(worker.name()), v1::Worker::State_Name(worker.state()),
                  worker.device(), BytesText(worker.memory_bytes_free()),
                  absl::StrCat(worker.requests_running()), absl::StrCat(worker.requests_waiting()),
                  ResourceId(worker.running_job()), absl::StrJoin(models, " "), worker.version()});
  }
  return table.Text();
}

int RunList(const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto response = client.ListWorkers();
  if (!response.ok()) return Fail(response.status());
  if (global.json()) {
    PrintOut(JsonText(*response));
  } else if (response->workers().empty()) {
    std::fputs("no workers\n", stderr);
  } else {
    PrintOut(WorkerTable(*response));
  }
  return kExitOk;
}

}  // namespace

void AddWorkersCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  CLI::App& workers = *app.add_subcommand("workers", "Workers of the service");
  workers.require_subcommand(1);
  workers.add_subcommand("list", "List workers, their load and their models")
      ->callback([&global, &chosen] { chosen = [&global] { return RunList(global); }; });
}

}  // namespace walsh::client
