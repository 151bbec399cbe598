// Steps of a served model on one GPU, without engine, scheduler and gRPC, and with --streams the
// engine without gRPC: what `walsh bench` can reach at best.
//
//   cuda_engine_bench ARTIFACT [--batches=1,4,16,64] [--contexts=32,512] [--prompts=512,2048]
//   [--streams=64]
//
// Protocol: each sequence has a context of so many tokens in the KV pool (random ones, prefilled),
// then decodes greedily, its token fed back by the host as the engine does; after 8 steps the
// median, least and most of 64. Packed bytes are what a step reads of the weights; the KV cache is
// beside them. Prompts: one pass over so many tokens, median of 5. Streams: as `walsh bench` asks
// the service for it, so many requests at a time until twice as many are answered, prompts of 512
// random tokens, 256 greedy ones of each. Prints Markdown.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "worker/engine/cuda/cuda_model.h"
#include "worker/engine/engine.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::engine {
namespace {

constexpr int kWarmUp = 8;
constexpr int kSteps = 64;
constexpr int kPromptRounds = 5;
constexpr int64_t kChunk = 2048;

void CheckOk(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

struct Options {
  std::string artifact;
  std::vector<int64_t> batches = {1, 4, 16, 64};
  std::vector<int64_t> contexts = {32, 512};
  std::vector<int64_t> prompts = {512, 2048};
  std::vector<int64_t> streams;
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
    if (arg.starts_with("--batches=")) {
      options.batches = Numbers(arg.substr(10));
    } else if (arg.starts_with("--contexts=")) {
      options.contexts = Numbers(arg.substr(11));
    } else if (arg.starts_with("--prompts=")) {
      options.prompts = Numbers(arg.substr(10));
    } else if (arg.starts_with("--streams=")) {
      options.streams = Numbers(arg.substr(10));
    } else {
      options.artifact = arg;
    }
  }
  return options;
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Text {
  std::vector<BlockId> blocks;
  int64_t n_past = 0;
  int32_t token = 1;
};

class Bench {
 public:
  Bench(const ServedModel& model, const Options& options) : model_(model), options_(options) {
    const int64_t batch = *std::max_element(options.batches.begin(), options.batches.end());
    int64_t context = *std::max_element(options.contexts.begin(), options.contexts.end());
    context = std::max(context, *std::max_element(options.prompts.begin(), options.prompts.end()));
    n_context_ = std::min(context + kWarmUp + kSteps + 1, model.config().max_position);
    auto runner = model.MakeRunner({.n_blocks = batch * KvBlocks(n_context_),
                                    .n_rows = kChunk,
                                    .n_sequences = batch,
                                    .n_context = n_context_,
                                    .pool = &pool_});
    CheckOk(runner.status());
    runner_ = *std::move(runner);
  }

  void Run() {
    std::printf("%.3f GB of packed weights\n\n", 1e-9 * Bytes());
    std::printf("| context | batch | step, ms (range) | tok/s | packed GB/s |\n");
    std::printf("| ---: | ---: | --- | ---: | ---: |\n");
    for (const int64_t context : options_.contexts) {
      for (const int64_t batch : options_.batches) Decode(context, batch);
    }
    std::printf("\n| prompt | ms | tok/s |\n| ---: | ---: | ---: |\n");
    for (const int64_t n : options_.prompts) Prompt(n);
  }

 private:
  double Bytes() const { return static_cast<double>(model_.packed_bytes_per_token()); }

  std::vector<Text> Texts(int64_t n) const {
    std::vector<Text> texts(static_cast<size_t>(n));
    BlockId next = 0;
    for (Text& text : texts) {
      for (int64_t i = 0; i < KvBlocks(n_context_); ++i) text.blocks.push_back(next++);
    }
    return texts;
  }
  // One step of these texts, n rows each; the next token is the likeliest.
  void Step(std::vector<Text*> texts, int64_t n) {
    StepBatch batch;
    for (Text* text : texts) {
      batch.sequences.push_back({.first_row = static_cast<int64_t>(batch.tokens.size()),
                                 .n_rows = n,
                                 .n_past = text->n_past,
                                 .blocks = text->blocks,
                                 .wanted = Wanted::kBest});
      for (int64_t i = 0; i < n; ++i) {
        batch.tokens.push_back(
            static_cast<int32_t>((text->token + i * 7919) % model_.config().vocab));
      }
    }
    CheckOk(runner_->Run(batch));
    for (size_t i = 0; i < texts.size(); ++i) {
      texts[i]->n_past += n;
      texts[i]->token = std::max(0, runner_->best(i));
    }
  }
  void Fill(Text& text, int64_t n) {
    while (text.n_past < n) Step({&text}, std::min(kChunk, n - text.n_past));
  }

  void Decode(int64_t context, int64_t batch) {
    std::vector<Text> texts = Texts(batch);
    std::vector<Text*> all;
    for (Text& text : texts) {
      text.token = static_cast<int32_t>(all.size() * 31 + 1);
      Fill(text, context);
      all.push_back(&text);
    }
    for (int i = 0; i < kWarmUp; ++i) Step(all, 1);
    std::vector<double> seconds;
    for (int i = 0; i < kSteps; ++i) {
      const double begin = Seconds();
      Step(all, 1);
      seconds.push_back(Seconds() - begin);
    }
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];
    std::printf("| %lld | %lld | %.3f (%.3f-%.3f) | %.0f | %.0f |\n",
                static_cast<long long>(context), static_cast<long long>(batch), 1e3 * median,
                1e3 * seconds.front(), 1e3 * seconds.back(), static_cast<double>(batch) / median,
                1e-9 * Bytes() / median);
    std::fflush(stdout);
  }

  void Prompt(int64_t n) {
    std::vector<double> seconds;
    for (int i = 0; i < kPromptRounds; ++i) {
      std::vector<Text> texts = Texts(1);
      const double begin = Seconds();
      Fill(texts.front(), n);
      seconds.push_back(Seconds() - begin);
    }
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];
    std::printf("| %lld | %.2f | %.0f |\n", static_cast<long long>(n), 1e3 * median,
                static_cast<double>(n) / median);
    std::fflush(stdout);
  }

  const ServedModel& model_;
  const Options options_;
  ThreadPool pool_{4};
  int64_t n_context_ = 0;
  std::unique_ptr<ModelRunner> runner_;
};

// Ends with its request.
class CountingSink final : public Sink {
 public:
  explicit CountingSink(absl::Mutex* mu, int* running) : mu_(*mu), running_(*running) {}
  void OnStarted(double) override {}
  void OnDelta(Delta) override {}
  void OnFinished(const Outcome&) override {
    const absl::MutexLock lock(&mu_);
    --running_;
  }
  void OnFailed(const absl::Status& status) override { CheckOk(status); }

 private:
  absl::Mutex& mu_;
  int& running_;
};

void RunStreams(const std::shared_ptr<ServedModel>& model, int64_t streams) {
  constexpr int kPrompt = 512;
  constexpr int kGenerated = 256;
  const auto n_streams = static_cast<int>(streams);
  auto engine =
      Engine::Create(model,
                     {.max_sequences = n_streams,
                      .max_waiting = n_streams,
                      .max_batch_tokens = kChunk,
                      .kv_cache_tokens = streams * (kPrompt + kGenerated + kKvBlockTokens)},
                     Clock::Real());
  CheckOk(engine.status());
  absl::Mutex mu;
  int running = 0;
  uint32_t seed = 1;
  const auto serve = [&](int n_requests) {
    for (int i = 0; i < n_requests; ++i) {
      {
        const absl::MutexLock lock(&mu);
        const auto has_room = [&] { return running < n_streams; };
        mu.Await(absl::Condition(&has_room));
        ++running;
      }
      std::vector<int32_t> prompt;
      std::mt19937 generator(seed++);
      for (int k = 0; k < kPrompt; ++k) {
        prompt.push_back(static_cast<int32_t>(generator() % model->config().vocab));
      }
      CheckOk((*engine)->Submit(
          {.id = std::to_string(seed),
           .prompt = std::move(prompt),
           .sampling = {.max_tokens = kGenerated, .temperature = 0, .ignore_eos = true}},
          std::make_shared<CountingSink>(&mu, &running)));
    }
    const absl::MutexLock lock(&mu);
    const auto is_idle = [&] { return running == 0; };
    mu.Await(absl::Condition(&is_idle));
  };
  serve(n_streams);  // warm-up
  const double begin = Seconds();
  serve(2 * n_streams);
  const double seconds = Seconds() - begin;
  std::printf("| %d | %.2f | %.0f |\n", n_streams, seconds, 2.0 * n_streams * kGenerated / seconds);
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  const double begin = Seconds();
  const auto model = LoadCudaModel(options.artifact, {.n_threads = ThreadPool::HardwareThreads()});
  CheckOk(model.status());
  std::printf("%s: %d bits, loaded in %.2f s\n", options.artifact.c_str(), (*model)->info().bits,
              Seconds() - begin);
  Bench(**model, options).Run();
  if (options.streams.empty()) return 0;
  std::printf("\n| streams | s | output tok/s |\n| ---: | ---: | ---: |\n");
  for (const int64_t streams : options.streams) RunStreams(*model, streams);
  return 0;
}

}  // namespace
}  // namespace walsh::engine

int main(int argc, char** argv) { return walsh::engine::Main(argc, argv); }
