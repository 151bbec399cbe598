// Command lines of all binaries: CLI11 plus an environment twin for each flag and a config file.
//
// A flag --max-num-seqs takes its value from the command line, else from WALSH_MAX_NUM_SEQS, else
// from the line `max-num-seqs = 8` of the file named by --config or WALSH_CONFIG, else its default.
// A key that is of another binary (common/config_keys.h) is left to that one; any other unknown key
// is an error that names it.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>

namespace walsh {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;

// Parses; the app's variables are set afterwards. An exit code when the process should end now: 0
// after --help or --version, 2 after a usage error (already printed to stderr).
std::optional<int> ParseCommandLine(CLI::App& app, int argc, const char* const* argv);

}  // namespace walsh
