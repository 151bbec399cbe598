#include "worker/kernels/cuda/row_stream.h"

#include <cuda_runtime_api.h>

#include <atomic>

#include "tests/unit/worker/kernels/cuda/device_fixture.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

using RowStreamTest = DeviceTest;

// Rows of several pieces, one row larger than a piece, and rows that do not divide a piece.
TEST_F(RowStreamTest, EveryRowArrivesOnce) {
  const struct {
    int64_t rows, row_bytes;
  } shapes[] = {{0, 100},
                {1, 1},
                {3, 100},
                {2 * kPieceBytes / 3000 + 11, 3000},
                {3, kPieceBytes - 5},
                {2, kPieceBytes + 5}};
  for (const auto& [rows, row_bytes] : shapes) {
    const int64_t n_bytes = rows * row_bytes;
    std::vector<std::byte> arrived(static_cast<size_t>(n_bytes));
    int64_t next = 0;
    std::atomic<int64_t> n_read{0};
    double waited = 0;
    ASSERT_OK(StreamRows(
        context(), pinned_, pool_,
        {.rows = rows,
         .row_bytes = row_bytes,
         .read =
             [&](int64_t first, int64_t n, std::byte* to) {
               n_read += n;
               // The ends of each row do, and are cheap to make.
               for (int64_t row = first; row < first + n; ++row, to += row_bytes) {
                 std::memset(to, 0, static_cast<size_t>(row_bytes));
                 to[0] = ByteAt(2 * row);
                 to[row_bytes - 1] = ByteAt(2 * row + 1);
               }
               return absl::OkStatus();
             },
         .consume = [&](const std::byte* stored, int64_t first, int64_t n) -> absl::Status {
           EXPECT_EQ(first, next);
           EXPECT_GT(n, 0);
           next += n;
           EXPECT_EQ(cudaMemcpyAsync(arrived.data() + first * row_bytes, stored,
                                     static_cast<size_t>(n * row_bytes), cudaMemcpyDeviceToHost,
                                     context().stream()),
                     cudaSuccess);
           return absl::OkStatus();
         }},
        &waited));
    ASSERT_OK(context().Synchronize());
    EXPECT_EQ(next, rows);
    EXPECT_EQ(n_read, rows);
    for (int64_t row = 0; row < rows; ++row) {
      const std::byte* at = arrived.data() + row * row_bytes;
      ASSERT_EQ(at[row_bytes - 1], ByteAt(2 * row + 1)) << row << " of " << rows;
      if (row_bytes > 1) {
        ASSERT_EQ(at[0], ByteAt(2 * row)) << row << " of " << rows;
      }
    }
  }
}

TEST_F(RowStreamTest, WhatFailsEndsIt) {
  const auto read = [](int64_t first, int64_t, std::byte*) {
    return first > 1000 ? absl::DataLossError("late row") : absl::OkStatus();
  };
  const auto consume = [](const std::byte*, int64_t, int64_t) { return absl::OkStatus(); };
  RowStream rows{
      .rows = kPieceBytes / 4096 * 3, .row_bytes = 4096, .read = read, .consume = consume};
  EXPECT_THAT(StreamRows(context(), pinned_, pool_, rows),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("late row")));
  rows.read = [](int64_t, int64_t, std::byte*) { return absl::OkStatus(); };
  rows.consume = [](const std::byte*, int64_t first, int64_t) {
    return first > 0 ? absl::InternalError("second piece") : absl::OkStatus();
  };
  EXPECT_THAT(StreamRows(context(), pinned_, pool_, rows),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("second piece")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
