#include "client/commands/generate.h"

#include <cstdio>

#include "client/commands/print_stream.h"
#include "client/commands/sampling_flags.h"
#include "client/resource_name.h"
#include "client/terminal/json_text.h"
#include "common/command_line.h"

namespace walsh::client {
namespace {

struct GenerateFlags {
  std::string model;
  std::string prompt = "-";
  SamplingFlags sampling;
  bool raw = false;
  bool stats = false;
};

int RunGenerate(const GenerateFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  v1::GenerateRequest request;
  request.set_model(ResourceId(flags.model));
  const auto prompt = TextOrStdin(flags.prompt, "prompt");
  if (!prompt.ok()) return Fail(prompt.status());
  request.set_prompt(*prompt);
  request.set_skip_bos(flags.raw);
  const auto sampling = MakeSampling(flags.sampling);
  if (!sampling.ok()) return Fail(sampling.status());
  *request.mutable_sampling() = *sampling;
  if (global.json()) {
    Cancellation cancellation;
    const Interrupts::Cancels cancels(interrupts, cancellation);
    const auto response = client.Generate(request, &cancellation);
    if (!response.ok()) return Fail(response.status());
    PrintOut(JsonText(*response));
    return kExitOk;
  }
  const StreamOutcome outcome =
      PrintStream(interrupts, flags.stats, [&](const auto& on_event, Cancellation* cancellation) {
        return client.GenerateStream(request, on_event, cancellation);
      });
  return outcome.status.ok() ? kExitOk : Fail(outcome.status);
}

}  // namespace

void AddGenerateCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App& command = *app.add_subcommand("generate", "Continue a prompt");
  command.add_option("NAME", flags->model, "A loaded model")->required();
  command.add_option("PROMPT", flags->prompt, "The prompt; - or nothing reads standard input");
  AddSamplingFlags(command, flags->sampling);
  command.add_flag("--raw", flags->raw, "The prompt as it is, without a BOS token");
  command.add_flag("--stats", flags->stats, "Print tokens per second to standard error");
  command.callback([flags, &global, &chosen] {
    chosen = [flags, &global] { return RunGenerate(*flags, global); };
  });
}

}  // namespace walsh::client
