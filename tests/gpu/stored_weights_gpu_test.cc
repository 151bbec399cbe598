// Stored weights on the device: bits against the host's conversions and against Pack.
#include <bit>
#include <limits>

#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/stored_weights.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Stored {
  ScalarType type;
  size_t n_bytes;  // of a value
};

// A value's bytes in a file, low byte first.
void Store(float value, const Stored& stored, uint8_t* bytes) {
  switch (stored.type) {
    case ScalarType::kF32:
      std::memcpy(bytes, &value, sizeof(value));
      return;
    case ScalarType::kF16: {
      const uint16_t half = FloatToHalf(value);
      std::memcpy(bytes, &half, sizeof(half));
      return;
    }
    case ScalarType::kBf16: {
      const uint16_t bf16 = FloatToBf16(value);
      std::memcpy(bytes, &bf16, sizeof(bf16));
      return;
    }
  }
}
float Load(const Stored& stored, const uint8_t* bytes) {
  uint16_t half = 0;
  std::memcpy(&half, bytes, sizeof(half));
  if (stored.type == ScalarType::kF16) return HalfToFloat(half);
  if (stored.type == ScalarType::kBf16) return Bf16ToFloat(half);
  float value = 0;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

class ConvertStoredGpuTest : public GpuTest, public ::testing::WithParamInterface<Stored> {
 protected:
  // What first_bad becomes from `before`, for values that begin `offset` values into memory and
  // `first` values into their tensor.
  int64_t Convert(const std::vector<float>& values, int64_t offset, int64_t before,
                  int64_t first = 0) {
    const Stored& stored = GetParam();
    const auto n = static_cast<int64_t>(values.size());
    std::vector<uint8_t> bytes((values.size() + static_cast<size_t>(offset)) * stored.n_bytes);
    const size_t skipped = static_cast<size_t>(offset) * stored.n_bytes;
    for (size_t i = 0; i < values.size(); ++i) {
      Store(values[i], stored, bytes.data() + skipped + i * stored.n_bytes);
    }
    const auto x = Upload(bytes);
    auto y = Poisoned<float>(n + offset + 1);
    const auto poison = Download(y);
    auto first_bad = Upload(std::vector<int64_t>{before});
    EXPECT_OK(ConvertStored({.n = n,
                             .type = stored.type,
                             .x = x.data() + skipped,
                             .y = y.data() + offset,
                             .first = first,
                             .first_bad = first_bad.data(),
                             .stream = context().stream()}));
    const std::vector<float> actual = Download(y);
    for (int64_t i = 0; i < n + offset + 1; ++i) {
      const auto at = static_cast<size_t>(i);
      const bool is_ours = i >= offset && i < offset + n;
      const float expected =
          is_ours ? Load(stored, bytes.data() + at * stored.n_bytes) : poison[at];
      if (is_ours && std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(actual[at])) << i;
      } else {
        EXPECT_EQ(std::bit_cast<uint32_t>(actual[at]), std::bit_cast<uint32_t>(expected)) << i;
      }
    }
    return Download(first_bad)[0];
  }
};

TEST_P(ConvertStoredGpuTest, AllSizesAndAlignments) {
  for (const int64_t n : {0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 1023, 2048, 2049, 5003}) {
    for (const int64_t offset : {0, 1, 3, 4, 8}) {
      std::vector<float> values = RandomNormal(n, 1, 0.1f);
      for (size_t i = 0; i < values.size(); i += 5) values[i] *= 1e-6f;  // subnormal halves
      EXPECT_EQ(Convert(values, offset, kNone), kNone) << n << " " << offset;
    }
  }
}

TEST_P(ConvertStoredGpuTest, FindsTheFirstThatIsNotFinite) {
  for (const int64_t offset : {0, 1}) {
    std::vector<float> values = RandomNormal(5003, 2);
    values[5002] = kInfinity;
    EXPECT_EQ(Convert(values, offset, kNone), 5002);
    values[4001] = -kInfinity;
    EXPECT_EQ(Convert(values, offset, kNone), 4001);
    values[17] = std::numeric_limits<float>::quiet_NaN();
    values[16] = kInfinity;
    EXPECT_EQ(Convert(values, offset, kNone), 16);
    // Counted in the tensor, beyond 2^32, too.
    EXPECT_EQ(Convert(values, offset, kNone, 100), 116);
    EXPECT_EQ(Convert(values, offset, 115, 100), 115);
    EXPECT_EQ(Convert(values, offset, kNone, int64_t{1} << 33), (int64_t{1} << 33) + 16);
    values[0] = kInfinity;
    EXPECT_EQ(Convert(values, offset, kNone), 0);
    values[0] = 1;
    EXPECT_EQ(Convert(values, offset, 9), 9) << "what an earlier tensor has found";
  }
}

TEST_P(ConvertStoredGpuTest, RefusesHalvesOfValues) {
  const auto x = Upload(std::vector<uint8_t>(16));
  auto y = Poisoned<float>(4);
  auto first_bad = Upload(std::vector<int64_t>{kNone});
  ConvertStoredParams params{.n = 1,
                             .type = GetParam().type,
                             .x = x.data() + 1,
                             .y = y.data(),
                             .first_bad = first_bad.data(),
                             .stream = context().stream()};
  EXPECT_THAT(ConvertStored(params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 bytes off")));
  params.n = -1;
  params.x = x.data();
  EXPECT_THAT(ConvertStored(params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1 values")));
}

INSTANTIATE_TEST_SUITE_P(Types, ConvertStoredGpuTest,
                         ::testing::Values(Stored{ScalarType::kF32, 4}, Stored{ScalarType::kF16, 2},
                                           Stored{ScalarType::kBf16, 2}));

class UnpackGpuTest : public GpuTest, public ::testing::WithParamInterface<int> {};

TEST_P(UnpackGpuTest, IsTheInverseOfPack) {
  const int bits = GetParam();
  struct Shape {
    int64_t rows, cols, group_size;
  };
  for (const Shape& s : std::vector<Shape>{{32, 32, 32},
                                           {32, 32, 1},
                                           {64, 96, 48},
                                           {32, 160, 8},
                                           {96, 160, 32},
                                           {64, 288, 288},
                                           {160, 256, 128},
                                           {1056, 2080, 32}}) {
    const int64_t groups = s.cols / s.group_size;
    std::mt19937 generator(11);
    std::vector<uint8_t> codes(static_cast<size_t>(s.rows * s.cols));
    std::vector<uint8_t> zeros(static_cast<size_t>(s.rows * groups));
    for (uint8_t& c : codes) c = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
    for (uint8_t& z : zeros) z = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
    std::vector<float> scales = RandomNormal(s.rows * groups, 12);
    for (float& scale : scales) scale = HalfToFloat(FloatToHalf(std::abs(scale)));

    const auto device_codes = Upload(codes);
    const auto device_zeros = Upload(zeros);
    const auto device_scales = Upload(scales);
    auto qweight = Poisoned<uint32_t>(s.cols / 32 * bits * s.rows);
    auto qzeros = Poisoned<uint32_t>(groups * (s.rows / 32 * bits));
    auto half_scales = Poisoned<__half>(groups * s.rows);
    auto expected = Poisoned<__nv_bfloat16>(s.rows * s.cols);
    auto actual = Poisoned<__nv_bfloat16>(s.rows * s.cols);
    ASSERT_OK(Pack({.rows = s.rows,
                    .cols = s.cols,
                    .bits = bits,
                    .group_size = s.group_size,
                    .codes = device_codes.data(),
                    .scales = device_scales.data(),
                    .zeros = device_zeros.data(),
                    .qweight = qweight.data(),
                    .qzeros = qzeros.data(),
                    .half_scales = half_scales.data(),
                    .dequantized = expected.data(),
                    .stream = context().stream()}));
    ASSERT_OK(Unpack({.rows = s.rows,
                      .cols = s.cols,
                      .bits = bits,
                      .group_size = s.group_size,
                      .qweight = qweight.data(),
                      .qzeros = qzeros.data(),
                      .scales = half_scales.data(),
                      .y = actual.data(),
                      .stream = context().stream()}));
    const std::vector<__nv_bfloat16> host_expected = Download(expected);
    const std::vector<__nv_bfloat16> host_actual = Download(actual);
    EXPECT_EQ(std::memcmp(host_actual.data(), host_expected.data(),
                          host_expected.size() * sizeof(__nv_bfloat16)),
              0)
        << s.rows << " " << s.cols << " " << s.group_size;
  }
}
INSTANTIATE_TEST_SUITE_P(Bits, UnpackGpuTest, ::testing::Values(2, 3, 4, 8));

using UnpackErrorsGpuTest = GpuTest;

TEST_F(UnpackErrorsGpuTest, SizesThatDoNotFit) {
  EXPECT_OK(Unpack({.rows = 0, .cols = 64, .group_size = 32}));
  EXPECT_OK(Unpack({.rows = 32, .cols = 0, .group_size = 32}));
  EXPECT_THAT(Unpack({.rows = 33, .cols = 64, .group_size = 32}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("33 rows")));
  EXPECT_THAT(Unpack({.rows = 32, .cols = 65, .group_size = 65}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("65 columns")));
  EXPECT_THAT(Unpack({.rows = 32, .cols = 64, .group_size = 48}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("group_size: 48")));
  EXPECT_THAT(Unpack({.rows = 32, .cols = 64, .bits = 5, .group_size = 32}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bits: 5")));
  auto y = Poisoned<__nv_bfloat16>(32 * 64 + 1);
  EXPECT_THAT(Unpack({.rows = 32, .cols = 64, .group_size = 32, .y = y.data() + 1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2 bytes off")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
