// The keys of config files, of all binaries together: their flags without the dashes.
//
// One file serves the client, both daemons and `walsh up`, which starts them; each takes what is
// its own. So a binary must tell the key of another one from a slip of the pen.
#pragma once

#include <span>
#include <string_view>

namespace walsh {

std::span<const std::string_view> ConfigKeys();  // sorted
bool IsConfigKey(std::string_view key);

}  // namespace walsh
