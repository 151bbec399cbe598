// Rows on their way from files to the device: several threads read them, some megabytes at a time,
// while the device works on those before (read_ahead.h).
//
// Errors:  those of `read` and `consume`; RESOURCE_EXHAUSTED; the device's
// Memory:  two pieces on the device and two in pinned memory, PieceBytes each at most
// Threads: used by one thread; `read` runs on several others
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/pinned_pool.h"
#include "worker/kernels/cuda/read_ahead.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::kernels::cuda {

// Threads that read what is stored: pread copies out of the page cache at a few GB/s a thread, the
// device takes fifty.
inline constexpr int kReaders = 8;
// What each of them reads at once.
inline constexpr int64_t kRangeBytes = int64_t{4} << 20;

// Whole rows that are read at once, and bytes of a piece.
inline int64_t RowsOf(int64_t n_bytes, int64_t row_bytes) {
  return std::max<int64_t>(1, n_bytes / row_bytes);
}
inline int64_t PieceBytes(int64_t row_bytes) { return RowsOf(kPieceBytes, row_bytes) * row_bytes; }

struct RowStream {
  int64_t rows = 0;
  int64_t row_bytes = 0;
  // Reads rows [first, first + n) to `to`.
  std::function<absl::Status(int64_t first, int64_t n, std::byte* to)> read;
  // Queues work on the context's stream that reads the device's copy of them.
  std::function<absl::Status(const std::byte* stored, int64_t first, int64_t n)> consume;
};

// The most rows that `consume` is called with.
inline int64_t RowsAtOnce(int64_t rows, int64_t row_bytes) {
  return std::min(rows, RowsOf(kPieceBytes, row_bytes));
}

// Returns when all has been queued; adds the time that it waited for reading to `seconds_waited`.
absl::Status StreamRows(Context& context, PinnedPool& pinned, ThreadPool& readers,
                        const RowStream& rows, double* seconds_waited = nullptr);

}  // namespace walsh::kernels::cuda
