#include <CLI/CLI.hpp>

#include "client/address.h"
#include "client/commands/bench.h"
#include "client/commands/chat.h"
#include "client/commands/doctor.h"
#include "client/commands/eval.h"
#include "client/commands/generate.h"
#include "client/commands/jobs.h"
#include "client/commands/models.h"
#include "client/commands/quantize.h"
#include "client/commands/tokenize.h"
#include "client/commands/up.h"
#include "client/commands/version.h"
#include "client/commands/workers.h"
#include "client/security.h"
#include "common/command_line.h"
#include "common/endpoints.h"

namespace walsh::client {
namespace {

int Run(int argc, const char* const* argv) {
  CLI::App app("walsh: quantizes language models and serves them", "walsh");
  app.require_subcommand(1);
  // --server and --output may stand after the verb.
  app.fallthrough();
  GlobalFlags global;
  global.data_dir = DefaultDataDir();
  app.add_option("--server", global.server,
                 "Address of the service; default: the one that runs on the data folder, else "
                 "127.0.0.1:50051");
  app.add_option("--data-dir", global.data_dir, "Data folder of the service on this machine")
      ->capture_default_str();
  app.add_option("--output", global.output, "How answers are printed")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  app.add_option("--timeout", global.timeout_seconds, "Seconds that a short call may take")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddSecurityFlags(app, global.security_flags);
  Chosen chosen;
  AddUpCommand(app, global, chosen);
  AddQuantizeCommand(app, global, chosen);
  AddJobsCommand(app, global, chosen);
  AddModelsCommand(app, global, chosen);
  AddGenerateCommand(app, global, chosen);
  AddChatCommand(app, global, chosen);
  AddBenchCommand(app, global, chosen);
  AddEvalCommand(app, global, chosen);
  AddTokenizeCommand(app, global, chosen);
  AddDetokenizeCommand(app, global, chosen);
  AddWorkersCommand(app, global, chosen);
  AddDoctorCommand(app, global, chosen);
  AddVersionCommand(app, global, chosen);
  if (const auto exit_code = ParseCommandLine(app, argc, argv)) return *exit_code;
  auto secured =
      ReadSecurity(global.security_flags, ResolveAddress(global.server, global.data_dir));
  if (!secured.ok()) return Fail(secured.status());
  global.security = *std::move(secured);
  return chosen();
}

}  // namespace
}  // namespace walsh::client

int main(int argc, char** argv) { return walsh::client::Run(argc, argv); }
