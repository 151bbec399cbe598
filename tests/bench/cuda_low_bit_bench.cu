// Products of a few tokens with quantized weights on one GPU, as a share of the read bandwidth that
// the same run measures, and beside cuBLAS in bf16.
//
//   cuda_low_bit_bench [--shapes="7B o,8B"] [--bits=2,2c,3,4,8] [--tokens=1,16] [--group=128]
//   [--norm] [--tune] [--large]
//
// --shapes takes parts of names. 2c is the codebook of 2 bits. With --tune every cut of the work is
// timed instead. With --norm the activations are fp32 and RMSNorm is part of the product. With
// --large it is LowBitGemm's products that are timed, beside those of weights that are dequantized
// to bf16 and multiplied by cuBLAS, and cuBLAS with weights that are bf16 already.
//
// Protocol: seeded random codes, scales and activations, never zeros; as many matrices of a shape
// as exceed 300 MB, so that none is in the L2 when its turn comes; a CUDA graph of 50 or more
// products, each with the next matrix, neighbours with different parts of shared memory; after a
// warm-up the median, least and most of 5 rounds, in which the ways to launch take turns.
// "overlapped" products are launched by programmatic dependent launch: the weights of the next are
// on their way while one ends. GB/s counts codes, scales and zeros once. Prints Markdown.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/low_bit_gemm.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/serving_layout.h"
#include "worker/kernels/cuda/token_tiles.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int64_t kBytesBeyondL2 = 300'000'000;
constexpr int kLaunchesMin = 50;
constexpr int kRounds = 5;
constexpr int kReplays = 10;

void CheckOk(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}
void CheckOk(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Random bits (splitmix64).
__global__ void FillBits(uint64_t* words, int64_t n, uint64_t seed) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint64_t z = seed + static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    words[i] = z ^ (z >> 31);
  }
}
// Numbers of ±[low, 2 low) of random bits, in place.
template <typename T>
__global__ void BitsToNumbers(T* values, int64_t n, float low) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const auto bits = *reinterpret_cast<const uint16_t*>(values + i);
    const float v = low * (1.0f + static_cast<float>(bits % 1024) / 1024.0f);
    values[i] = static_cast<T>(bits & 0x8000 ? -v : v);
  }
}
constexpr int kFillCtas = 1024;
constexpr int kFillThreads = 256;

template <typename T>
DeviceBuffer<T> RandomBits(Context& context, int64_t n, uint64_t seed) {
  const int64_t per_word = static_cast<int64_t>(sizeof(uint64_t) / sizeof(T));
  const int64_t n_words = (n + per_word - 1) / per_word;
  auto buffer = DeviceBuffer<T>::Allocate(n_words * per_word, context.stream());
  CheckOk(buffer.status());
  FillBits<<<kFillCtas, kFillThreads, 0, context.stream()>>>(
      reinterpret_cast<uint64_t*>(buffer->data()), n_words, seed);
  return *std::move(buffer);
}
template <typename T>
DeviceBuffer<T> RandomNumbers(Context& context, int64_t n, uint64_t seed, float low) {
  DeviceBuffer<T> buffer = RandomBits<T>(context, n, seed);
  BitsToNumbers<<<kFillCtas, kFillThreads, 0, context.stream()>>>(buffer.data(), n, low);
  return buffer;
}

// Reads everything once; the sum keeps the loads.
__global__ void __launch_bounds__(512) ReadAll(const uint4* data, int64_t n, uint32_t* out) {
  constexpr int kUnrolled = 8;
  uint32_t sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + (kUnrolled - 1) * step < n; i += kUnrolled * step) {
    uint4 v[kUnrolled];
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) v[k] = __ldcs(data + i + k * step);
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < n; i += step) sum ^= data[i].x;
  if (sum == 0x12345678u) *out = sum;
}

struct Timing {
  double median_us = 0;
  double min_us = 0;
  double max_us = 0;
};

// A graph of calls run(0), …, run(n − 1).
class Graph {
 public:
  Graph(cudaStream_t stream, int n, const std::function<void(int)>& run) : stream_(stream), n_(n) {
    cudaGraph_t graph = nullptr;
    CheckOk(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n; ++i) run(i);
    CheckOk(cudaStreamEndCapture(stream, &graph));
    CheckOk(cudaGraphInstantiate(&graph_, graph, 0));
    CheckOk(cudaGraphDestroy(graph));
    CheckOk(cudaEventCreate(&begin_));
    CheckOk(cudaEventCreate(&end_));
  }
  ~Graph() {
    cudaGraphExecDestroy(graph_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Microseconds of one of its calls.
  double Time(int replays) {
    CheckOk(cudaEventRecord(begin_, stream_));
    for (int i = 0; i < replays; ++i) CheckOk(cudaGraphLaunch(graph_, stream_));
    CheckOk(cudaEventRecord(end_, stream_));
    CheckOk(cudaEventSynchronize(end_));
    float ms = 0;
    CheckOk(cudaEventElapsedTime(&ms, begin_, end_));
    return 1e3 * static_cast<double>(ms) / replays / n_;
  }

 private:
  cudaStream_t stream_;
  int n_;
  cudaGraphExec_t graph_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

std::vector<Timing> TakeTurns(const std::vector<Graph*>& graphs) {
  std::vector<std::vector<double>> us(graphs.size());
  for (Graph* graph : graphs) graph->Time(2);
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < graphs.size(); ++i) us[i].push_back(graphs[i]->Time(kReplays));
  }
  std::vector<Timing> timings;
  for (std::vector<double>& times : us) {
    std::sort(times.begin(), times.end());
    timings.push_back({times[times.size() / 2], times.front(), times.back()});
  }
  return timings;
}

struct Shape {
  const char* name;
  int64_t rows;
  int64_t cols;
};
constexpr Shape kShapes[] = {
    {"7B qkv", 12288, 4096},     {"7B o", 4096, 4096},        {"7B gate+up", 22016, 4096},
    {"7B gate", 11008, 4096},    {"7B down", 4096, 11008},    {"7B head", 32000, 4096},
    {"8B qkv", 6144, 4096},      {"8B gate+up", 28672, 4096}, {"8B down", 4096, 14336},
    {"8B head", 128256, 4096},   {"0.5B qkv", 1152, 896},     {"0.5B o", 896, 896},
    {"0.5B gate+up", 9728, 896}, {"0.5B down", 896, 4864},    {"0.5B head", 151936, 896}};

struct Options {
  std::vector<std::string> shapes = {""};  // parts of names
  std::vector<std::string> bits = {"2", "2c", "3", "4", "8"};
  std::vector<int64_t> tokens;
  int64_t group = 128;
  bool norm = false;
  bool tune = false;
  bool large = false;
};

std::vector<std::string> Split(std::string_view text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    const auto value = [&](std::string_view name) {
      return arg.starts_with(name) ? arg.substr(name.size()) : std::string_view();
    };
    if (const auto shapes = value("--shapes="); !shapes.empty()) {
      options.shapes = Split(shapes);
    } else if (const auto bits = value("--bits="); !bits.empty()) {
      options.bits = Split(bits);
    } else if (const auto tokens = value("--tokens="); !tokens.empty()) {
      options.tokens.clear();
      for (const std::string& t : Split(tokens)) options.tokens.push_back(std::atoll(t.c_str()));
    } else if (const auto group = value("--group="); !group.empty()) {
      options.group = std::atoll(std::string(group).c_str());
    } else if (arg == "--norm") {
      options.norm = true;
    } else if (arg == "--tune") {
      options.tune = true;
    } else if (arg == "--large") {
      options.large = true;
    } else {
      std::fprintf(stderr, "cuda_low_bit_bench: %s is unknown; see the head of its source\n",
                   argv[i]);
      std::exit(2);
    }
  }
  if (options.tokens.empty()) {
    options.tokens = options.large
                         ? std::vector<int64_t>{16, 32, 64, 128, 256, 512, 1024, 2048, 4096}
                         : std::vector<int64_t>{1, 4, 8, 16, 32, 64};
  }
  return options;
}

class Bench {
 public:
  Bench(Context& context, Options options) : context_(context), options_(std::move(options)) {}

  void Run() {
    MeasureRead();
    if (options_.tune && options_.large) {
      std::printf(
          "| shape | bits | tokens | tokens of a tile | split | overlapped us |\n"
          "| --- | --- | ---: | ---: | ---: | ---: |\n");
    } else if (options_.tune) {
      std::printf(
          "| shape | bits | tokens | row tiles | CTAs an SM | us | share | overlapped us | share "
          "|\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    } else if (options_.large) {
      std::printf(
          "| shape | rows x cols | bits | tokens | us (range) | TFLOP/s | dequantized, cuBLAS us | "
          "cuBLAS bf16 us | longer |\n"
          "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |\n");
    } else {
      std::printf(
          "| shape | rows x cols | bits | tokens | us (range) | GB/s | share of read | "
          "Gweights/s | overlapped us (range) | GB/s | share of read | cuBLAS bf16 us | "
          "times faster |\n| --- | --- | --- | ---: | --- | ---: | ---: | ---: | --- | ---: "
          "| ---: | ---: | ---: |\n");
    }
    for (const Shape& shape : kShapes) {
      const auto is_in_name = [&](const std::string& part) {
        return std::string_view(shape.name).find(part) != std::string_view::npos;
      };
      if (std::none_of(options_.shapes.begin(), options_.shapes.end(), is_in_name)) continue;
      const std::vector<double> cublas = options_.tune ? std::vector<double>() : TimeCublas(shape);
      for (const std::string& bits : options_.bits) {
        const std::vector<ServingMatrix> weights = Weights(shape, bits);
        if (weights.empty()) continue;
        if (options_.large) {
          RunLarge(shape, bits, weights, cublas);
        } else {
          RunShape(shape, bits, weights, cublas);
        }
      }
    }
  }

 private:
  void MeasureRead() {
    constexpr int64_t kBytes = int64_t{1} << 31;
    const auto data = RandomBits<uint64_t>(context_, kBytes / 8, 1);
    auto out = RandomBits<uint32_t>(context_, 1, 2);
    const int n_multiprocessors = context_.properties().multiProcessorCount;
    for (const int ctas : {2, 3, 4}) {
      Graph graph(context_.stream(), 1, [&](int) {
        ReadAll<<<static_cast<unsigned>(ctas * n_multiprocessors), 512, 0, context_.stream()>>>(
            reinterpret_cast<const uint4*>(data.data()), kBytes / 16, out.data());
      });
      const Timing t = TakeTurns({&graph})[0];
      read_gb_s_ = std::max(read_gb_s_, static_cast<double>(kBytes) / t.median_us / 1e3);
    }
    std::printf("GPU: %s, %d SMs; read of 2 GiB: %.0f GB/s; groups of %lld%s\n\n",
                context_.properties().name, n_multiprocessors, read_gb_s_,
                static_cast<long long>(options_.group),
                options_.norm ? "; fp32 activations with RMSNorm" : "");
  }

  static int Copies(int64_t bytes) {
    return static_cast<int>((kBytesBeyondL2 + bytes - 1) / bytes);
  }
  static int Launches(int copies) { return (kLaunchesMin + copies - 1) / copies * copies; }

  std::vector<double> TimeCublas(const Shape& shape) {
    const int copies = Copies(2 * shape.rows * shape.cols);
    const auto weights = RandomNumbers<bf16>(context_, copies * shape.rows * shape.cols, 3, 0.01f);
    const auto x = RandomNumbers<bf16>(context_, TokensMax() * shape.cols, 4, 0.5f);
    auto y = RandomNumbers<bf16>(context_, TokensMax() * shape.rows, 5, 1.0f);
    std::vector<double> us;
    for (const int64_t n_tokens : options_.tokens) {
      const auto run = [&](int i) {
        CheckOk(Gemm(context_, GemmParams<bf16>{
                                   .n_tokens = n_tokens,
                                   .in = shape.cols,
                                   .out = shape.rows,
                                   .x = x.data(),
                                   .weights = weights.data() + i % copies * shape.rows * shape.cols,
                                   .y = y.data()}));
      };
      run(0);
      Graph graph(context_.stream(), Launches(copies), run);
      us.push_back(TakeTurns({&graph})[0].median_us);
    }
    return us;
  }

  int64_t TokensMax() const {
    return *std::max_element(options_.tokens.begin(), options_.tokens.end());
  }

  // As many as exceed the L2 together; none where the shape does not take the groups.
  std::vector<ServingMatrix> Weights(const Shape& shape, const std::string& form) {
    const bool has_codebook = form == "2c";
    const int bits = std::atoi(form.c_str());
    if (shape.cols % options_.group != 0) return {};
    const int64_t groups = shape.cols / options_.group;
    const int64_t n_words = shape.cols / 32 * bits * shape.rows;
    const auto qweight = RandomBits<uint32_t>(context_, n_words, 6);
    const auto qzeros = RandomBits<uint32_t>(context_, groups * (shape.rows / 32) * bits, 7);
    const auto scales = RandomNumbers<__half>(context_, groups * shape.rows * 4, 8, 0.01f);
    StoredLinear linear{.rows = shape.rows, .qweight = qweight.data()};
    if (has_codebook) {
      linear.levels = scales.data();
    } else {
      linear.scales = scales.data();
      linear.qzeros = qzeros.data();
    }
    const int copies = Copies(shape.rows * shape.cols * bits / 8);
    std::vector<ServingMatrix> weights;
    for (int i = 0; i < copies; ++i) {
      auto built = ServingMatrix::Build(
          {.linears = {&linear, 1}, .cols = shape.cols, .bits = bits, .group_size = options_.group},
          context_.stream());
      CheckOk(built.status());
      weights.push_back(*std::move(built));
    }
    // What they are built from is read by then.
    CheckOk(cudaStreamSynchronize(context_.stream()));
    return weights;
  }

  void RunLarge(const Shape& shape, const std::string& form,
                const std::vector<ServingMatrix>& weights, const std::vector<double>& cublas) {
    const auto copies = static_cast<int>(weights.size());
    const int64_t capacity = TokenTilesCapacity(TokensMax());
    const auto x = RandomNumbers<bf16>(context_, TokenTilesSize(capacity, shape.cols), 9, 0.5f);
    auto y = RandomNumbers<bf16>(context_, TokensMax() * shape.rows, 10, 1.0f);
    auto dense = RandomNumbers<bf16>(context_, shape.rows * shape.cols, 11, 0.5f);
    for (size_t t = 0; t < options_.tokens.size(); ++t) {
      const int64_t n_tokens = options_.tokens[t];
      const auto graph_of = [&](const LowBitGemmTuning& tuning) {
        return std::make_unique<Graph>(context_.stream(), Launches(copies), [&, tuning](int i) {
          CheckOk(LowBitGemm(
              {.n_tokens = n_tokens,
               .weights = &weights[static_cast<size_t>(i % copies)],
               .x = {.data = const_cast<bf16*>(x.data()), .capacity = capacity, .cols = shape.cols},
               .y_bf16 = y.data(),
               .overlap_previous = true,
               .tuning = tuning,
               .stream = context_.stream()}));
        });
      };
      if (options_.tune) {
        TuneLarge(shape, form, n_tokens, graph_of);
        continue;
      }
      const auto graph = graph_of({});
      Graph dequantized(context_.stream(), Launches(copies), [&](int i) {
        CheckOk(
            weights[static_cast<size_t>(i % copies)].Dequantize(dense.data(), context_.stream()));
        CheckOk(Gemm(context_, GemmParams<bf16>{.n_tokens = n_tokens,
                                                .in = shape.cols,
                                                .out = shape.rows,
                                                .x = x.data(),
                                                .weights = dense.data(),
                                                .y = y.data()}));
      });
      const std::vector<Timing> us = TakeTurns({graph.get(), &dequantized});
      std::printf(
          "| %s | %lld x %lld | %s | %lld | %.1f (%.1f-%.1f) | %.0f | %.1f | %.1f | %+.1f %% |\n",
          shape.name, static_cast<long long>(shape.rows), static_cast<long long>(shape.cols),
          form.c_str(), static_cast<long long>(n_tokens), us[0].median_us, us[0].min_us,
          us[0].max_us,
          2e-6 * static_cast<double>(n_tokens * shape.rows * shape.cols) / us[0].median_us,
          us[1].median_us, cublas[t], 100.0 * (us[0].median_us / cublas[t] - 1));
      std::fflush(stdout);
    }
  }

  template <typename GraphOf>
  void TuneLarge(const Shape& shape, const std::string& form, int64_t n_tokens,
                 const GraphOf& graph_of) {
    for (const int tile_tokens : {16, 32, 64, 128, 256}) {
      if (tile_tokens > 16 && tile_tokens >= 2 * n_tokens) continue;
      if (n_tokens > 8 * tile_tokens && tile_tokens < 128) continue;
      for (const int split : {1, 2, 3, 4, 5, 6, 8}) {
        if (split > 1 && n_tokens >= 1024) continue;
        const auto graph = graph_of({.tile_tokens = tile_tokens, .split = split});
        const Timing us = TakeTurns({graph.get()})[0];
        std::printf("| %s | %s | %lld | %d | %d | %.2f |\n", shape.name, form.c_str(),
                    static_cast<long long>(n_tokens), tile_tokens, split, us.median_us);
        std::fflush(stdout);
      }
    }
  }

  void RunShape(const Shape& shape, const std::string& form,
                const std::vector<ServingMatrix>& weights, const std::vector<double>& cublas) {
    const auto copies = static_cast<int>(weights.size());
    const auto x = RandomNumbers<bf16>(context_, kLowBitTokensMax * shape.cols, 9, 0.5f);
    auto y = RandomNumbers<bf16>(context_, kLowBitTokensMax * shape.rows, 10, 1.0f);
    const auto x_float = RandomNumbers<float>(context_, kLowBitTokensMax * shape.cols, 11, 0.5f);
    const auto norm_weight = RandomNumbers<float>(context_, shape.cols, 12, 0.5f);
    auto workspace =
        RandomBits<uint8_t>(context_, LowBitWorkspaceBytes(kLowBitTokensMax, shape.cols), 13);
    const auto bytes = static_cast<double>(weights[0].size_bytes());
    const auto share = [&](double us) { return 100.0 * bytes / us / 1e3 / read_gb_s_; };
    for (size_t t = 0; t < options_.tokens.size(); ++t) {
      const int64_t n_tokens = options_.tokens[t];
      const auto time = [&](const LowBitTuning& tuning) {
        std::unique_ptr<Graph> graphs[2];
        for (const bool overlap : {false, true}) {
          graphs[overlap ? 1 : 0] =
              std::make_unique<Graph>(context_.stream(), Launches(copies), [&](int i) {
                CheckOk(LowBitMatmul(
                    {.n_tokens = n_tokens,
                     .weights = &weights[static_cast<size_t>(i % copies)],
                     .x = options_.norm ? nullptr : x.data(),
                     .x_float = options_.norm ? x_float.data() : nullptr,
                     .has_norm = options_.norm,
                     .norm_weight = options_.norm ? norm_weight.data() : nullptr,
                     .eps = options_.norm ? 1e-5f : 0.0f,
                     .y_bf16 = y.data(),
                     .overlap_previous = overlap,
                     .shared_part = i % 2 == 0 ? SharedPart::kSmaller : SharedPart::kLarger,
                     .workspace = workspace.data(),
                     .workspace_bytes = workspace.size_bytes(),
                     .tuning = tuning,
                     .stream = context_.stream()}));
              });
        }
        return TakeTurns({graphs[0].get(), graphs[1].get()});
      };
      if (!options_.tune) {
        const std::vector<Timing> us = time({});
        const auto gb_s = [&](const Timing& timing) { return bytes / timing.median_us / 1e3; };
        std::printf(
            "| %s | %lld x %lld | %s | %lld | %.2f (%.2f-%.2f) | %.0f | %.1f %% | %.0f | "
            "%.2f (%.2f-%.2f) | %.0f | %.1f %% | %.2f | %.2f |\n",
            shape.name, static_cast<long long>(shape.rows), static_cast<long long>(shape.cols),
            form.c_str(), static_cast<long long>(n_tokens), us[0].median_us, us[0].min_us,
            us[0].max_us, gb_s(us[0]), share(us[0].median_us),
            static_cast<double>(shape.rows * shape.cols) / us[0].median_us / 1e3, us[1].median_us,
            us[1].min_us, us[1].max_us, gb_s(us[1]), share(us[1].median_us), cublas[t],
            cublas[t] / us[0].median_us);
        std::fflush(stdout);
        continue;
      }
      for (const int row_tiles : {2, 4}) {
        for (const int ctas : {1, 2}) {
          const std::vector<Timing> us = time({.row_tiles = row_tiles, .ctas_per_sm = ctas});
          std::printf("| %s | %s | %lld | %d | %d | %.2f | %.1f %% | %.2f | %.1f %% |\n",
                      shape.name, form.c_str(), static_cast<long long>(n_tokens), row_tiles, ctas,
                      us[0].median_us, share(us[0].median_us), us[1].median_us,
                      share(us[1].median_us));
        }
      }
      std::fflush(stdout);
    }
  }

  Context& context_;
  const Options options_;
  double read_gb_s_ = 0;
};

int Main(int argc, char** argv) {
  Options options = Parse(argc, argv);
  auto context = Context::Create(0);
  if (!context.ok()) {
    std::printf("skipped: %s\n", std::string(context.status().message()).c_str());
    return 0;
  }
  Bench(**context, std::move(options)).Run();
  return 0;
}

}  // namespace
}  // namespace walsh::kernels::cuda

int main(int argc, char** argv) { return walsh::kernels::cuda::Main(argc, argv); }
