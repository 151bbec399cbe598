// walsh up: the whole service on this machine.
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddUpCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
