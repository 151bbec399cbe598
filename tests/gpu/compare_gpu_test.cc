// Maxima of a comparison on the device: equal to a loop on the host, to the bit.
#include <algorithm>
#include <limits>

#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/compare.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class CompareGpuTest : public GpuTest {
 protected:
  Difference On(const std::vector<float>& a, const std::vector<float>& b) {
    const auto device_a = Upload(a), device_b = Upload(b);
    const auto result =
        Compare(context(), static_cast<int64_t>(a.size()), device_a.data(), device_b.data());
    EXPECT_OK(result);
    return result.value_or(Difference{});
  }
};

TEST_F(CompareGpuTest, FindsTheLargestWhereverTheyAre) {
  // One block, some, and more than there are at once.
  for (const int64_t n : {1, 2, 31, 255, 256, 257, 5000, 2048 * 256 + 77}) {
    std::vector<float> a = RandomNormal(n, 1), b = RandomNormal(n, 2, 1e-3f);
    for (size_t i = 0; i < a.size(); ++i) b[i] += a[i];
    for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
      std::vector<float> x = a, y = b;
      x[static_cast<size_t>(at)] = -100.5f;
      y[static_cast<size_t>(n - 1 - at)] = 7.25f;
      double largest = 0, difference = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        largest = std::max(largest, std::abs(static_cast<double>(x[i])));
        difference = std::max(difference, std::abs(static_cast<double>(x[i]) - y[i]));
      }
      const Difference found = On(x, y);
      EXPECT_EQ(found.largest, largest) << n << " " << at;
      EXPECT_EQ(found.difference, difference) << n << " " << at;
      EXPECT_EQ(found.first_bad, -1) << n << " " << at;
    }
  }
}

// Floats whose difference no float holds.
TEST_F(CompareGpuTest, SubtractsInDouble) {
  const Difference found = On({1.0f, 3e38f}, {1.0f + 0x1p-23f, -3e38f});
  EXPECT_EQ(found.difference, 2 * static_cast<double>(3e38f));
  EXPECT_EQ(On({1.0f}, {1e-30f}).difference, 1.0 - static_cast<double>(1e-30f));
}

TEST_F(CompareGpuTest, NamesTheFirstThatIsNotFinite) {
  std::vector<float> a = RandomNormal(70000, 3), b = a;
  b[69999] = kNan;
  EXPECT_EQ(On(a, b).first_bad, 69999);
  a[40000] = -kInfinity;
  EXPECT_EQ(On(a, b).first_bad, 40000);
  a[39999] = kNan;
  b[39999] = kNan;
  EXPECT_EQ(On(a, b).first_bad, 39999);
  b[0] = kInfinity;
  EXPECT_EQ(On(a, b).first_bad, 0);
}

TEST_F(CompareGpuTest, NothingAndLess) {
  const auto nothing = Compare(context(), 0, nullptr, nullptr);
  ASSERT_OK(nothing);
  EXPECT_EQ(nothing->largest, 0);
  EXPECT_EQ(nothing->difference, 0);
  EXPECT_EQ(nothing->first_bad, -1);
  EXPECT_THAT(Compare(context(), -1, nullptr, nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1 values")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
