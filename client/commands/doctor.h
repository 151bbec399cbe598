// walsh doctor: what this machine can run, and why not.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "client/commands/command.h"

namespace walsh::client {

// The report as text. `findings` is what --output json prints:
// {"worker": {...} or {"error": text}, "data_dir": {"path", "exists", "writable", "free_bytes",
// "error"},
//  "ports": [{"port", "use", "free"}], "service": {"address", "running", "error"}}
std::string DoctorText(const nlohmann::json& findings);

void AddDoctorCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
