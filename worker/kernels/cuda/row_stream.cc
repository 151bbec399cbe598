#include "worker/kernels/cuda/row_stream.h"

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "common/status_macros.h"

namespace walsh::kernels::cuda {

absl::Status StreamRows(Context& context, PinnedPool& pinned, ThreadPool& readers,
                        const RowStream& rows, double* seconds_waited) {
  if (rows.rows == 0) return absl::OkStatus();
  const int64_t at_once = RowsAtOnce(rows.rows, rows.row_bytes);
  const int64_t n_pieces = (rows.rows + at_once - 1) / at_once;
  const auto rows_of = [&](int64_t piece) {
    return std::min(at_once, rows.rows - piece * at_once);
  };
  const auto fill = [&](int64_t piece, std::span<std::byte> host) -> absl::StatusOr<int64_t> {
    const int64_t n = rows_of(piece);
    const int64_t of_reader = RowsOf(kRangeBytes, rows.row_bytes);
    std::vector<absl::Status> statuses(static_cast<size_t>((n + of_reader - 1) / of_reader));
    readers.ParallelFor(static_cast<int64_t>(statuses.size()), [&](int64_t i) {
      const int64_t first = i * of_reader;
      statuses[static_cast<size_t>(i)] =
          rows.read(piece * at_once + first, std::min(of_reader, n - first),
                    host.data() + first * rows.row_bytes);
    });
    for (const absl::Status& status : statuses) WALSH_RETURN_IF_ERROR(status);
    return n * rows.row_bytes;
  };
  WALSH_ASSIGN_OR_RETURN(
      const std::unique_ptr<ReadAhead> pieces,
      ReadAhead::Create(&context, &pinned, n_pieces, at_once * rows.row_bytes, fill));
  for (int64_t piece = 0; piece < n_pieces; ++piece) {
    WALSH_ASSIGN_OR_RETURN(const std::byte* stored, pieces->Take(piece));
    WALSH_RETURN_IF_ERROR(rows.consume(stored, piece * at_once, rows_of(piece)));
  }
  if (seconds_waited != nullptr) *seconds_waited += pieces->seconds_waited();
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
