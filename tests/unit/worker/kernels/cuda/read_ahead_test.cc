#include "worker/kernels/cuda/read_ahead.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>

#include "tests/unit/worker/kernels/cuda/device_fixture.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

constexpr int64_t kPiece = 1000;

class ReadAheadTest : public DeviceTest {
 protected:
  // Pieces of different sizes; counts how often each was read.
  absl::StatusOr<std::unique_ptr<ReadAhead>> Pieces(int64_t n) {
    reads_ = std::vector<std::atomic<int>>(static_cast<size_t>(n));
    return ReadAhead::Create(
        &context(), &pinned_, n, kPiece,
        [this](int64_t index, std::span<std::byte> host) -> absl::StatusOr<int64_t> {
          ++reads_[static_cast<size_t>(index)];
          if (index == fails_) return absl::DataLossError("piece is gone");
          const int64_t n_bytes = kPiece - index;
          for (int64_t i = 0; i < n_bytes; ++i) host[static_cast<size_t>(i)] = At(index, i);
          return n_bytes;
        });
  }
  static std::byte At(int64_t piece, int64_t i) { return ByteAt(piece * kPiece + i); }

  // Queues a copy of a piece, as whoever uses it would.
  absl::Status Keep(ReadAhead& pieces, int64_t index, std::vector<std::byte>& to) {
    WALSH_ASSIGN_OR_RETURN(const std::byte* stored, pieces.Take(index));
    to.resize(static_cast<size_t>(kPiece - index));
    EXPECT_EQ(
        cudaMemcpyAsync(to.data(), stored, to.size(), cudaMemcpyDeviceToHost, context().stream()),
        cudaSuccess);
    return absl::OkStatus();
  }
  static void Expect(int64_t index, const std::vector<std::byte>& bytes) {
    for (size_t i = 0; i < bytes.size(); ++i) {
      ASSERT_EQ(bytes[i], At(index, static_cast<int64_t>(i))) << index << " " << i;
    }
  }

  std::vector<std::atomic<int>> reads_;
  std::atomic<int64_t> fails_{-1};
};

TEST_F(ReadAheadTest, PiecesComeInOrderAndAreReadOnce) {
  constexpr int64_t kPieces = 9;
  ASSERT_OK_AND_ASSIGN(const auto pieces, Pieces(kPieces));
  std::vector<std::vector<std::byte>> kept(kPieces);
  for (int64_t i = 0; i < kPieces; ++i) {
    ASSERT_OK(Keep(*pieces, i, kept[static_cast<size_t>(i)]));
  }
  ASSERT_OK(context().Synchronize());
  for (int64_t i = 0; i < kPieces; ++i) {
    Expect(i, kept[static_cast<size_t>(i)]);
    EXPECT_EQ(reads_[static_cast<size_t>(i)], 1);
  }
  EXPECT_GE(pieces->seconds_waited(), 0);
}

TEST_F(ReadAheadTest, AnyOrderWorks) {
  ASSERT_OK_AND_ASSIGN(const auto pieces, Pieces(6));
  for (const int64_t index : {3, 5, 0, 0, 1, 4, 2}) {
    std::vector<std::byte> kept;
    ASSERT_OK(Keep(*pieces, index, kept));
    ASSERT_OK(context().Synchronize());
    Expect(index, kept);
  }
}

TEST_F(ReadAheadTest, AFailureOfReadingIsThatOfTheNextTake) {
  ASSERT_OK_AND_ASSIGN(const auto pieces, Pieces(4));
  fails_ = 2;
  std::vector<std::byte> kept;
  ASSERT_OK(Keep(*pieces, 0, kept));
  ASSERT_OK(Keep(*pieces, 1, kept));
  EXPECT_THAT(pieces->Take(2), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("is gone")));
  // A later try reads it anew.
  fails_ = -1;
  ASSERT_OK(Keep(*pieces, 2, kept));
  ASSERT_OK(context().Synchronize());
  Expect(2, kept);
}

TEST_F(ReadAheadTest, MayEndWhileItReads) {
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK_AND_ASSIGN(const auto pieces, Pieces(4));
    ASSERT_OK(pieces->Take(0));
  }
}

TEST_F(ReadAheadTest, NoMemoryIsAnErrorAndTakesNone) {
  for (const int64_t nth : {1, 2}) {
    FailAllocationForTest(nth);
    EXPECT_THAT(Pieces(4), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("needed")));
    FailAllocationForTest(0);
  }
}

}  // namespace
}  // namespace walsh::kernels::cuda
