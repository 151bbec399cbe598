// walsh chat: talks with a model; on a terminal turn by turn, else one message and its answer.
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddChatCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
