// walsh workers list
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddWorkersCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
