#include "client/commands/version.h"

#include <nlohmann/json.hpp>

#include "common/command_line.h"
#include "common/version.h"

namespace walsh::client {
namespace {

int RunVersion(const GlobalFlags& global) {
  const std::string version(Version());
  const std::string revision(Revision());
  if (global.json()) {
    const nlohmann::json json = {{"version", version}, {"revision", revision}, {"cuda", HasCuda()}};
    PrintOut(json.dump(2) + "\n");
  } else {
    PrintOut("walsh " + version + " (" + revision + (HasCuda() ? ", CUDA" : ", CPU only") + ")\n");
  }
  return kExitOk;
}

}  // namespace

void AddVersionCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  app.add_subcommand("version", "Show what this build is")->callback([&global, &chosen] {
    chosen = [&global] { return RunVersion(global); };
  });
}

}  // namespace walsh::client
