// Forward passes of SmolLM2-135M's shape with random weights: what decoding reads against the read
// bandwidth measured in turns with it, and the arithmetic of prompts.
//
// Counted as read: the packed weights of all layers and the 8-bit head, once for each pass,
// whatever the number of sequences; not the keys and values.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <numeric>
#include <random>

#include "common/check.h"
#include "tests/bench/bandwidth.h"
#include "worker/model/decoder_layer.h"

namespace walsh::bench {
namespace {

using kernels::PackedMatrix;

ThreadPool& Pool() {
  static ThreadPool pool([] {
    const char* text = std::getenv("WALSH_BENCH_THREADS");
    return text == nullptr ? ThreadPool::HardwareThreads() : std::atoi(text);
  }());
  return pool;
}

ModelConfig SmolLm2() {
  ModelConfig config;
  config.hidden = 576;
  config.intermediate = 1536;
  config.n_layers = 30;
  config.n_heads = 9;
  config.n_kv_heads = 3;
  config.head_dim = 64;
  config.vocab = 49152;
  config.rope_theta = 100000.0;
  return config;
}

Matrix RandomMatrix(int64_t rows, int64_t cols, uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-0.05f, 0.05f);
  Matrix m(rows, cols);
  for (float& value : m.span()) value = uniform(generator);
  return m;
}

// Round-to-nearest codes of random weights: speed does not depend on how they were chosen.
PackedMatrix RandomPacked(int64_t rows, int64_t cols, int bits, uint32_t seed) {
  std::mt19937 generator(seed);
  QuantizedMatrix m{.rows = rows, .cols = cols, .bits = bits, .group_size = 64};
  m.codes.resize(static_cast<size_t>(rows * cols));
  for (uint8_t& code : m.codes) code = static_cast<uint8_t>(generator() >> (32 - bits));
  m.scales.assign(static_cast<size_t>(rows * m.groups()), 0x1p-8f);
  m.zeros.resize(m.scales.size());
  for (uint8_t& zero : m.zeros) zero = static_cast<uint8_t>(generator() >> (32 - bits));
  absl::StatusOr<PackedMatrix> packed = PackedMatrix::Pack(m);
  WALSH_CHECK(packed.ok());
  return *std::move(packed);
}

struct Model {
  explicit Model(int model_bits) : bits(model_bits), config(SmolLm2()) {
    uint32_t seed = 0;
    const auto linear = [&](int64_t out, int64_t in) {
      auto packed = std::make_unique<PackedLinear>(RandomPacked(out, in, bits, ++seed));
      bytes += packed->size_bytes();
      return packed;
    };
    for (int64_t i = 0; i < config.n_layers; ++i) {
      DecoderLayer layer;
      layer.q_proj = linear(config.q_width(), config.hidden);
      layer.k_proj = linear(config.kv_width(), config.hidden);
      layer.v_proj = linear(config.kv_width(), config.hidden);
      layer.o_proj = linear(config.hidden, config.q_width());
      layer.gate_proj = linear(config.intermediate, config.hidden);
      layer.up_proj = linear(config.intermediate, config.hidden);
      layer.down_proj = linear(config.hidden, config.intermediate);
      layers.push_back(std::move(layer));
    }
    absl::StatusOr<PackedMatrix> packed =
        PackedMatrix::PackDense8(RandomMatrix(config.vocab, config.hidden, 99));
    WALSH_CHECK(packed.ok());
    head = std::make_unique<PackedLinear>(*std::move(packed));
    bytes += head->size_bytes();
  }

  int bits;
  ModelConfig config;
  std::vector<DecoderLayer> layers;
  std::unique_ptr<Linear> head;
  int64_t bytes = 0;
};

// The last model asked for, since building one takes a second.
const Model& ModelOf(int bits) {
  static std::unique_ptr<Model> model;
  if (model == nullptr || model->bits != bits) {
    model.reset();
    model = std::make_unique<Model>(bits);
  }
  return *model;
}

// `n_sequences` sequences with `n_past` tokens each take `n_rows` more, again and again.
class Pass {
 public:
  Pass(const Model& model, int64_t n_sequences, int64_t n_rows, int64_t n_past)
      : model_(model),
        context_(ForwardContext::Create(model.config, {.pool = &Pool()})),
        hidden_(RandomMatrix(n_sequences * n_rows, model.config.hidden, 1)),
        logits_(n_sequences, model.config.vocab) {
    for (int64_t s = 0; s < n_sequences; ++s) {
      for (int64_t row = 0; row < n_rows; ++row) {
        positions_.push_back(static_cast<int32_t>(n_past + row));
      }
      for (size_t layer = 0; layer < model.layers.size(); ++layer) {
        caches_.push_back(RandomMatrix(2 * (n_past + n_rows), model.config.kv_width(), 2));
      }
    }
    for (size_t layer = 0; layer < model.layers.size(); ++layer) {
      slices_.emplace_back();
      for (int64_t s = 0; s < n_sequences; ++s) {
        Matrix& cache = caches_[static_cast<size_t>(s) * model.layers.size() + layer];
        slices_.back().push_back({.first_row = s * n_rows,
                                  .n_rows = n_rows,
                                  .n_past = n_past,
                                  .keys = cache.data(),
                                  .values = cache.row(n_past + n_rows)});
      }
    }
  }

  void Run() {
    const int64_t n_tokens = hidden_.rows();
    const int64_t n_sequences = logits_.rows();
    Matrix hidden = hidden_.Copy();
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      WALSH_CHECK(ForwardLayer(context_, model_.layers[i], positions_, slices_[i], n_tokens,
                               hidden.data(), scratch_)
                      .ok());
    }
    // Only each sequence's last row needs logits; the first rows stand for them here.
    WALSH_CHECK(
        model_.head->Apply(hidden.data(), n_sequences, logits_.data(), context_.stream).ok());
  }

 private:
  const Model& model_;
  ForwardContext context_;
  ForwardScratch scratch_;
  Matrix hidden_;
  Matrix logits_;
  std::vector<int32_t> positions_;
  std::vector<Matrix> caches_;
  std::vector<std::vector<SequenceSlice>> slices_;
};

void BM_Decode(benchmark::State& state) {
  const Model& model = ModelOf(static_cast<int>(state.range(0)));
  const int64_t n_sequences = state.range(1);
  Pass pass(model, n_sequences, 1, state.range(2));
  ReadBandwidth bandwidth;
  pass.Run();
  bandwidth.Measure(Pool());
  std::vector<double> rates;
  std::vector<double> bandwidths;
  for (auto _ : state) {
    const double start = ClockSeconds(Pool());
    pass.Run();
    const double seconds = ClockSeconds(Pool()) - start;
    state.SetIterationTime(seconds);
    rates.push_back(1.0 / seconds);
    bandwidths.push_back(bandwidth.Measure(Pool()));
  }
  const double rate = Median(rates);
  state.counters["tok/s"] = rate * static_cast<double>(n_sequences);
  state.counters["MB"] = static_cast<double>(model.bytes) / 1e6;
  state.counters["GB/s"] = rate * static_cast<double>(model.bytes) / 1e9;
  state.counters["read_GB/s"] = Median(bandwidths) / 1e9;
  state.counters["share"] = rate * static_cast<double>(model.bytes) / Median(bandwidths);
}
BENCHMARK(BM_Decode)
    ->ArgNames({"bits", "sequences", "past"})
    ->ArgsProduct({{2, 3, 4, 8}, {1}, {32}})
    ->ArgsProduct({{4}, {1}, {256, 1024}})
    ->ArgsProduct({{4}, {2, 4, 8, 16}, {32}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

void BM_Prompt(benchmark::State& state) {
  const Model& model = ModelOf(static_cast<int>(state.range(0)));
  const int64_t n_tokens = state.range(1);
  Pass pass(model, 1, n_tokens, 0);
  pass.Run();
  std::vector<double> rates;
  for (auto _ : state) {
    const double start = ClockSeconds(Pool());
    pass.Run();
    const double seconds = ClockSeconds(Pool()) - start;
    state.SetIterationTime(seconds);
    rates.push_back(static_cast<double>(n_tokens) / seconds);
  }
  state.counters["tok/s"] = Median(rates);
}
BENCHMARK(BM_Prompt)
    ->ArgNames({"bits", "tokens"})
    ->ArgsProduct({{4}, {32, 128, 512, 2048}})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

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
