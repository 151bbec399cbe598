// The faults that a simulation injects, and where they struck.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "walsh/v1/quantization.pb.h"

namespace walsh::sim {

enum class Fault {
  kRequestLost,
  kAnswerLost,
  kMessageTwice,
  kMessageLate,
  kPartition,
  kOneWayPartition,
  kCoordinatorKilled,
  kKilledBeforeWrite,
  kKilledAfterWrite,
  kDiskFull,
  kWriteErrorLost,
  kWriteErrorStored,
  kReadError,
  kSlowWrite,
  kWorkerKilled,
  kWorkerPaused,
  kPausedInRename,
  kWorkerDrained,
  kWallTimeJump,
  kJobKillsWorker,
  kFailureThatMayPass,
  kFailureForEver,
  kRefusal,
  kSubmittedAgain,
  kCancel,
  kDelete,
};
inline constexpr size_t kFaults = static_cast<size_t>(Fault::kDelete) + 1;

// Where a job is when a fault strikes it.
enum class Phase {
  kNoJob,
  kQueued,
  kRunning,
  kPublishing,
  kCancelling,
  kSucceeded,
  kFailed,
  kCancelled
};
inline constexpr size_t kPhases = static_cast<size_t>(Phase::kCancelled) + 1;

Phase PhaseOf(v1::QuantizationJob::State state, v1::QuantizationJob::Stage stage);
std::string_view FaultName(Fault fault);

class FaultCounts {
 public:
  void Count(Fault fault, Phase phase) { ++counts_[size_t(fault)][size_t(phase)]; }
  int64_t of(Fault fault, Phase phase) const { return counts_[size_t(fault)][size_t(phase)]; }
  int64_t total(Fault fault) const;
  void Add(const FaultCounts& other);
  // A Markdown table: a row for each fault, a column for each phase.
  std::string Table() const;

 private:
  std::array<std::array<int64_t, kPhases>, kFaults> counts_ = {};
};

}  // namespace walsh::sim
