// Times of the quantizer's steps on one GPU, each beside its floor measured in the same run.
//
// Protocol: seeded random normal inputs (never zeros), 3 warm-ups, median and range of 7 runs by
// events. Prints a Markdown table.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "worker/kernels/cuda/blas_of_real.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/gptq.h"

namespace walsh::kernels::cuda {
namespace {

struct Timing {
  double median_ms = 0;
  double min_ms = 0;
  double max_ms = 0;
};

void CheckOk(const absl::Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    std::exit(1);
  }
}

Timing Time(cudaStream_t stream, const std::function<void()>& run, int n_runs = 7) {
  for (int i = 0; i < 3; ++i) run();
  std::vector<double> ms;
  cudaEvent_t begin;
  cudaEvent_t end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  for (int i = 0; i < n_runs; ++i) {
    cudaEventRecord(begin, stream);
    run();
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    float elapsed = 0;
    cudaEventElapsedTime(&elapsed, begin, end);
    ms.push_back(elapsed);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(ms.begin(), ms.end());
  return {ms[ms.size() / 2], ms.front(), ms.back()};
}

template <typename T>
DeviceBuffer<T> Filled(Context& context, int64_t n, uint32_t seed, float sigma) {
  // A pseudo-random tile repeated: filling gigabytes with normals on the host would take longer
  // than the benchmark.
  const int64_t tile = std::min<int64_t>(n, 1 << 22);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<T> host(static_cast<size_t>(tile));
  for (T& x : host) x = static_cast<T>(normal(generator));
  auto buffer = DeviceBuffer<T>::Allocate(n, context.stream());
  CheckOk(buffer.status());
  for (int64_t i = 0; i < n; i += tile) {
    const auto bytes = static_cast<size_t>(std::min(tile, n - i)) * sizeof(T);
    cudaMemcpyAsync(buffer->data() + i, host.data(), bytes, cudaMemcpyHostToDevice,
                    context.stream());
  }
  CheckOk(context.Synchronize());
  return *std::move(buffer);
}

DeviceBuffer<float> Zeros(Context& context, int64_t n) {
  auto buffer = DeviceBuffer<float>::Allocate(n, context.stream());
  CheckOk(buffer.status());
  cudaMemsetAsync(buffer->data(), 0, static_cast<size_t>(buffer->size_bytes()), context.stream());
  return *std::move(buffer);
}

void Row(const std::string& what, const Timing& t, const std::string& rate) {
  std::printf("| %s | %.3f | %.3f–%.3f | %s |\n", what.c_str(), t.median_ms, t.min_ms, t.max_ms,
              rate.c_str());
  std::fflush(stdout);
}

std::string Format(const char* format, double a, double b = 0) {
  char text[128];
  std::snprintf(text, sizeof(text), format, a, b);
  return text;
}

int Main() {
  auto created = Context::Create(0);
  if (!created.ok()) {
    std::printf("skipped: %s\n", std::string(created.status().message()).c_str());
    return 0;
  }
  Context& context = **created;
  std::printf("GPU: %s, %d SMs\n\n", context.properties().name,
              context.properties().multiProcessorCount);
  std::printf("| step | median ms | range | rate |\n| --- | ---: | ---: | --- |\n");
  const cudaStream_t stream = context.stream();
  int clock_khz = 0;  // the highest: what a kernel ran at is not known here
  cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, context.device());

  double copy_rate = 0;
  {
    const int64_t n = int64_t{1} << 30;
    auto a = Filled<float>(context, n / 4, 1, 1.0f);
    auto b = Filled<float>(context, n / 4, 2, 1.0f);
    const Timing t = Time(stream, [&] {
      cudaMemcpyAsync(b.data(), a.data(), static_cast<size_t>(n), cudaMemcpyDeviceToDevice, stream);
    });
    copy_rate = 2.0 * static_cast<double>(n) / t.median_ms / 1e6;
    Row("ceiling: device copy, 1 GiB", t, Format("%.0f GB/s read + write", copy_rate));
  }
  double bf16_rate = 0;
  {
    const int64_t n = 8192;
    auto x = Filled<bf16>(context, n * n, 1, 1.0f);
    auto w = Filled<bf16>(context, n * n, 2, 1.0f);
    auto y = Filled<bf16>(context, n * n, 3, 1.0f);
    const Timing t = Time(stream, [&] {
      CheckOk(Gemm(context, GemmParams<bf16>{.n_tokens = n,
                                             .in = n,
                                             .out = n,
                                             .x = x.data(),
                                             .weights = w.data(),
                                             .y = y.data()}));
    });
    bf16_rate = 2.0 * n * n * n / t.median_ms / 1e9;
    Row("ceiling: bf16 GEMM 8192³", t, Format("%.0f TFLOP/s", bf16_rate));
  }
  double fp32_rate = 0;
  {
    const int64_t n = 8192;
    auto x = Filled<float>(context, n * n, 1, 1.0f);
    auto w = Filled<float>(context, n * n, 2, 1.0f);
    auto y = Filled<float>(context, n * n, 3, 1.0f);
    const Timing t = Time(
        stream,
        [&] {
          CheckOk(GemmFp32(context, {.n_tokens = n,
                                     .in = n,
                                     .out = n,
                                     .x = x.data(),
                                     .weights = w.data(),
                                     .y = y.data()}));
        },
        3);
    fp32_rate = 2.0 * n * n * n / t.median_ms / 1e9;
    Row("ceiling: fp32 GEMM 8192³", t, Format("%.1f TFLOP/s", fp32_rate));
  }
  double fp64_rate = 0;
  {
    const int n = 8192;
    auto x = Filled<double>(context, int64_t{n} * n, 1, 1.0f);
    auto w = Filled<double>(context, int64_t{n} * n, 2, 1.0f);
    auto y = Filled<double>(context, int64_t{n} * n, 3, 1.0f);
    const Timing t = Time(
        context.side(),
        [&] {
          const cublasStatus_t status = Gemm(context.side_blas(), CUBLAS_OP_N, CUBLAS_OP_N, n, n, n,
                                             1.0, x.data(), n, w.data(), n, 0.0, y.data(), n);
          if (status != CUBLAS_STATUS_SUCCESS) CheckOk(absl::InternalError("fp64 GEMM"));
        },
        3);
    fp64_rate = 2.0 * n * n * n / t.median_ms / 1e9;
    Row("ceiling: fp64 GEMM 8192³", t, Format("%.1f TFLOP/s", fp64_rate));
  }

  for (const int64_t dim : {576, 1536, 4096, 11008, 14336}) {
    const int64_t n = 32768;
    auto x = Filled<bf16>(context, n * dim, 1, 1.0f);
    auto h = Zeros(context, dim * dim);
    const Timing t = Time(stream, [&] {
      CheckOk(AccumulateGram(context, {.n_tokens = n, .dim = dim, .x = x.data(), .h = h.data()}));
    });
    const double full = 2.0 * static_cast<double>(n) * static_cast<double>(dim * dim);
    Row("Hessian " + std::to_string(dim) + ", 32768 tokens", t,
        Format("%.0f TFLOP/s counted as the full product, %.2f × the half's floor",
               full / t.median_ms / 1e9, t.median_ms / (full / 2 / bf16_rate / 1e9)));
    if (dim == 1536) continue;
    CheckOk(MirrorGram(context, dim, h.data()));
    std::vector<int32_t> order(static_cast<size_t>(dim));
    std::iota(order.begin(), order.end(), 0);
    auto perm = DeviceBuffer<int32_t>::Allocate(dim, stream);
    CheckOk(perm.status());
    cudaMemcpyAsync(perm->data(), order.data(), order.size() * 4, cudaMemcpyHostToDevice, stream);
    auto add = DeviceBuffer<float>::Allocate(dim, stream);
    CheckOk(add.status());
    std::vector<float> damping(static_cast<size_t>(dim), 0.01f * 32768 * 10);
    cudaMemcpyAsync(add->data(), damping.data(), damping.size() * 4, cudaMemcpyHostToDevice,
                    stream);
    auto u = Filled<float>(context, dim * dim, 4, 1.0f);
    CheckOk(context.Synchronize());
    const double d = static_cast<double>(dim);
    for (const bool in_double : {false, true}) {
      const auto factor = [&] {
        CheckOk(FactorHessian(context, {.dim = dim,
                                        .h = h.data(),
                                        .perm = perm->data(),
                                        .diagonal_add = add->data(),
                                        .u = u.data(),
                                        .in_double = in_double}));
      };
      const Timing f = Time(context.side(), factor, 3);
      const double rate = in_double ? fp64_rate : fp32_rate;
      Row("factor of H⁻¹" + std::string(in_double ? " in double, " : ", ") + std::to_string(dim), f,
          Format("%.2f × the floor of 2/3·n³ at the rate of that GEMM",
                 f.median_ms / (2.0 / 3.0 * d * d * d / rate / 1e9)));
    }
    if (dim == 14336 || dim == 576) continue;
    const int64_t rows = 4096;
    auto w = Filled<float>(context, rows * dim, 5, 0.02f);
    auto codes = DeviceBuffer<uint8_t>::Allocate(rows * dim, stream);
    auto zeros = DeviceBuffer<uint8_t>::Allocate(rows * dim / 32, stream);
    auto scales = DeviceBuffer<float>::Allocate(rows * dim / 32, stream);
    auto loss = DeviceBuffer<float>::Allocate(rows, stream);
    // Two special functions a weight and clip step, 16 a clock and multiprocessor. The search is
    // below this where it cuts rounds short that have lost.
    const double clip_floor_ms =
        2.0 * 80 * static_cast<double>(rows) * d /
        (16.0 * context.properties().multiProcessorCount * static_cast<double>(clock_khz));
    for (const int bits : {2, 4}) {
      const auto columns = [&](bool clip) {
        return Time(stream, [&] {
          CheckOk(QuantizeColumns(context, {.rows = rows,
                                            .cols = dim,
                                            .w = w.data(),
                                            .u = u.data(),
                                            .perm = perm->data(),
                                            .bits = bits,
                                            .group_size = 128,
                                            .mse_clip = clip,
                                            .codes = codes->data(),
                                            .scales = scales->data(),
                                            .zeros = zeros->data(),
                                            .loss = loss->data()}));
        });
      };
      const std::string what =
          "column loop 4096×" + std::to_string(dim) + ", " + std::to_string(bits) + " bits, ";
      const double floor_ms = static_cast<double>(rows) * d * d / fp32_rate / 1e9;
      const auto against_updates = [&](const Timing& timing) {
        return Format("%.2f × the floor of the updates at the fp32 rate",
                      timing.median_ms / floor_ms);
      };
      const Timing plain = columns(false);
      Row(what + "no clip search", plain, against_updates(plain));
      const Timing clipped = columns(true);
      Row(what + "clip search", clipped, against_updates(clipped));
      const Timing search{.median_ms = clipped.median_ms - plain.median_ms,
                          .min_ms = clipped.min_ms - plain.max_ms,
                          .max_ms = clipped.max_ms - plain.min_ms};
      Row(what + "clip search alone (difference)", search,
          Format("%.2f × the floor of its special functions at %.2f GHz",
                 search.median_ms / clip_floor_ms, static_cast<double>(clock_khz) / 1e6));
    }
    const Timing rtn = Time(stream, [&] {
      CheckOk(QuantizeColumns(context, {.rows = rows,
                                        .cols = dim,
                                        .w = w.data(),
                                        .perm = perm->data(),
                                        .bits = 4,
                                        .group_size = 128,
                                        .codes = codes->data(),
                                        .scales = scales->data(),
                                        .zeros = zeros->data()}));
    });
    Row("round to nearest 4096×" + std::to_string(dim) + ", 4 bits, clip search", rtn, "");
  }

  for (const int64_t head_dim : {64, 128}) {
    const int64_t window = 2048;
    const int64_t windows = 8;
    const int64_t heads = 4096 / head_dim;
    const int64_t n = window * windows * 4096;
    auto q = Filled<bf16>(context, n, 1, 1.0f);
    auto k = Filled<bf16>(context, n, 2, 1.0f);
    auto v = Filled<bf16>(context, n, 3, 1.0f);
    auto y = Filled<bf16>(context, n, 4, 1.0f);
    const Timing t = Time(stream, [&] {
      CheckOk(WindowAttention(context, WindowAttentionParams<bf16>{.n_windows = windows,
                                                                   .window = window,
                                                                   .n_heads = heads,
                                                                   .n_kv_heads = heads,
                                                                   .head_dim = head_dim,
                                                                   .q = q.data(),
                                                                   .k = k.data(),
                                                                   .v = v.data(),
                                                                   .y = y.data()}));
    });
    const double flop = 4.0 * static_cast<double>(windows * heads) *
                        static_cast<double>(window * window) / 2 * static_cast<double>(head_dim);
    Row("causal attention, 8 × 2048 tokens, head_dim " + std::to_string(head_dim), t,
        Format("%.0f TFLOP/s", flop / t.median_ms / 1e9));
  }
  return 0;
}

}  // namespace
}  // namespace walsh::kernels::cuda

int main() { return walsh::kernels::cuda::Main(); }
