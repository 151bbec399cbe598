// Goal:   a real model quantized on the device is as good as the same one quantized on the CPU.
// Method: SmolLM2-135M by both backends with the same options; issue 3's limits. Model and texts
// come
//         from outside (WALSH_SMOLLM2, WALSH_TEST_DATA); some minutes of the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "tests/unit/worker/pipeline/smollm2_fixture.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/cuda/cuda_backend.h"

namespace walsh::pipeline {
namespace {

class SmolLm2GpuTest : public SmolLm2Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCudaBackend(0);
    if (!backend.ok()) GTEST_SKIP() << "no GPU: " << backend.status().message();
    cuda_ = *std::move(backend);
    SmolLm2Test::SetUp();
    spec_.n_calibration_windows = 32;
    spec_.sequence_length = 1024;
    spec_.evaluate = true;
    spec_.n_evaluation_windows = 8;
    spec_.evaluation_length = 2048;
  }

  JobReport RunOn(Backend& backend) {
    ThreadPool pool(ThreadPool::HardwareThreads());
    auto report = RunJob(spec_, backend, pool, testing::IgnoreProgress);
    EXPECT_OK(report);
    std::filesystem::remove_all(spec_.output_directory);
    return *std::move(report);
  }

  void ExpectAsGoodAsTheCpu(double perplexity_tolerance) {
    const JobReport cpu = RunOn(*MakeCpuBackend());
    const JobReport cuda = RunOn(*cuda_);
    EXPECT_NEAR(cuda.perplexity_before / cpu.perplexity_before, 1.0, 0.002);
    EXPECT_NEAR(cuda.perplexity_after / cpu.perplexity_after, 1.0, perplexity_tolerance);
    ASSERT_EQ(cuda.linears.size(), cpu.linears.size());
    double log_ratio = 0;
    double furthest = 0;
    for (size_t i = 0; i < cpu.linears.size(); ++i) {
      const double ratio = cuda.linears[i].relative_error / cpu.linears[i].relative_error;
      EXPECT_NEAR(ratio, 1.0, 0.01) << cpu.linears[i].name;
      log_ratio += std::log(ratio) / static_cast<double>(cpu.linears.size());
      furthest = std::max(furthest, std::abs(ratio - 1));
    }
    std::printf(
        "%d bits: perplexity before %.4f (cpu) %.4f (cuda), after %.4f %.4f; errors of linears: "
        "geometric mean of the ratios %.5f, furthest from one by %.4f; KL %.5f, top-1 %.4f\n",
        spec_.quantizer.bits, cpu.perplexity_before, cuda.perplexity_before, cpu.perplexity_after,
        cuda.perplexity_after, std::exp(log_ratio), furthest, cuda.kl_divergence,
        cuda.top1_agreement);
  }

  std::unique_ptr<Backend> cuda_;
};

TEST_F(SmolLm2GpuTest, FourBits) {
  spec_.quantizer.bits = 4;
  ExpectAsGoodAsTheCpu(0.005);
}

TEST_F(SmolLm2GpuTest, TwoBits) {
  spec_.quantizer.bits = 2;
  ExpectAsGoodAsTheCpu(0.02);
}

}  // namespace
}  // namespace walsh::pipeline
