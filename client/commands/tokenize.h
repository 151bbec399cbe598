// walsh tokenize, walsh detokenize
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddTokenizeCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);
void AddDetokenizeCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
