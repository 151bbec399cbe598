#include "common/sha256.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <new>
#include <string>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh {
namespace {

using ::testing::_;
using ::walsh::testing::HasCode;

// FIPS 180-4 and NIST's example values.
TEST(Sha256Test, KnownAnswers) {
  EXPECT_EQ(Sha256Hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256Hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Sha256Hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256Test, PiecesGiveTheDigestOfTheWhole) {
  Sha256 hash;
  hash.Update("a");
  hash.Update("");
  Sha256 moved = std::move(hash);
  moved.Update("bc");
  EXPECT_EQ(moved.HexDigest(), Sha256Hex("abc"));
}

TEST(Sha256FileChunksTest, AnEmptyFileHasNoChunks) {
  testing::TempDir dir;
  std::ofstream(dir / "empty").close();
  ASSERT_OK_AND_ASSIGN(const auto digests, Sha256FileChunks(dir / "empty", 4));
  EXPECT_TRUE(digests.empty());
}

// A sparse file of two chunks and one byte, so that order and the last, short chunk show.
TEST(Sha256FileChunksTest, ChunksAreInOrderForAnyNumberOfThreads) {
  testing::TempDir dir;
  const std::string path = dir / "sparse";
  std::ofstream(path) << "first";
  ASSERT_EQ(truncate(path.c_str(), 2 * kHashChunkBytes + 1), 0);
  std::string chunk(kHashChunkBytes, '\0');
  const std::string zeros = Sha256Hex(chunk);
  chunk.replace(0, 5, "first");
  const std::vector<std::string> expected = {Sha256Hex(chunk), zeros,
                                             Sha256Hex(std::string(1, '\0'))};
  for (const int n_threads : {0, 1, 2, 8}) {
    ASSERT_OK_AND_ASSIGN(const auto digests, Sha256FileChunks(path, n_threads));
    EXPECT_EQ(digests, expected) << n_threads;
  }
}

TEST(Sha256FileChunksTest, AsksBeforeEachChunkAndStopsWhenTold) {
  testing::TempDir dir;
  const std::string path = dir / "sparse";
  std::ofstream(path) << "first";
  ASSERT_EQ(truncate(path.c_str(), 2 * kHashChunkBytes + 1), 0);
  int n_asked = 0;
  ASSERT_OK(Sha256FileChunks(path, 1, [&] {
    ++n_asked;
    return absl::OkStatus();
  }));
  EXPECT_EQ(n_asked, 3);
  for (const int n_threads : {1, 3}) {
    EXPECT_THAT(Sha256FileChunks(path, n_threads, [] { return absl::CancelledError("enough"); }),
                HasCode(absl::StatusCode::kCancelled));
  }
}

// As a caller that runs out of memory does.
TEST(Sha256FileChunksTest, HelpersEndBeforeWhatTheCallerThrowsGoesOn) {
  testing::TempDir dir;
  const std::string path = dir / "sparse";
  std::ofstream(path) << "first";
  ASSERT_EQ(truncate(path.c_str(), 2 * kHashChunkBytes + 1), 0);
  const KeepGoing throws = []() -> absl::Status { throw std::bad_alloc(); };
  for (const int n_threads : {1, 3}) {
    EXPECT_THROW((void)Sha256FileChunks(path, n_threads, throws), std::bad_alloc);
  }
}

TEST(Sha256FileChunksTest, RefusesWhatIsNoFile) {
  testing::TempDir dir;
  EXPECT_THAT(Sha256FileChunks(dir / "missing", 2), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Sha256FileChunks(dir.path(), 2), HasCode(absl::StatusCode::kInvalidArgument));
  ASSERT_EQ(mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_THAT(Sha256FileChunks(dir / "fifo", 2), HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh
