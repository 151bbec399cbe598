#include "client/commands/models.h"

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/resource_name.h"
#include "client/terminal/interrupts.h"
#include "client/terminal/json_text.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/table.h"
#include "common/command_line.h"

namespace walsh::client {
namespace {

struct ModelsFlags {
  std::string name;
  bool force = false;
};

std::string PerplexityText(double perplexity) {
  return perplexity > 0 ? SignificantText(perplexity, 5) : "";
}

std::string GroupText(int group_size) {
  return group_size < 0 ? "channel" : absl::StrCat(group_size);
}

std::string ModelTable(const v1::ListModelsResponse& response) {
  Table table({{"MODEL"},
               {"STATE"},
               {"BITS", Align::kRight},
               {"GROUP", Align::kRight},
               {"ROTATION"},
               {"METHOD"},
               {"SIZE", Align::kRight},
               {"PERPLEXITY", Align::kRight},
               {"BEFORE", Align::kRight},
               {"WORKER"}});
  for (const auto& model : response.models()) {
    table.AddRow({ResourceId(model.name()), v1::Model::State_Name(model.state()),
                  absl::StrCat(model.bits()), GroupText(model.group_size()), model.rotation(),
                  model.method(), BytesText(model.size_bytes()),
                  PerplexityText(model.perplexity_after()),
                  PerplexityText(model.perplexity_before()), ResourceId(model.worker())});
  }
  return table.Text();
}

std::string ModelPage(const v1::Model& model) {
  std::string text = absl::StrCat("model ", ResourceId(model.name()), ": ",
                                  v1::Model::State_Name(model.state()), "\n");
  const auto fact = [&text](const char* label, const std::string& value) {
    if (!value.empty()) absl::StrAppendFormat(&text, "  %-14s %s\n", label, value);
  };
  fact("architecture", model.architecture());
  fact("bits", absl::StrCat(model.bits(), ", group ", GroupText(model.group_size()), ", ",
                            model.method(), ", rotation ", model.rotation()));
  fact("size",
       absl::StrCat(
           BytesText(model.size_bytes()),
           model.memory_bytes() > 0 ? ", in memory " + BytesText(model.memory_bytes()) : ""));
  fact("context", absl::StrCat(CountText(model.max_model_len()), " tokens"));
  if (model.perplexity_after() > 0) {
    fact("perplexity", absl::StrCat(PerplexityText(model.perplexity_before()), " before, ",
                                    PerplexityText(model.perplexity_after()), " after"));
  }
  fact("made by", ResourceId(model.quantization_job()));
  fact("created", TimeText(model.create_time()));
  fact("worker", ResourceId(model.worker()));
  fact("sha256", model.sha256());
  if (model.error().code() != 0) fact("last load", model.error().message());
  return SafeText(text);
}

int PrintModel(const absl::StatusOr<v1::Model>& model, const GlobalFlags& global) {
  if (!model.ok()) return Fail(model.status());
  PrintOut(global.json() ? JsonText(*model) : ModelPage(*model));
  return kExitOk;
}

int RunList(const ModelsFlags& /*flags*/, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto response = client.ListModels();
  if (!response.ok()) return Fail(response.status());
  if (global.json()) {
    PrintOut(JsonText(*response));
  } else if (response->models().empty()) {
    std::fputs("no models; make one with `walsh quantize`\n", stderr);
  } else {
    PrintOut(ModelTable(*response));
  }
  return kExitOk;
}

int RunGet(const ModelsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  return PrintModel(client.GetModel(flags.name), global);
}

// Moves a model while Ctrl-C can end the wait for it.
absl::StatusOr<v1::Model> Move(const ModelsFlags& flags, const GlobalFlags& global,
                               absl::StatusOr<v1::Model> (Client::*move)(const std::string&,
                                                                         Cancellation*)) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  absl::StatusOr<v1::Model> model = (client.*move)(flags.name, &cancellation);
  if (absl::IsCancelled(model.status())) {
    return absl::CancelledError(absl::StrCat("interrupted; the worker ends what it has begun, `",
                                             WalshCommand(global), " models get ",
                                             ResourceId(flags.name), "` tells"));
  }
  return model;
}

int RunLoad(const ModelsFlags& flags, const GlobalFlags& global) {
  return PrintModel(Move(flags, global, &Client::LoadModel), global);
}

int RunUnload(const ModelsFlags& flags, const GlobalFlags& global) {
  return PrintModel(Move(flags, global, &Client::UnloadModel), global);
}

int RunDelete(const ModelsFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  const absl::Status status = client.DeleteModel(flags.name, flags.force, &cancellation);
  return status.ok() ? kExitOk : Fail(status);
}

}  // namespace

void AddModelsCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<ModelsFlags>();
  CLI::App& models = *app.add_subcommand("models", "Published models");
  models.require_subcommand(1);
  const auto add = [&](const char* name, const char* help,
                       int (*run)(const ModelsFlags&, const GlobalFlags&)) -> CLI::App& {
    CLI::App& command = *models.add_subcommand(name, help);
    command.callback([flags, run, &global, &chosen] {
      chosen = [flags, run, &global] { return run(*flags, global); };
    });
    return command;
  };
  add("list", "List models", RunList);
  add("get", "Show a model", RunGet).add_option("NAME", flags->name)->required();
  add("load", "Load a model, so that it serves", RunLoad)
      .add_option("NAME", flags->name)
      ->required();
  add("unload", "Unload a model; running requests have the worker's --shutdown-timeout to finish",
      RunUnload)
      .add_option("NAME", flags->name)
      ->required();
  CLI::App& remove = add("delete", "Delete a model's files", RunDelete);
  remove.add_option("NAME", flags->name)->required();
  remove.add_flag("--force", flags->force, "Unload it first");
}

}  // namespace walsh::client
