#include "tests/sim/fault.h"

#include <numeric>

#include "absl/strings/str_cat.h"

namespace walsh::sim {

using v1::QuantizationJob;

Phase PhaseOf(QuantizationJob::State state, QuantizationJob::Stage stage) {
  switch (state) {
    case QuantizationJob::QUEUED:
      return Phase::kQueued;
    case QuantizationJob::RUNNING:
      return stage == QuantizationJob::PUBLISHING ? Phase::kPublishing : Phase::kRunning;
    case QuantizationJob::CANCELLING:
      return Phase::kCancelling;
    case QuantizationJob::SUCCEEDED:
      return Phase::kSucceeded;
    case QuantizationJob::FAILED:
      return Phase::kFailed;
    case QuantizationJob::CANCELLED:
      return Phase::kCancelled;
    default:
      return Phase::kNoJob;
  }
}

std::string_view FaultName(Fault fault) {
  static constexpr std::array<std::string_view, kFaults> kNames = {
      "request lost",
      "answer lost",
      "message twice",
      "message late",
      "partition",
      "one-way partition",
      "coordinator killed",
      "coordinator killed before a write",
      "coordinator killed after a write",
      "disk full",
      "write failed, nothing stored",
      "write failed, yet stored",
      "read failed",
      "slow write",
      "worker killed",
      "worker paused",
      "worker paused before its rename",
      "worker drained",
      "wall time jumped",
      "job killed its worker",
      "job failed, may pass",
      "job failed for ever",
      "job refused by a worker",
      "submitted again",
      "cancelled",
      "deleted",
  };
  return kNames[size_t(fault)];
}

int64_t FaultCounts::total(Fault fault) const {
  const auto& row = counts_[size_t(fault)];
  return std::accumulate(row.begin(), row.end(), int64_t{0});
}

void FaultCounts::Add(const FaultCounts& other) {
  for (size_t fault = 0; fault < kFaults; ++fault) {
    for (size_t phase = 0; phase < kPhases; ++phase) {
      counts_[fault][phase] += other.counts_[fault][phase];
    }
  }
}

std::string FaultCounts::Table() const {
  std::string table =
      "| fault | no job | QUEUED | RUNNING | PUBLISHING | CANCELLING | SUCCEEDED | FAILED | "
      "CANCELLED |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n";
  for (size_t fault = 0; fault < kFaults; ++fault) {
    absl::StrAppend(&table, "| ", std::string(FaultName(Fault(fault))), " |");
    for (const int64_t count : counts_[fault]) absl::StrAppend(&table, " ", count, " |");
    absl::StrAppend(&table, "\n");
  }
  return table;
}

}  // namespace walsh::sim
