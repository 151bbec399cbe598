// What a long step asks from time to time, so that it can be cancelled and its caller shows life.
//
// Asked on the thread that called the step, never on its helpers. A status that is not OK ends the
// step and becomes its result.
#pragma once

#include <functional>

#include "absl/status/status.h"

namespace walsh {

using KeepGoing = std::function<absl::Status()>;

// An empty one never stops anything.
inline absl::Status Ask(const KeepGoing& keep_going) {
  return keep_going ? keep_going() : absl::OkStatus();
}

}  // namespace walsh
