// What jobs and requests are to each other on one worker, as --serve-while-quantizing of
// walsh-worker and of `walsh up` says it.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

enum class ServeWhileQuantizing {
  // Never both: no job is asked for while a model is loaded, no model is loaded while a job runs.
  kExclusive,
  // Both at once; a job gives requests most of the time.
  kShare,
  // A job stands still while there are requests.
  kPreempt,
};

// "exclusive", "share" or "preempt". INVALID_ARGUMENT names the text and these.
absl::StatusOr<ServeWhileQuantizing> ParseServeWhileQuantizing(std::string_view text);

}  // namespace walsh
