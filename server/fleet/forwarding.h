// How long a forwarded call may take.
#pragma once

#include <algorithm>
#include <chrono>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/limits.h"

namespace walsh::fleet {

inline constexpr absl::Duration kGenerateTimeoutDefault =
    absl::Seconds(limits::kGenerateSecondsDefault);
inline constexpr absl::Duration kGenerateTimeoutMax = absl::Seconds(limits::kGenerateSecondsMax);
inline constexpr absl::Duration kEvaluateTimeout = absl::Seconds(limits::kEvaluateSecondsMax);
inline constexpr absl::Duration kUnaryTimeoutDefault = absl::Seconds(10);
inline constexpr absl::Duration kLoadTimeoutDefault = absl::Minutes(10);
// Of an export or an import: everything that a model has is read, converted and written.
inline constexpr absl::Duration kConversionTimeoutDefault = kGenerateTimeoutMax;
inline constexpr absl::Duration kValidateTimeout = absl::Seconds(10);  // of one worker

// Whether a client named one; gRPC has the last moment for those that did not.
inline bool HasDeadline(std::chrono::system_clock::time_point deadline) {
  return deadline != std::chrono::system_clock::time_point::max();
}

// The worker's share of a client's deadline: 5 % less, so that its answer still arrives in time. A
// client without a deadline gets `timeout_default`; nobody gets more than `timeout_max`.
inline absl::Duration WorkerTimeout(std::chrono::system_clock::time_point deadline,
                                    absl::Duration timeout_default,
                                    absl::Duration timeout_max = kGenerateTimeoutMax) {
  if (!HasDeadline(deadline)) return timeout_default;
  const absl::Duration left = absl::FromChrono(deadline) - absl::Now();
  return std::min(left, timeout_max) * 0.95;
}

}  // namespace walsh::fleet
