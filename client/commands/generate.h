// walsh generate: continues a prompt.
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddGenerateCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
