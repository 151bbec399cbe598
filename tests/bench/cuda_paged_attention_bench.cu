// Attention against the paged pool on one GPU: decoding, from the product's rows on, as a share of
// the read bandwidth that the same run measures, prefill in TFLOP/s.
//
//   cuda_paged_attention_bench [--contexts=64,256,512,1024,2048,8192] [--batches=1,16,64]
//                              [--kv-bits=16,8,4]
//
// Keys and values are in bf16, or codes with a grid for each token and head; with codes, queries
// and keys have their Hadamard transform.
//
// Protocol: random keys, values (or codes) and queries, shuffled tables; as many layers of a pool
// as exceed 300 MB, so that none is in the L2 when its turn comes, as many as fit where one alone
// is larger; a CUDA graph of 32 or more launches, each with the next layer; after a warm-up the
// median, least and most of 5 rounds, in which the ways to launch take turns. "Overlapped" launches
// are programmatic dependent ones. "In a chain" is what a launch adds to a chain of dependent
// launches that write the rows, one behind each: the latency that a layer sees of it. GB/s counts
// the keys and values that are seen once, TFLOP/s four for each element of a head and each pair of
// a query and a key that it sees. Prints Markdown.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/paged_attention.h"
#include "worker/kernels/cuda/paged_kv.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int64_t kBytesBeyondL2 = 300'000'000;
constexpr int kLaunchesMin = 32;
constexpr int kRounds = 5;
constexpr int kReplays = 5;

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

constexpr int kFillCtas = 1024;
constexpr int kFillThreads = 256;

// Numbers between −2 and 2 (splitmix64).
__global__ void FillNumbers(bf16* values, int64_t n, uint64_t seed) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint64_t z = seed + static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    values[i] =
        __float2bfloat16_rn(static_cast<float>(static_cast<uint32_t>(z >> 40)) * 0x1p-22f - 2.0f);
  }
}

// In the place of the product before attention.
__global__ void CopyRows(const float* from, float* to, int64_t n) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    to[i] = from[i];
  }
}

__global__ void FillFloats(float* values, int64_t n, float scale) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    values[i] = scale * (static_cast<float>(i * 2654435761 % 4096) * 0x1p-10f - 2.0f);
  }
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

template <typename T>
DeviceBuffer<T> Allocate(Context& context, int64_t n) {
  auto buffer = DeviceBuffer<T>::Allocate(n, context.stream());
  CheckOk(buffer.status());
  return *std::move(buffer);
}
DeviceBuffer<bf16> RandomNumbers(Context& context, int64_t n, uint64_t seed) {
  DeviceBuffer<bf16> buffer = Allocate<bf16>(context, n);
  FillNumbers<<<kFillCtas, kFillThreads, 0, context.stream()>>>(buffer.data(), n, seed);
  return buffer;
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

struct Model {
  const char* name;
  int64_t n_heads;
  int64_t n_kv_heads;
  int64_t head_dim;
};
constexpr Model kModels[] = {
    {"Llama-2-7B", 32, 32, 128}, {"Llama-3-8B", 32, 8, 128}, {"Qwen2.5-0.5B", 14, 2, 64}};

struct Options {
  std::vector<int64_t> contexts = {64, 256, 512, 1024, 2048, 8192};
  std::vector<int64_t> batches = {1, 16, 64};
  std::vector<int64_t> kv_bits = {16, 8, 4};
};

std::vector<int64_t> Numbers(std::string_view text) {
  std::vector<int64_t> numbers(1, 0);
  for (const char c : text) {
    if (c == ',') {
      numbers.push_back(0);
    } else {
      numbers.back() = numbers.back() * 10 + (c - '0');
    }
  }
  return numbers;
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    const auto value = [&](std::string_view name) {
      return arg.starts_with(name) ? arg.substr(name.size()) : std::string_view();
    };
    if (const auto contexts = value("--contexts="); !contexts.empty()) {
      options.contexts = Numbers(contexts);
    } else if (const auto batches = value("--batches="); !batches.empty()) {
      options.batches = Numbers(batches);
    } else if (const auto kv_bits = value("--kv-bits="); !kv_bits.empty()) {
      options.kv_bits = Numbers(kv_bits);
    } else {
      std::fprintf(stderr,
                   "cuda_paged_attention_bench: %s is unknown; see the head of its source\n",
                   argv[i]);
      std::exit(2);
    }
  }
  return options;
}

// `n_sequences` sequences of `n_rows` rows after `n_past` tokens, and layers of a pool.
struct Setup {
  KvPoolShape shape;
  int64_t n_layers = 0;
  DeviceBuffer<bf16> pool;  // of whatever form
  DeviceBuffer<int32_t> image;
  DeviceBuffer<bf16> q, y;
  PagedAttentionParams params;  // of prefill
};

class Bench {
 public:
  Bench(Context& context, Options options) : context_(context), options_(std::move(options)) {}

  void Run() {
    MeasureRead();
    std::printf(
        "| decode | KV bits | context | batch | us (range) | overlapped us (range) | GB/s | share "
        "of "
        "read | in a chain, us |\n| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |\n");
    for (const Model& model : kModels) {
      for (const int64_t context : options_.contexts) {
        for (const int64_t batch : options_.batches) {
          for (const KvForm& form : Forms()) Decode(model, form, context, batch);
        }
      }
    }
    std::printf(
        "\n| prefill | KV bits | cached | rows | us (range) | TFLOP/s |\n| --- | ---: | ---: | "
        "---: "
        "| --- | ---: |\n");
    for (const Model& model : kModels) {
      for (const KvForm& form : Forms()) {
        Prefill(model, form, 0, 2048);
        Prefill(model, form, 2048, 512);
      }
    }
  }

 private:
  std::vector<KvForm> Forms() const {
    std::vector<KvForm> forms;
    for (const int64_t bits : options_.kv_bits) forms.push_back({.bits = static_cast<int>(bits)});
    return forms;
  }

  void MeasureRead() {
    constexpr int64_t kBytes = int64_t{1} << 31;
    const auto data = RandomNumbers(context_, kBytes / 2, 1);
    auto out = Allocate<uint32_t>(context_, 1);
    const int n_multiprocessors = context_.properties().multiProcessorCount;
    for (const int ctas : {2, 3, 4}) {
      Graph graph(context_.stream(), 1, [&](int) {
        ReadAll<<<static_cast<unsigned>(ctas * n_multiprocessors), 512, 0, context_.stream()>>>(
            reinterpret_cast<const uint4*>(data.data()), kBytes / 16, out.data());
      });
      const Timing t = TakeTurns({&graph})[0];
      read_gb_s_ = std::max(read_gb_s_, static_cast<double>(kBytes) / t.median_us / 1e3);
    }
    std::printf("GPU: %s, %d SMs; read of 2 GiB: %.0f GB/s\n\n", context_.properties().name,
                n_multiprocessors, read_gb_s_);
  }

  Setup Make(const Model& model, const KvForm& form, int64_t n_sequences, int64_t n_past,
             int64_t n_rows) {
    Setup s;
    const int64_t n_tokens = n_past + n_rows;
    const int64_t n_blocks = (n_tokens + kPoolBlockTokens - 1) / kPoolBlockTokens;
    s.shape = {.n_blocks = n_blocks * n_sequences,
               .n_kv_heads = model.n_kv_heads,
               .head_dim = model.head_dim,
               .form = form};
    const int64_t layer_bytes = s.shape.size_bytes();
    s.n_layers = (kBytesBeyondL2 + layer_bytes - 1) / layer_bytes;
    s.pool = RandomNumbers(context_, s.n_layers * layer_bytes / 2, 2);
    std::vector<int32_t> blocks(static_cast<size_t>(s.shape.n_blocks));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(3));
    std::vector<KvSequence> sequences;
    for (int64_t i = 0; i < n_sequences; ++i) {
      sequences.push_back({.first_row = i * n_rows,
                           .n_rows = n_rows,
                           .n_past = n_past,
                           .table = {blocks.data() + i * n_blocks, static_cast<size_t>(n_blocks)}});
    }
    const KvBatchLayout layout{
        .n_sequences = n_sequences,
        .n_rows = n_sequences * n_rows,
        .max_blocks = (n_blocks + kTableAlignment - 1) / kTableAlignment * kTableAlignment};
    std::vector<int32_t> image(static_cast<size_t>(layout.size()));
    CheckOk(layout.Pack(sequences, s.shape.n_blocks, image));
    s.image = Allocate<int32_t>(context_, layout.size());
    CheckOk(cudaMemcpyAsync(s.image.data(), image.data(), image.size() * sizeof(int32_t),
                            cudaMemcpyHostToDevice, context_.stream()));
    CheckOk(context_.Synchronize());
    const int64_t width = model.n_heads * model.head_dim;
    s.q = RandomNumbers(context_, layout.n_rows * width, 4);
    s.y = RandomNumbers(context_, layout.n_rows * width, 5);
    s.params = {.batch = layout.View(s.image.data()),
                .pool = {.data = s.pool.data(), .shape = s.shape},
                .n_heads = model.n_heads,
                .scale = 1.0f / std::sqrt(static_cast<float>(model.head_dim)),
                .q = s.q.data(),
                .y = s.y.data(),
                .stream = context_.stream()};
    return s;
  }

  static int Launches(const Setup& s) {
    const auto n = static_cast<int>(s.n_layers);
    return (kLaunchesMin + n - 1) / n * n;
  }
  static KvPoolLayer Layer(const Setup& s, int i) {
    return {.data = const_cast<bf16*>(s.pool.data()) + i % s.n_layers * s.shape.size_bytes() / 2,
            .shape = s.shape};
  }

  DeviceBuffer<float> RandomFloats(int64_t n, float scale) {
    auto values = Allocate<float>(context_, n);
    FillFloats<<<kFillCtas, kFillThreads, 0, context_.stream()>>>(values.data(), n, scale);
    return values;
  }

  void Decode(const Model& model, const KvForm& form, int64_t context, int64_t batch) {
    const Setup s = Make(model, form, batch, context - 1, 1);
    const int64_t qkv_size = batch * (model.n_heads + 2 * model.n_kv_heads) * model.head_dim;
    const auto rows = RandomFloats(qkv_size, 1.0f);
    auto qkv = RandomFloats(qkv_size, 1.0f);
    const auto frequencies = RandomFloats(model.head_dim / 2, 0.25f);
    const HeadTransform heads = form.is_quantized() ? HeadTransform::kWalsh : HeadTransform::kNone;
    const auto attend = [&](int i, bool overlap) {
      CheckOk(PagedDecodeAttention(
          {.batch = s.params.batch,
           .pool = Layer(s, i),
           .n_heads = model.n_heads,
           .scale = s.params.scale,
           .qkv = qkv.data(),
           .transform = {.inverse_frequencies = frequencies.data(), .heads = heads},
           .y = s.params.y,
           .overlap_previous = overlap,
           .stream = context_.stream()}));
    };
    const auto produce = [&] {
      CheckOk(LaunchKernel(
          "CopyRows", CopyRows,
          {.grid = dim3(static_cast<unsigned>(context_.properties().multiProcessorCount)),
           .threads = 128,
           .overlap_previous = true,
           .stream = context_.stream()},
          rows.data(), qkv.data(), qkv_size));
    };
    const int n = Launches(s);
    Graph plain(context_.stream(), n, [&](int i) { attend(i, false); });
    Graph overlapped(context_.stream(), n, [&](int i) { attend(i, true); });
    std::vector<Graph*> graphs = {&plain, &overlapped};
    std::unique_ptr<Graph> producers;
    std::unique_ptr<Graph> chain;
    if (batch == 1) {
      producers = std::make_unique<Graph>(context_.stream(), n, [&](int) { produce(); });
      chain = std::make_unique<Graph>(context_.stream(), n, [&](int i) {
        produce();
        attend(i, true);
      });
      graphs.insert(graphs.end(), {producers.get(), chain.get()});
    }
    const std::vector<Timing> us = TakeTurns(graphs);
    const int64_t token_bytes = s.shape.block_bytes() / kPoolBlockTokens;
    const auto bytes = static_cast<double>(batch * context * token_bytes);
    const double gb_s = bytes / us[1].median_us / 1e3;
    std::printf("| %s | %d | %lld | %lld | %.2f (%.2f-%.2f) | %.2f (%.2f-%.2f) | %.0f | %.1f %% | ",
                model.name, form.bits, static_cast<long long>(context),
                static_cast<long long>(batch), us[0].median_us, us[0].min_us, us[0].max_us,
                us[1].median_us, us[1].min_us, us[1].max_us, gb_s, 100 * gb_s / read_gb_s_);
    if (batch == 1) {
      std::printf("%.2f (of %.2f) |\n", us[3].median_us - us[2].median_us, us[3].median_us);
    } else {
      std::printf("|\n");
    }
    std::fflush(stdout);
  }

  void Prefill(const Model& model, const KvForm& form, int64_t n_past, int64_t n_rows) {
    const Setup s = Make(model, form, 1, n_past, n_rows);
    Graph graph(context_.stream(), Launches(s), [&](int i) {
      PagedAttentionParams params = s.params;
      params.pool = Layer(s, i);
      CheckOk(PagedPrefillAttention(params));
    });
    const Timing us = TakeTurns({&graph})[0];
    const double pairs = static_cast<double>(n_rows) * static_cast<double>(n_past) +
                         0.5 * static_cast<double>(n_rows) * static_cast<double>(n_rows + 1);
    const double flop = 4.0 * pairs * static_cast<double>(model.n_heads * model.head_dim);
    std::printf("| %s | %d | %lld | %lld | %.1f (%.1f-%.1f) | %.0f |\n", model.name, form.bits,
                static_cast<long long>(n_past), static_cast<long long>(n_rows), us.median_us,
                us.min_us, us.max_us, flop / us.median_us / 1e6);
    std::fflush(stdout);
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
