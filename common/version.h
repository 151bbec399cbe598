// What this build is.
#pragma once

#include <string_view>

namespace walsh {

std::string_view Version();   // "0.1.0"
std::string_view Revision();  // git commit, or "unknown"
bool HasCuda();

}  // namespace walsh
