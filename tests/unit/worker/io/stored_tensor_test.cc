#include "worker/io/stored_tensor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using walsh::testing::StatusIs;

constexpr StorageType kTypes[] = {StorageType::kF32,  StorageType::kF16,  StorageType::kBf16,
                                  StorageType::kQ4_0, StorageType::kQ4_1, StorageType::kQ5_0,
                                  StorageType::kQ5_1, StorageType::kQ8_0, StorageType::kQ2_K,
                                  StorageType::kQ3_K, StorageType::kQ4_K, StorageType::kQ5_K,
                                  StorageType::kQ6_K};

// A file of bytes that are floats below 2 in every format that has floats.
std::vector<std::byte> RandomBytes(int64_t n) {
  std::mt19937 random(1);
  std::vector<std::byte> bytes(static_cast<size_t>(n));
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() & 0x3f);
  return bytes;
}

StoredTensor Tensor(StorageType type, int64_t rows, int64_t n_heads) {
  return {.name = "t",
          .type = type,
          .offset = 7,
          .rows = rows,
          .cols = 256,
          .is_one_dimensional = rows == 1,
          .n_interleaved_heads = n_heads};
}

// The bytes mean the floats that ReadStoredRows gives, in the same order.
TEST(ReadStoredBytesTest, EqualsReadingAsFloats) {
  for (const StorageType type : kTypes) {
    for (const int64_t n_heads : {0, 1, 3, 12}) {
      const StoredTensor tensor = Tensor(type, 24, n_heads);
      const std::vector<std::byte> contents = RandomBytes(7 + tensor.size_bytes() + 3);
      const auto file = MemoryFile("f", contents);
      ASSERT_OK_AND_ASSIGN(const Matrix expected, ReadStoredRows(*file, tensor, 0, 24));
      std::vector<std::byte> bytes(static_cast<size_t>(tensor.size_bytes()));
      ASSERT_OK(ReadStoredBytes(*file, tensor, 0, tensor.rows, bytes));
      Matrix values(24, 256);
      Dequantize(type, bytes, values.span());
      EXPECT_TRUE(std::equal(expected.data(), expected.data() + expected.size(), values.data()))
          << Info(type).name << ", " << n_heads << " heads";
    }
  }
}

// Any rows of a tensor are those of the whole.
TEST(ReadStoredBytesTest, ReadsRowsOfATensor) {
  for (const StorageType type : {StorageType::kBf16, StorageType::kQ4_1}) {
    for (const int64_t n_heads : {0, 1, 3, 12}) {
      const StoredTensor tensor = Tensor(type, 24, n_heads);
      const std::vector<std::byte> contents = RandomBytes(7 + tensor.size_bytes());
      const auto file = MemoryFile("f", contents);
      std::vector<std::byte> whole(static_cast<size_t>(tensor.size_bytes()));
      ASSERT_OK(ReadStoredBytes(*file, tensor, 0, 24, whole));
      const auto row_bytes = tensor.row_bytes();
      for (int64_t first = 0; first <= 24; ++first) {
        for (int64_t n = 0; n <= 24 - first; ++n) {
          std::vector<std::byte> rows(static_cast<size_t>(n * row_bytes));
          ASSERT_OK(ReadStoredBytes(*file, tensor, first, n, rows));
          EXPECT_TRUE(std::equal(rows.begin(), rows.end(), whole.begin() + first * row_bytes))
              << Info(type).name << ", " << n_heads << " heads, rows " << first << " and " << n;
        }
      }
      for (const auto& [first, n] : {std::pair(-1, 2), std::pair(24, 1), std::pair(3, 22)}) {
        EXPECT_THAT(ReadStoredBytes(*file, tensor, first, n, whole),
                    StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("it has 24")));
      }
    }
  }
}

TEST(ReadStoredBytesTest, PutsTheElementsOfABiasInOrder) {
  for (const StorageType type : {StorageType::kF32, StorageType::kF16, StorageType::kBf16}) {
    const StoredTensor tensor = Tensor(type, 1, 8);
    const std::vector<std::byte> contents = RandomBytes(7 + tensor.size_bytes());
    const auto file = MemoryFile("f", contents);
    ASSERT_OK_AND_ASSIGN(const Matrix expected, ReadStoredRows(*file, tensor, 0, 1));
    std::vector<std::byte> bytes(static_cast<size_t>(tensor.size_bytes()));
    ASSERT_OK(ReadStoredBytes(*file, tensor, 0, tensor.rows, bytes));
    Matrix values(1, 256);
    Dequantize(type, bytes, values.span());
    EXPECT_TRUE(std::equal(expected.data(), expected.data() + 256, values.data()));
  }
}

// Two heads of four rows, written out: the file holds HF's rows 0 2 1 3 of each.
TEST(ReadStoredBytesTest, UninterleavesRows) {
  std::vector<std::byte> contents;
  for (const int row : {0, 2, 1, 3, 4, 6, 5, 7}) contents.push_back(static_cast<std::byte>(row));
  const auto widen = [](const std::vector<std::byte>& rows) {
    std::vector<std::byte> wide;
    for (const std::byte row : rows) wide.insert(wide.end(), 4, row);
    return wide;
  };
  const std::vector<std::byte> wide = widen(contents);
  const auto file = MemoryFile("f", wide);
  const StoredTensor tensor = {.name = "t", .rows = 8, .cols = 1, .n_interleaved_heads = 2};
  std::vector<std::byte> bytes(32);
  ASSERT_OK(ReadStoredBytes(*file, tensor, 0, tensor.rows, bytes));
  std::sort(contents.begin(), contents.end());
  EXPECT_EQ(bytes, widen(contents));
}

TEST(ReadStoredBytesTest, LeavesValuesAlone) {
  const std::vector<std::byte> nan(4, std::byte{0xff});
  const auto file = MemoryFile("f", nan);
  const StoredTensor tensor = {.name = "t", .rows = 1, .cols = 1};
  std::vector<std::byte> bytes(4);
  ASSERT_OK(ReadStoredBytes(*file, tensor, 0, tensor.rows, bytes));
  EXPECT_EQ(bytes, nan);
}

TEST(ReadStoredBytesTest, RefusesWhatDoesNotFit) {
  const StoredTensor tensor = Tensor(StorageType::kQ8_0, 24, 0);
  const std::vector<std::byte> contents = RandomBytes(7 + tensor.size_bytes());
  const auto file = MemoryFile("f", contents);
  std::vector<std::byte> bytes(static_cast<size_t>(tensor.size_bytes()));
  EXPECT_EQ(bytes.size(), 24u * 8u * 34u);
  for (const size_t n : {bytes.size() - 1, bytes.size() + 1, size_t{0}}) {
    std::vector<std::byte> other(n);
    EXPECT_THAT(ReadStoredBytes(*file, tensor, 0, tensor.rows, other),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("tensor 't': a buffer of " + std::to_string(n) +
                                   " bytes, rows 0 to 24 have 6528")));
  }
  const StoredTensor bias = Tensor(StorageType::kQ8_0, 1, 8);
  bytes.resize(static_cast<size_t>(bias.size_bytes()));
  EXPECT_THAT(ReadStoredBytes(*file, bias, 0, 1, bytes),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("f: tensor 't' is Q8_0")));
}

// A file that reports a change after any read.
class ChangedFile final : public RandomAccessFile {
 public:
  const std::string& name() const override { return name_; }
  int64_t size() const override { return 64; }
  absl::Status ReadAt(int64_t offset, std::span<std::byte>) const override {
    offsets.push_back(offset);
    return absl::OkStatus();
  }
  absl::Status CheckUnchanged() const override { return absl::DataLossError("changed"); }

  mutable std::vector<int64_t> offsets;

 private:
  const std::string name_ = "f";
};

TEST(ReadStoredBytesTest, ReadsForwardAndThenChecksForChanges) {
  const ChangedFile file;
  std::vector<std::byte> bytes(32);
  const auto changed = StatusIs(absl::StatusCode::kDataLoss, HasSubstr("changed"));
  EXPECT_THAT(ReadStoredBytes(file, {.name = "t", .rows = 8, .cols = 1, .n_interleaved_heads = 2},
                              0, 8, bytes),
              changed);
  EXPECT_THAT(file.offsets, ElementsAre(0, 4, 8, 12, 16, 20, 24, 28));
  file.offsets.clear();
  EXPECT_THAT(ReadStoredBytes(file, {.name = "t", .offset = 3, .rows = 8, .cols = 1}, 0, 8, bytes),
              changed);
  EXPECT_THAT(file.offsets, ElementsAre(3));
  file.offsets.clear();
  EXPECT_THAT(
      ReadStoredBytes(
          file,
          {.name = "t", .rows = 1, .cols = 8, .is_one_dimensional = true, .n_interleaved_heads = 2},
          0, 1, bytes),
      changed);
}

}  // namespace
}  // namespace walsh
