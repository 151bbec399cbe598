// Rotations on the device: the same bits as worker/rotate on the CPU.
#include <bit>
#include <numeric>

#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/rotate.h"
#include "worker/kernels/thread_pool.h"
#include "worker/rotate/fold.h"
#include "worker/rotate/rotation.h"

namespace walsh::kernels::cuda {
namespace {

using rotate::Kind;
using rotate::Rotation;
using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

struct Case {
  Kind kind = Kind::kGsr;
  int64_t width = 0;
  int64_t block = 0;
  bool signs = false;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << rotate::KindName(c.kind) << " " << c.width << " block " << c.block
             << (c.signs ? " signs" : "");
}

DeviceRotation::Tables TablesOf(const Rotation& rotation) {
  const Rotation::Parts parts = rotation.parts();
  return {.width = rotation.width(),
          .block = parts.block,
          .core = parts.core,
          .core_matrix = parts.core_matrix,
          .row_order = parts.row_order,
          .signs = parts.signs,
          .normalizer = parts.normalizer};
}

// Normal values with zeros of both signs and large ones among them.
std::vector<float> Values(int64_t n, uint32_t seed) {
  std::vector<float> values = RandomNormal(n, seed);
  for (size_t i = 0; i < values.size(); i += 7) {
    values[i] = i % 3 == 0 ? 0.0f : i % 3 == 1 ? -0.0f : values[i] * 1e10f;
  }
  return values;
}

Matrix ToMatrix(const std::vector<float>& values, int64_t rows, int64_t cols) {
  Matrix m(rows, cols);
  std::copy(values.begin(), values.end(), m.data());
  return m;
}

// Elements whose bits differ.
int64_t Differences(const std::vector<float>& actual, const Matrix& expected) {
  EXPECT_EQ(static_cast<int64_t>(actual.size()), expected.size());
  int64_t n = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    n += std::bit_cast<uint32_t>(actual[i]) != std::bit_cast<uint32_t>(expected.data()[i]) ? 1 : 0;
  }
  return n;
}

class RotateGpuTest : public GpuTest, public ::testing::WithParamInterface<Case> {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    const Case& c = GetParam();
    ASSERT_OK_AND_ASSIGN(
        cpu_, Rotation::Create(
                  c.width, {.kind = c.kind, .block = c.block, .random_signs = c.signs, .seed = 5}));
    ASSERT_OK_AND_ASSIGN(gpu_, DeviceRotation::Create(context(), TablesOf(cpu_)));
  }
  // Few of the wide ones, which the CPU takes long for.
  std::vector<int64_t> Counts() const {
    if (GetParam().width > 2048) return {1, 3};
    return {0, 1, 2, 7, 33, 130};
  }

  ThreadPool pool_{4};
  Rotation cpu_;
  DeviceRotation gpu_;
};

TEST_P(RotateGpuTest, RowsOfReaders) {
  const int64_t width = gpu_.width();
  const std::vector<float> norm = Values(width, 2);
  const auto device_norm = Upload(norm);
  for (const int64_t rows : Counts()) {
    for (const bool has_norm : {false, true}) {
      const std::vector<float> x = Values(rows * width, 1);
      Matrix expected = ToMatrix(x, rows, width);
      rotate::RotateReader(expected, has_norm ? std::span<const float>(norm) : std::span<float>(),
                           cpu_, pool_);
      auto actual = Upload(x);
      ASSERT_OK(gpu_.RotateRows(context(), rows, width, has_norm ? device_norm.data() : nullptr,
                                actual.data()));
      EXPECT_EQ(Differences(Download(actual), expected), 0) << rows << " rows, norm " << has_norm;
    }
  }
}

TEST_P(RotateGpuTest, RowsOfHeads) {
  for (const int64_t heads : {1, 3}) {
    const int64_t cols = heads * gpu_.width();
    for (const int64_t rows : Counts()) {
      const std::vector<float> x = Values(rows * cols, 3);
      Matrix expected = ToMatrix(x, rows, cols);
      rotate::RotateHeadInputs(expected, cpu_, pool_);
      auto actual = Upload(x);
      ASSERT_OK(gpu_.RotateRows(context(), rows, cols, nullptr, actual.data()));
      EXPECT_EQ(Differences(Download(actual), expected), 0) << heads << " heads, " << rows;
    }
  }
}

// One scale for all pieces of a row.
TEST_P(RotateGpuTest, ScaleOfPieces) {
  const int64_t width = gpu_.width();
  const std::vector<float> x = Values(3 * 2 * width, 4);
  const std::vector<float> norm = Values(width, 6);
  Matrix expected = ToMatrix(x, 3 * 2, width);
  rotate::RotateReader(expected, norm, cpu_, pool_);
  const auto device_norm = Upload(norm);
  auto actual = Upload(x);
  ASSERT_OK(gpu_.RotateRows(context(), 3, 2 * width, device_norm.data(), actual.data()));
  EXPECT_EQ(Differences(Download(actual), expected), 0);
}

TEST_P(RotateGpuTest, Columns) {
  std::vector<float> no_bias;
  for (const int64_t blocks : {1, 3}) {
    const int64_t rows = blocks * gpu_.width();
    for (const int64_t cols : Counts()) {
      const std::vector<float> x = Values(rows * cols, 7);
      Matrix expected = ToMatrix(x, rows, cols);
      rotate::RotateHeadOutputs(expected, no_bias, cpu_, pool_);
      auto actual = Upload(x);
      ASSERT_OK(gpu_.RotateColumns(context(), rows, cols, actual.data()));
      EXPECT_EQ(Differences(Download(actual), expected), 0) << blocks << " blocks, " << cols;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Rotations, RotateGpuTest,
    ::testing::Values(
        Case{.width = 128, .block = 128}, Case{.width = 576, .block = 64},
        Case{.width = 144, .block = 16}, Case{.width = 96, .block = 32},
        Case{.width = 1536, .block = 128, .signs = true}, Case{.width = 4096, .block = 1024},
        Case{.kind = Kind::kLocalHadamard, .width = 576, .block = 64},
        Case{.kind = Kind::kLocalHadamard, .width = 384, .block = 128, .signs = true},
        Case{.kind = Kind::kHadamard, .width = 1},
        Case{.kind = Kind::kHadamard, .width = 2, .signs = true},
        Case{.kind = Kind::kHadamard, .width = 36}, Case{.kind = Kind::kHadamard, .width = 64},
        Case{.kind = Kind::kHadamard, .width = 72}, Case{.kind = Kind::kHadamard, .width = 576},
        Case{.kind = Kind::kHadamard, .width = 1152, .signs = true},
        Case{.kind = Kind::kHadamard, .width = 2048}, Case{.kind = Kind::kHadamard, .width = 4608},
        Case{.kind = Kind::kHadamard, .width = 16384},
        Case{.kind = Kind::kHadamard, .width = 18432, .signs = true},
        Case{.kind = Kind::kWalsh, .width = 64, .signs = true},
        Case{.kind = Kind::kWalsh, .width = 576}, Case{.kind = Kind::kWalsh, .width = 1024},
        Case{.kind = Kind::kWalsh, .width = 1152, .signs = true},
        Case{.kind = Kind::kWalsh, .width = 4096}, Case{.kind = Kind::kWalsh, .width = 4608},
        Case{.kind = Kind::kHadamard, .width = 12}, Case{.kind = Kind::kHadamard, .width = 1536},
        Case{.kind = Kind::kWalsh, .width = 1536, .signs = true},
        Case{.kind = Kind::kHadamard, .width = 2560, .signs = true},
        Case{.kind = Kind::kWalsh, .width = 5120}, Case{.kind = Kind::kWalsh, .width = 896},
        Case{.kind = Kind::kHadamard, .width = 3584}));

using RotateErrorsGpuTest = GpuTest;

TEST_F(RotateErrorsGpuTest, SizesThatDoNotFit) {
  ASSERT_OK_AND_ASSIGN(const Rotation cpu, Rotation::Create(96, {.block = 32}));
  ASSERT_OK_AND_ASSIGN(const DeviceRotation gpu, DeviceRotation::Create(context(), TablesOf(cpu)));
  EXPECT_THAT(gpu.RotateRows(context(), 1, 100, nullptr, nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("width 96")));
  EXPECT_THAT(gpu.RotateColumns(context(), 32, 96, nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("[32, 96]")));
}

TEST_F(RotateErrorsGpuTest, AWidthThatSharedMemoryDoesNotHold) {
  ASSERT_OK_AND_ASSIGN(const Rotation cpu, Rotation::Create(1 << 17, {.kind = Kind::kHadamard}));
  ASSERT_OK_AND_ASSIGN(const DeviceRotation gpu, DeviceRotation::Create(context(), TablesOf(cpu)));
  auto x = Poisoned<float>(1 << 17);
  EXPECT_THAT(
      gpu.RotateRows(context(), 1, 1 << 17, nullptr, x.data()),
      StatusIs(absl::StatusCode::kFailedPrecondition,
               ::testing::AllOf(
                   HasSubstr("width 131072"),
                   HasSubstr(std::to_string(context().properties().sharedMemPerBlockOptin)))));
}

TEST_F(RotateErrorsGpuTest, TablesThatAreNoRotation) {
  const auto create = [&](const DeviceRotation::Tables& tables) {
    return DeviceRotation::Create(context(), tables);
  };
  EXPECT_THAT(create({.width = 100, .block = 32}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("width 100")));
  EXPECT_THAT(create({.width = 48, .block = 48}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("power of two")));
  EXPECT_THAT(create({.width = 88, .block = 88, .core = 44}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("core of 44")));
  EXPECT_THAT(create({.width = 36, .block = 36, .core = 36}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0 entries")));
  const std::vector<double> signs(7, 1.0);
  EXPECT_THAT(create({.width = 8, .block = 8, .signs = signs}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("7 signs")));
  std::vector<int32_t> order(8);
  std::iota(order.begin(), order.end(), 0);
  EXPECT_OK(create({.width = 8, .block = 8, .row_order = order}));
  order[3] = 4;
  EXPECT_THAT(create({.width = 8, .block = 8, .row_order = order}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no permutation")));
  order[3] = 8;
  EXPECT_THAT(create({.width = 8, .block = 8, .row_order = order}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("row 8")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
