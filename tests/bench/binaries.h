// Where the daemons of this build are.
#pragma once

#include <filesystem>
#include <string>

#include "client/child_process.h"

namespace walsh::bench {

// The folder of walsh-worker and walsh-coordinator: this program's, or build/*/bin beside it.
inline std::string BinDir() {
  const std::filesystem::path sibling = client::SiblingBinary("walsh-worker");
  const std::filesystem::path here = sibling.parent_path();
  return std::filesystem::exists(sibling) ? here : here.parent_path() / "bin";
}

}  // namespace walsh::bench
