// The CPU's operations against what bounds them: bytes read against the read bandwidth measured
// around the same benchmark, or operations per second.
//
//   flock … build/bench/bench/cpu_kernels_bench --benchmark_filter=Packed
//
// Threads: WALSH_BENCH_THREADS, else all that the machine grants. Weights rotate through sets of at
// least 300 MB, so that no cache holds them from one pass to the next.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "common/check.h"
#include "tests/bench/bandwidth.h"
#include "worker/kernels/kernels.h"

namespace walsh::bench {
namespace {

using kernels::PackedMatrix;

constexpr int64_t kWeightSetBytes = int64_t{300} << 20;

ThreadPool& Pool() {
  static ThreadPool pool([] {
    const char* text = std::getenv("WALSH_BENCH_THREADS");
    return text == nullptr ? ThreadPool::HardwareThreads() : std::atoi(text);
  }());
  return pool;
}

ReadBandwidth& Bandwidth() {
  static ReadBandwidth bandwidth;
  return bandwidth;
}

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = uniform(generator);
  return values;
}

// Runs the loop of `state` in turns with passes of the bandwidth measurement and reports the
// medians and their ratio. What else runs on the machine then disturbs both alike.
template <typename Body>
void RunAgainstBandwidth(benchmark::State& state, double bytes_per_iteration, const Body& body) {
  std::vector<double> rates;
  std::vector<double> bandwidths;
  for (auto _ : state) {
    const double start = ClockSeconds(Pool());
    body();
    const double seconds = ClockSeconds(Pool()) - start;
    state.SetIterationTime(seconds);
    rates.push_back(bytes_per_iteration / seconds);
    bandwidths.push_back(Bandwidth().Measure(Pool()));
  }
  state.counters["GB/s"] = Median(rates) / 1e9;
  state.counters["read_GB/s"] = Median(bandwidths) / 1e9;
  state.counters["share"] = Median(rates) / Median(bandwidths);
}

// The same for arithmetic.
template <typename Body>
void RunCounting(benchmark::State& state, double operations_per_iteration, const Body& body) {
  std::vector<double> rates;
  for (auto _ : state) {
    const double start = ClockSeconds(Pool());
    body();
    const double seconds = ClockSeconds(Pool()) - start;
    state.SetIterationTime(seconds);
    rates.push_back(operations_per_iteration / seconds);
  }
  state.counters["GOP/s"] = Median(rates) / 1e9;
}

void BM_ReadBandwidth(benchmark::State& state) {
  RunAgainstBandwidth(state, static_cast<double>(ReadBandwidth::SizeBytes()),
                      [] { Bandwidth().Measure(Pool()); });
}
BENCHMARK(BM_ReadBandwidth)->UseManualTime()->Unit(benchmark::kMillisecond);

void BM_Matmul(benchmark::State& state) {
  const int64_t n_tokens = state.range(0);
  const int64_t in = state.range(1);
  const int64_t out = state.range(2);
  const auto x = Random(n_tokens * in, 1);
  const auto weights = Random(out * in, 2);
  std::vector<float> y(static_cast<size_t>(n_tokens * out));
  RunCounting(state, 2.0 * static_cast<double>(n_tokens * in * out), [&] {
    WALSH_CHECK(kernels::Matmul({.n_tokens = n_tokens,
                                 .in = in,
                                 .out = out,
                                 .x = x.data(),
                                 .x_stride = in,
                                 .weights = weights.data(),
                                 .y = y.data(),
                                 .y_stride = out},
                                {.pool = &Pool()})
                    .ok());
  });
}
BENCHMARK(BM_Matmul)
    ->ArgNames({"tokens", "in", "out"})
    ->ArgsProduct({{1, 8, 128, 1024}, {576}, {576, 1536}})
    ->Args({1024, 1536, 576})
    ->Args({2048, 2048, 2048})
    ->UseManualTime();

void BM_Gram(benchmark::State& state) {
  const int64_t n_tokens = state.range(0);
  const int64_t dim = state.range(1);
  const auto x = Random(n_tokens * dim, 1);
  std::vector<float> h(static_cast<size_t>(dim * dim));
  // Half of a full product's operations are enough.
  RunCounting(state, static_cast<double>(n_tokens * dim * dim), [&] {
    WALSH_CHECK(
        kernels::Gram(
            {.n_tokens = n_tokens, .dim = dim, .x = x.data(), .x_stride = dim, .h = h.data()},
            {.pool = &Pool()})
            .ok());
  });
}
BENCHMARK(BM_Gram)
    ->ArgNames({"tokens", "dim"})
    ->Args({512, 576})
    ->Args({2048, 576})
    ->Args({2048, 1536})
    ->UseManualTime();

void BM_AttentionPrompt(benchmark::State& state) {
  const int64_t n = state.range(0);
  const int64_t heads = state.range(1);
  const int64_t kv_heads = state.range(2);
  constexpr int64_t kHeadDim = 64;
  const auto q = Random(n * heads * kHeadDim, 1);
  const auto k = Random(n * kv_heads * kHeadDim, 2);
  const auto v = Random(n * kv_heads * kHeadDim, 3);
  std::vector<float> y(q.size());
  RunCounting(state, 2.0 * static_cast<double>(n * n * heads * kHeadDim), [&] {
    WALSH_CHECK(kernels::Attention({.n_new = n,
                                    .n_heads = heads,
                                    .n_kv_heads = kv_heads,
                                    .head_dim = kHeadDim,
                                    .scale = 0.125f,
                                    .q = q.data(),
                                    .q_stride = heads * kHeadDim,
                                    .k = k.data(),
                                    .v = v.data(),
                                    .kv_stride = kv_heads * kHeadDim,
                                    .y = y.data(),
                                    .y_stride = heads * kHeadDim},
                                   {.pool = &Pool()})
                    .ok());
  });
}
BENCHMARK(BM_AttentionPrompt)
    ->ArgNames({"tokens", "heads", "kv_heads"})
    ->Args({512, 9, 3})
    ->Args({2048, 9, 3})
    ->Args({2048, 32, 8})
    ->UseManualTime();

// One new token over caches of 30 layers that together exceed every cache.
void BM_AttentionDecode(benchmark::State& state) {
  const int64_t n_past = state.range(0);
  constexpr int64_t kHeads = 9;
  constexpr int64_t kKvHeads = 3;
  constexpr int64_t kHeadDim = 64;
  constexpr int64_t kWidth = kKvHeads * kHeadDim;
  const int64_t layer_floats = (n_past + 1) * kWidth;
  const int64_t n_layers = std::max<int64_t>(30, kWeightSetBytes / (layer_floats * 8));
  std::vector<std::vector<float>> caches;
  for (int64_t i = 0; i < 2 * n_layers; ++i) {
    caches.push_back(Random(layer_floats, static_cast<uint32_t>(i)));
  }
  const auto q = Random(kHeads * kHeadDim, 1);
  std::vector<float> y(q.size());
  RunAgainstBandwidth(state, static_cast<double>(n_layers * layer_floats * 8), [&] {
    for (size_t i = 0; i < caches.size(); i += 2) {
      WALSH_CHECK(kernels::Attention({.n_new = 1,
                                      .n_past = n_past,
                                      .n_heads = kHeads,
                                      .n_kv_heads = kKvHeads,
                                      .head_dim = kHeadDim,
                                      .scale = 0.125f,
                                      .q = q.data(),
                                      .q_stride = kHeads * kHeadDim,
                                      .k = caches[i].data(),
                                      .v = caches[i + 1].data(),
                                      .kv_stride = kWidth,
                                      .y = y.data(),
                                      .y_stride = kHeads * kHeadDim},
                                     {.pool = &Pool()})
                      .ok());
    }
  });
}
BENCHMARK(BM_AttentionDecode)
    ->ArgName("past")
    ->Arg(128)
    ->Arg(1024)
    ->Arg(8192)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

PackedMatrix RandomPacked(int64_t rows, int64_t cols, int bits, int64_t group, uint32_t seed) {
  std::mt19937 generator(seed);
  QuantizedMatrix m;
  m.rows = rows;
  m.cols = cols;
  m.bits = bits;
  m.group_size = group;
  m.codes.resize(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < m.codes.size(); ++i) {
    m.codes[i] = static_cast<uint8_t>(generator() >> (32 - bits));
  }
  m.scales.assign(static_cast<size_t>(rows * m.groups()), 0x1p-8f);
  m.zeros.resize(m.scales.size());
  for (uint8_t& zero : m.zeros) zero = static_cast<uint8_t>(generator() >> (32 - bits));
  absl::StatusOr<PackedMatrix> packed = PackedMatrix::Pack(m);
  WALSH_CHECK(packed.ok());
  return *std::move(packed);
}

struct WeightSet {
  std::vector<PackedMatrix> matrices;
  int64_t bytes = 0;
};

// Enough different matrices of one shape to exceed the caches; kept until another is asked for.
const WeightSet& Weights(int64_t rows, int64_t cols, int bits, int64_t group) {
  static std::vector<int64_t> key;
  static WeightSet set;
  const std::vector<int64_t> wanted = {rows, cols, bits, group};
  if (key == wanted) return set;
  key = wanted;
  set = {};
  while (set.bytes < kWeightSetBytes) {
    set.matrices.push_back(
        RandomPacked(rows, cols, bits, group, static_cast<uint32_t>(set.matrices.size())));
    set.bytes += set.matrices.back().size_bytes();
  }
  return set;
}

void BM_PackedMatmul(benchmark::State& state) {
  const int64_t rows = state.range(0);
  const int64_t cols = state.range(1);
  const int bits = static_cast<int>(state.range(2));
  const int64_t n_tokens = state.range(3);
  const WeightSet& set = Weights(rows, cols, bits, 64);
  const auto x = Random(n_tokens * cols, 1);
  std::vector<float> y(static_cast<size_t>(n_tokens * rows));
  // At many tokens a part of the set is enough: arithmetic binds.
  const size_t n = n_tokens >= 64 ? std::min<size_t>(set.matrices.size(), 20) : set.matrices.size();
  double bytes = 0;
  for (size_t i = 0; i < n; ++i) bytes += static_cast<double>(set.matrices[i].size_bytes());
  RunAgainstBandwidth(state, bytes, [&] {
    for (size_t i = 0; i < n; ++i) {
      WALSH_CHECK(kernels::PackedMatmul({.n_tokens = n_tokens,
                                         .x = x.data(),
                                         .x_stride = cols,
                                         .weights = &set.matrices[i],
                                         .y = y.data(),
                                         .y_stride = rows},
                                        {.pool = &Pool()})
                      .ok());
    }
  });
  state.counters["GOP/s"] = state.counters["GB/s"] / bytes * 2.0 *
                            static_cast<double>(static_cast<int64_t>(n) * n_tokens * rows * cols);
}
void PackedShapes(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"rows", "cols", "bits", "tokens"});
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{576, 576},
                                   {1536, 576},
                                   {576, 1536},
                                   {2048, 2048},
                                   {8192, 2048}}) {
    for (const int64_t bits : {2, 3, 4, 8}) {
      for (const int64_t n_tokens : {1, 2, 4, 8, 16, 64, 256}) {
        if (n_tokens > 1 && rows != 2048 && rows != 1536) continue;
        benchmark->Args({rows, cols, bits, n_tokens});
      }
    }
  }
}
BENCHMARK(BM_PackedMatmul)->Apply(PackedShapes)->UseManualTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace walsh::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("backend", walsh::kernels::DescribeCpuBackend());
  benchmark::AddCustomContext("threads", std::to_string(walsh::bench::Pool().n_threads()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
