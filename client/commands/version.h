// walsh version
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddVersionCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
