// Quantization of whole models of true shape on one GPU, compute only: seeded random weights, never
// zeros.
//
// Prints a Markdown table: seconds by kind of work summed over the layers, each beside its floor
// (FLOPs over the ceilings measured in this run), and the peak of device memory. Usage:
// cuda_layers_bench [model] [bits] [layers] [share of error propagation, or gptaq].
#include <cuda_runtime_api.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/pipeline/cuda/layer_quantizer.h"

namespace walsh::pipeline::cuda {
namespace {

using kernels::cuda::Convert;
using kernels::cuda::DeviceMemoryUse;
using kernels::cuda::Gemm;
using kernels::cuda::GemmFp32;
using kernels::cuda::GemmParams;
using kernels::cuda::ResetDeviceMemoryPeak;

void CheckOk(const absl::Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    std::exit(1);
  }
}

__device__ uint32_t Mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Normal values by Box and Muller from a counter.
__global__ void FillNormal(float* data, int64_t n, uint32_t seed, float sigma) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t a = Mix(static_cast<uint32_t>(i) ^ Mix(seed));
  const uint32_t b = Mix(a + 0x9e3779b9u + static_cast<uint32_t>(i >> 32));
  const float u = (static_cast<float>(a) + 1.0f) * 2.3283064e-10f;
  const float v = static_cast<float>(b) * 2.3283064e-10f;
  data[i] = sigma * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

DeviceBuffer<float> Normal(Context& context, int64_t n, uint32_t seed, float sigma) {
  auto buffer = DeviceBuffer<float>::Allocate(n, context.stream());
  CheckOk(buffer.status());
  FillNormal<<<static_cast<unsigned>((n + 255) / 256), 256, 0, context.stream()>>>(buffer->data(),
                                                                                   n, seed, sigma);
  return *std::move(buffer);
}

double GemmRate(Context& context, bool fp32) {
  const int64_t n = 8192;
  auto a = Normal(context, n * n, 1, 1.0f);
  auto b = Normal(context, n * n, 2, 1.0f);
  auto c = Normal(context, n * n, 3, 1.0f);
  auto ah = DeviceBuffer<bf16>::Allocate(n * n, context.stream());
  auto bh = DeviceBuffer<bf16>::Allocate(n * n, context.stream());
  CheckOk(Convert<float, bf16>(context, n * n, a.data(), ah->data()));
  CheckOk(Convert<float, bf16>(context, n * n, b.data(), bh->data()));
  cudaEvent_t begin;
  cudaEvent_t end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  double best = 0;
  for (int i = 0; i < 4; ++i) {
    cudaEventRecord(begin, context.stream());
    CheckOk(fp32 ? GemmFp32(context, {.n_tokens = n,
                                      .in = n,
                                      .out = n,
                                      .x = a.data(),
                                      .weights = b.data(),
                                      .y = c.data()})
                 : Gemm(context, GemmParams<float>{.n_tokens = n,
                                                   .in = n,
                                                   .out = n,
                                                   .x = ah->data(),
                                                   .weights = bh->data(),
                                                   .y = c.data()}));
    cudaEventRecord(end, context.stream());
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    best = std::max(best, 2.0 * n * n * n / ms / 1e9);
  }
  return best;
}

struct Model {
  const char* name;
  LayerShape shape;
  int n_layers;
  int64_t group_size;
};

int Main(int argc, char** argv) {
  auto created = Context::Create(0);
  if (!created.ok()) {
    std::printf("skipped: %s\n", std::string(created.status().message()).c_str());
    return 0;
  }
  Context& context = **created;
  const std::vector<Model> models = {
      {"SmolLM2-135M", {576, 1536, 9, 3, 64}, 30, 64},
      {"Qwen2.5-1.5B", {1536, 8960, 12, 2, 128}, 28, 128},
      {"Llama-2-7B", {4096, 11008, 32, 32, 128}, 32, 128},
      {"Llama-3-8B", {4096, 14336, 32, 8, 128}, 32, 128},
      {"Llama-3-70B", {8192, 28672, 64, 8, 128}, 80, 128},
  };
  const std::string wanted = argc > 1 ? argv[1] : "Llama-2-7B";
  const int bits = argc > 2 ? std::atoi(argv[2]) : 2;
  const int layer_limit = argc > 3 ? std::atoi(argv[3]) : 1000;
  const bool is_gptaq = argc > 4 && std::strcmp(argv[4], "gptaq") == 0;
  const double propagation = argc > 4 ? std::atof(argv[4]) : gptq::Options().error_propagation;
  const double bf16_rate = GemmRate(context, false);
  const double fp32_rate = GemmRate(context, true);
  for (const Model& model : models) {
    if (wanted != "all" && wanted != model.name) continue;
    const LayerShape& s = model.shape;
    const int n_layers = std::min(model.n_layers, layer_limit);
    LayerQuantizerOptions options;
    options.gptq.bits = bits;
    options.gptq.error_propagation = propagation;
    if (is_gptaq) options.gptq.method = gptq::Method::kGptaq;
    options.group_size = model.group_size;
    options.n_windows = 128;
    options.window = 2048;
    std::vector<float> frequencies(static_cast<size_t>(s.head_dim / 2));
    for (size_t i = 0; i < frequencies.size(); ++i) {
      frequencies[i] = static_cast<float>(
          std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(s.head_dim)));
    }
    ResetDeviceMemoryPeak();
    auto quantizer = LayerQuantizer::Create(&context, s, options, frequencies);
    CheckOk(quantizer.status());
    const int64_t n_tokens = options.n_windows * options.window;
    FillNormal<<<static_cast<unsigned>((n_tokens * s.hidden + 255) / 256), 256, 0,
                 context.stream()>>>((*quantizer)->hidden(), n_tokens * s.hidden, 7, 1.0f);
    double wall = 0;
    double error = 0;
    double output = 0;
    for (int layer = 0; layer < n_layers; ++layer) {
      const auto seed = static_cast<uint32_t>(layer * 16);
      const auto sigma = [](int64_t in) { return 1.0f / std::sqrt(static_cast<float>(in)); };
      DeviceLayer<float> weights;
      weights.qkv = Normal(context, s.qkv_rows() * s.hidden, seed, sigma(s.hidden));
      weights.o = Normal(context, s.hidden * s.q_width(), seed + 1, sigma(s.q_width()) * 0.1f);
      weights.gate_up = Normal(context, 2 * s.intermediate * s.hidden, seed + 2, sigma(s.hidden));
      weights.down =
          Normal(context, s.hidden * s.intermediate, seed + 3, sigma(s.intermediate) * 0.1f);
      CheckOk(context.Synchronize());
      const auto begin = std::chrono::steady_clock::now();
      CheckOk((*quantizer)
                  ->QuantizeLayer(
                      "layer", weights, /*bits=*/{}, /*is_last=*/layer + 1 == n_layers,
                      [](LayerQuantizer::Step) { return absl::OkStatus(); },
                      [&](QuantizedSet set) -> absl::Status {
                        for (const double e : set.row_error) error += e;
                        for (const double e : set.row_output) output += e;
                        if (!set.fallback.empty())
                          std::printf("fallback: %s\n", set.fallback.c_str());
                        return absl::OkStatus();
                      }));
      CheckOk(context.Synchronize());
      wall += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
    const LayerTimes& total = (*quantizer)->times();
    const auto d = [](int64_t x) { return static_cast<double>(x); };
    const double n = d(n_tokens);
    const double layers = n_layers;
    const double qkv_rows = d(s.q_width() + 2 * s.kv_width());
    const double hidden = d(s.hidden);
    const double q_width = d(s.q_width());
    const double inter = d(s.intermediate);
    const double params = qkv_rows * hidden + hidden * q_width + 3 * hidden * inter;
    const double forward = 2 * params * n * layers / bf16_rate / 1e12;
    const double attention = 4 * n * d(options.window) / 2 * q_width * layers / bf16_rate / 1e12;
    const double squares = 2 * hidden * hidden + q_width * q_width + inter * inter;
    const double hessian = n * squares * layers / bf16_rate / 1e12;
    // The original flow, the full sums of input differences, and W D (H + λI)⁻¹ by triangular
    // products, or GPTAQ's correction by those above the diagonal and as many updates again.
    const bool propagates = gptq::PropagatesError(options.gptq);
    const bool follows_original = gptq::NeedsOriginalInputs(options.gptq);
    const double original = follows_original ? forward + attention : 0;
    const double cross = follows_original ? 2 * hessian : 0;
    const double cubes = 2 * std::pow(hidden, 3) + std::pow(q_width, 3) + std::pow(inter, 3);
    const double factor = 2.0 / 3.0 * cubes * layers / fp32_rate / 1e12;
    const double correction = is_gptaq ? factor : 0;
    const double updates = (is_gptaq ? 2 : 1) *
                           (qkv_rows * hidden * hidden + hidden * q_width * q_width +
                            2 * inter * hidden * hidden + hidden * inter * inter) *
                           layers / fp32_rate / 1e12;
    const double target = propagates ? 4 * updates : 0;
    std::printf(
        "\n%s, %d layers, %d bits, group %lld, %s %g, 128 x 2048 tokens; GPU %s; "
        "ceilings of this run: "
        "bf16 %.0f, fp32 %.1f TFLOP/s\n\n",
        model.name, n_layers, bits, static_cast<long long>(model.group_size),
        is_gptaq ? "GPTAQ" : "error propagation", is_gptaq ? options.gptq.gptaq_alpha : propagation,
        context.properties().name, bf16_rate, fp32_rate);
    std::printf("| step | seconds | floor | ratio |\n| --- | ---: | ---: | ---: |\n");
    const auto row = [](const char* what, double seconds, double floor) {
      if (floor > 0) {
        std::printf("| %s | %.3f | %.3f | %.2f |\n", what, seconds, floor, seconds / floor);
      } else {
        std::printf("| %s | %.3f | | |\n", what, seconds);
      }
    };
    row("forward (linears, norms, RoPE, SiLU)", total.forward_ms / 1e3, forward);
    row("attention", total.attention_ms / 1e3, attention);
    row("original flow", total.original_ms / 1e3, original);
    row("Hessian", total.hessian_ms / 1e3, hessian);
    row("sums of input differences", total.cross_ms / 1e3, cross);
    row("factorization", total.factor_ms / 1e3, factor);
    row("error-propagated target", total.propagate_ms / 1e3, target);
    row("GPTAQ's correction", total.correct_ms / 1e3, correction);
    row("column loop with clip search", total.columns_ms / 1e3, updates);
    row("error report", total.report_ms / 1e3, 0);
    row("other", total.other_ms / 1e3, 0);
    row("all, wall", wall,
        forward + attention + original + hessian + cross + factor + target + correction + updates);
    std::printf("\npeak device memory %.2f GB (estimate %.2f GB); relative output error %.4f\n",
                d(DeviceMemoryUse().bytes_peak) / 1e9,
                d(LayerQuantizer::BytesNeeded(s, options) + 4 * static_cast<int64_t>(params)) / 1e9,
                error / output);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace walsh::pipeline::cuda

int main(int argc, char** argv) { return walsh::pipeline::cuda::Main(argc, argv); }
