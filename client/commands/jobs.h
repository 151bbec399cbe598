// walsh jobs list|get|watch|cancel|delete
#pragma once

#include "client/commands/command.h"

namespace walsh::client {

void AddJobsCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
