// Goal:   a real model quantized on the device is as good as the same one quantized on the CPU.
// Method: SmolLM2-135M by both, with the same options: each linear from the same Hessian, and whole
//         jobs beside those of a CPU (tests/golden/pipeline). Model and texts come from outside
//         (WALSH_SMOLLM2, WALSH_TEST_DATA).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/testing/golden.h"
#include "tests/unit/worker/pipeline/smollm2_fixture.h"
#include "worker/calibrate/samples.h"
#include "worker/calibrate/token_windows.h"
#include "worker/gptq/hessian.h"
#include "worker/gptq/quantize_linear.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/transfer.h"
#include "worker/kernels/kernels.h"
#include "worker/model/decoder_layer.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/cuda/cuda_backend.h"
#include "worker/tensor/quantized_matrix.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::pipeline {
namespace {

using kernels::cuda::Context;
using kernels::cuda::DeviceBuffer;
using kernels::cuda::Download;
using kernels::cuda::Upload;

// GPTQ of each linear by both implementations from the same weights and the same Hessian: that of
// the original model's inputs, so that nothing that was decided in one linear moves the next.
class SameHessianTest : public SmolLm2Test {
 protected:
  static constexpr int64_t kWindows = 4;
  static constexpr int64_t kWindow = 1024;

  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Context>> context = Context::Create(0);
    if (!context.ok()) GTEST_SKIP() << "no GPU: " << context.status().message();
    context_ = *std::move(context);
    SmolLm2Test::SetUp();
    if (IsSkipped()) return;
    ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open(spec_.source_path));
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(checkpoint_->tokenizer()));
    ASSERT_OK_AND_ASSIGN(const calibrate::SampleSet samples,
                         calibrate::ReadSamples({.path = spec_.calibration_path}, *tokenizer, ""));
    ASSERT_OK_AND_ASSIGN(
        const calibrate::TokenStream stream,
        calibrate::EncodeSamples(samples, *tokenizer, config().vocab, kWindow, kWindows * kWindow));
    ids_ = stream.ids;
    ASSERT_GE(ids_.size(), static_cast<size_t>(kWindows * kWindow));
  }

  const ModelConfig& config() const { return checkpoint_->config(); }

  // tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)
  double RelativeError(const Matrix& w, const Matrix& dequantized, const Matrix& hessian) {
    Matrix delta = w.Copy();
    for (int64_t i = 0; i < w.size(); ++i) delta.data()[i] -= dequantized.data()[i];
    return Form(delta, hessian) / Form(w, hessian);
  }

  double Form(const Matrix& w, const Matrix& hessian) {
    Matrix product(w.rows(), w.cols());
    EXPECT_OK(kernels::Matmul({.n_tokens = w.rows(),
                               .in = w.cols(),
                               .out = w.cols(),
                               .x = w.data(),
                               .x_stride = w.cols(),
                               .weights = hessian.data(),
                               .y = product.data(),
                               .y_stride = w.cols()},
                              stream_));
    double sum = 0;
    for (int64_t i = 0; i < w.size(); ++i) {
      sum += static_cast<double>(product.data()[i]) * static_cast<double>(w.data()[i]);
    }
    return sum;
  }

  Matrix QuantizeOnDevice(const Matrix& w, const Matrix& hessian, const gptq::Options& options) {
    const int64_t rows = w.rows(), cols = w.cols(), groups = cols / options.group_size;
    std::vector<float> diagonal(static_cast<size_t>(cols));
    double mean = 0;
    for (int64_t i = 0; i < cols; ++i) {
      diagonal[static_cast<size_t>(i)] = hessian(i, i);
      mean += static_cast<double>(hessian(i, i)) / static_cast<double>(cols);
    }
    const std::vector<float> damping(static_cast<size_t>(cols),
                                     static_cast<float>(options.damp * mean));
    const auto perm = *Upload<int32_t>(*context_, gptq::ColumnSteps(diagonal, options));
    const auto add = *Upload<float>(*context_, damping);
    const auto h = *Upload<float>(*context_, {hessian.data(), hessian.data() + hessian.size()});
    const auto weights = *Upload<float>(*context_, {w.data(), w.data() + w.size()});
    const cudaStream_t stream = context_->stream();
    auto u = *DeviceBuffer<float>::Allocate(cols * cols, stream);
    auto codes = *DeviceBuffer<uint8_t>::Allocate(rows * cols, stream);
    auto scales = *DeviceBuffer<float>::Allocate(rows * groups, stream);
    auto zeros = *DeviceBuffer<uint8_t>::Allocate(rows * groups, stream);
    EXPECT_OK(context_->Synchronize());
    EXPECT_OK(kernels::cuda::FactorHessian(*context_, {.dim = cols,
                                                       .h = h.data(),
                                                       .perm = perm.data(),
                                                       .diagonal_add = add.data(),
                                                       .u = u.data()}));
    EXPECT_OK(kernels::cuda::QuantizeColumns(*context_, {.rows = rows,
                                                         .cols = cols,
                                                         .w = weights.data(),
                                                         .u = u.data(),
                                                         .perm = perm.data(),
                                                         .bits = options.bits,
                                                         .group_size = options.group_size,
                                                         .mse_clip = options.mse_clip,
                                                         .codes = codes.data(),
                                                         .scales = scales.data(),
                                                         .zeros = zeros.data()}));
    QuantizedMatrix quantized{
        .rows = rows, .cols = cols, .bits = options.bits, .group_size = options.group_size};
    quantized.codes = *Download<uint8_t>(*context_, codes.data(), codes.size());
    quantized.scales = *Download<float>(*context_, scales.data(), scales.size());
    quantized.zeros = *Download<uint8_t>(*context_, zeros.data(), zeros.size());
    return Dequantize(quantized);
  }

  // Adds the ratio of the two errors for each of the linears that read `x`.
  void Compare(int64_t layer, const std::vector<std::string>& suffixes, int64_t dim,
               const float* x) {
    Matrix hessian(dim, dim);
    ASSERT_OK(kernels::Gram(
        {.n_tokens = kWindows * kWindow, .dim = dim, .x = x, .x_stride = dim, .h = hessian.data()},
        stream_));
    gptq::Options options = spec_.quantizer;
    options.group_size = 64;
    ASSERT_OK_AND_ASSIGN(const gptq::HessianFactor factor,
                         gptq::FactorizeHessian(hessian.Copy(), options, "linear"));
    // Another rung of the ladder, or dead columns, would be another problem.
    ASSERT_EQ(factor.damp, options.damp);
    ASSERT_EQ(factor.dead_columns, 0);
    for (const std::string& suffix : suffixes) {
      const std::string name = LayerTensor(layer, suffix + ".weight");
      ASSERT_OK_AND_ASSIGN(const Matrix w, checkpoint_->Read(name));
      ASSERT_OK_AND_ASSIGN(const gptq::QuantizedLinear cpu,
                           gptq::QuantizeLinear(name, w, factor, options, pool_));
      const double on_cpu = RelativeError(w, cpu.dequantized, hessian);
      const double on_device = RelativeError(w, QuantizeOnDevice(w, hessian, options), hessian);
      EXPECT_NEAR(on_device / on_cpu, 1.0, 0.01) << name << ", error " << on_cpu << " on the CPU";
      log_ratios_.push_back(std::log(on_device / on_cpu));
    }
  }

  void CompareAllLinears(int bits) {
    spec_.quantizer.bits = bits;
    const int64_t n = kWindows * kWindow;
    const ForwardContext forward = ForwardContext::Create(config(), stream_);
    ForwardScratch scratch;
    scratch.Reserve(config(), n);
    std::vector<int32_t> positions;
    std::vector<SequenceSlice> sequences;
    for (int64_t row = 0; row < n; ++row) positions.push_back(static_cast<int32_t>(row % kWindow));
    for (int64_t row = 0; row < n; row += kWindow) {
      sequences.push_back({row, kWindow, 0, scratch.k.row(row), scratch.v.row(row)});
    }
    Matrix hidden(n, config().hidden);
    ASSERT_OK_AND_ASSIGN(const Matrix embedding, checkpoint_->Read(std::string(kEmbeddingTensor)));
    for (int64_t row = 0; row < n; ++row) {
      std::copy_n(embedding.row(ids_[static_cast<size_t>(row)]), config().hidden, hidden.row(row));
    }
    for (int64_t l = 0; l < config().n_layers; ++l) {
      ASSERT_OK_AND_ASSIGN(const DecoderLayer layer, LoadDenseLayer(*checkpoint_, l));
      float* x = scratch.normed.data();
      ASSERT_OK(AttentionInput(forward, layer, hidden.data(), n, x));
      Compare(l, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, config().hidden, x);
      ASSERT_OK(Project(forward, layer, x, positions, scratch.q.data(), scratch.k.data(),
                        scratch.v.data()));
      ASSERT_OK(Attend(forward, layer, scratch.q.data(), sequences, scratch.attended.data()));
      Compare(l, {"self_attn.o_proj"}, config().q_width(), scratch.attended.data());
      ASSERT_OK(AttentionOutput(forward, layer, scratch.attended.data(), n, hidden.data(),
                                scratch.out.data()));
      ASSERT_OK(MlpInput(forward, layer, hidden.data(), n, x));
      Compare(l, {"mlp.gate_proj", "mlp.up_proj"}, config().hidden, x);
      ASSERT_OK(MlpActivation(forward, layer, x, n, scratch.gate.data(), scratch.up.data()));
      Compare(l, {"mlp.down_proj"}, config().intermediate, scratch.gate.data());
      ASSERT_OK(
          MlpOutput(forward, layer, scratch.gate.data(), n, hidden.data(), scratch.out.data()));
    }
    double mean = 0, furthest = 0;
    for (const double ratio : log_ratios_) {
      mean += ratio / static_cast<double>(log_ratios_.size());
      furthest = std::max(furthest, std::abs(std::expm1(ratio)));
    }
    std::printf(
        "%d bits, %zu linears from the same Hessians: errors of device / CPU %.5f in the "
        "geometric mean, furthest from one by %.5f\n",
        bits, log_ratios_.size(), std::exp(mean), furthest);
  }

  std::unique_ptr<Context> context_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::vector<int32_t> ids_;
  std::vector<double> log_ratios_;
  ThreadPool pool_{ThreadPool::HardwareThreads()};
  const kernels::Stream stream_{kernels::Backend::kCpu, &pool_};
};

TEST_F(SameHessianTest, FourBits) { CompareAllLinears(4); }
TEST_F(SameHessianTest, TwoBits) { CompareAllLinears(2); }

// Whole jobs. A rounding that falls the other way moves all that follows, so that two equally good
// runs differ in perplexity by 1 % at 4 bits and 4 % at 2 bits: what is compared is the mean over
// seeds of the rotation's signs.
class SmolLm2GpuTest : public SmolLm2Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCudaBackend(0);
    if (!backend.ok()) GTEST_SKIP() << "no GPU: " << backend.status().message();
    cuda_ = *std::move(backend);
    SmolLm2Test::SetUp();
    if (IsSkipped()) return;
    // The options of tests/golden/pipeline/make_smollm2_cpu_jobs.py.
    spec_.quantizer.group_size = 64;
    spec_.rotation_signs = true;
    spec_.n_calibration_windows = 16;
    spec_.sequence_length = 1024;
    EvaluateOnWikiText2();
    spec_.n_evaluation_windows = 8;
    spec_.evaluation_length = 2048;
    const std::string text = testing::GoldenFile("pipeline/smollm2_cpu_jobs.json");
    ASSERT_FALSE(text.empty());
    golden_ = nlohmann::json::parse(text);
  }

  void ExpectAsGoodAsTheCpu(int bits, double limit) {
    spec_.quantizer.bits = bits;
    ThreadPool pool(ThreadPool::HardwareThreads());
    std::vector<double> log_ratios;
    double mean = 0, error_ratio = 0;
    for (const nlohmann::json& cpu : golden_["runs"]) {
      if (cpu["bits"] != bits) continue;
      spec_.seed = cpu["seed"];
      ASSERT_OK_AND_ASSIGN(const JobReport cuda,
                           RunJob(spec_, *cuda_, pool, testing::IgnoreProgress));
      std::filesystem::remove_all(spec_.output_directory);
      const double before = golden_["perplexity_before"];
      EXPECT_NEAR(cuda.perplexity_before / before, 1.0, 0.002);
      log_ratios.push_back(std::log(cuda.perplexity_after / cpu["perplexity"].get<double>()));
      double log_error = 0;
      for (const LinearReport& linear : cuda.linears) {
        log_error += std::log(linear.relative_error) / static_cast<double>(cuda.linears.size());
      }
      error_ratio += log_error - std::log(cpu["error"].get<double>());
    }
    const auto n = static_cast<double>(log_ratios.size());
    ASSERT_GE(n, 8);
    for (const double ratio : log_ratios) mean += ratio / n;
    double squares = 0;
    for (const double ratio : log_ratios) squares += (ratio - mean) * (ratio - mean);
    const double standard_error = std::sqrt(squares / (n - 1) / n);
    std::printf(
        "%d bits, %.0f seeds: perplexity on the device %+.2f %% of the CPU's, standard error %.2f; "
        "errors of linears %+.2f %%\n",
        bits, n, 100 * std::expm1(mean), 100 * standard_error, 100 * std::expm1(error_ratio / n));
    EXPECT_LE(std::abs(mean), limit + 2 * standard_error);
    // Or too little could be told.
    EXPECT_LE(standard_error, 1.5 * limit);
    EXPECT_NEAR(std::exp(error_ratio / n), 1.0, 0.01);
  }

  std::unique_ptr<Backend> cuda_;
  nlohmann::json golden_;
};

TEST_F(SmolLm2GpuTest, FourBits) { ExpectAsGoodAsTheCpu(4, 0.005); }
TEST_F(SmolLm2GpuTest, TwoBits) { ExpectAsGoodAsTheCpu(2, 0.02); }

}  // namespace
}  // namespace walsh::pipeline
