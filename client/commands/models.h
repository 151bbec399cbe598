// walsh models list|get|load|unload|alias|unalias|delete|export|import
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddModelsCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
