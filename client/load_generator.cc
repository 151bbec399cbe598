#include "client/load_generator.h"

#include <algorithm>
#include <random>
#include <thread>

namespace walsh::client {

void RequestRecorder::OnTokens(int64_t n_tokens) {
  if (n_tokens <= 0) return;
  const absl::Duration now = clock_->Monotonic() - start_;
  if (record_->n_output_tokens == 0) {
    record_->first_token = now;
  } else {
    const absl::Duration gap = (now - record_->last_token) / n_tokens;
    record_->token_gaps.insert(record_->token_gaps.end(), static_cast<size_t>(n_tokens), gap);
  }
  record_->last_token = now;
  record_->n_output_tokens += n_tokens;
}

LoadGenerator::LoadGenerator(const LoadOptions& options, Clock* clock)
    : options_(options), clock_(clock) {
  for (int i = 0; i < options.concurrency; ++i) {
    streams_.push_back(std::make_unique<Cancellation>());
  }
}

void LoadGenerator::Stop() {
  is_stopped_ = true;
  for (const std::unique_ptr<Cancellation>& stream : streams_) stream->Cancel();
}

std::vector<absl::Duration> LoadGenerator::Arrivals() const {
  std::vector<absl::Duration> arrivals;
  if (options_.rate <= 0) return arrivals;
  std::mt19937_64 random(options_.seed);
  std::exponential_distribution<double> gap(options_.rate);
  absl::Duration due = absl::ZeroDuration();
  for (int64_t i = 0; i < options_.n_requests && due < options_.duration_max; ++i) {
    arrivals.push_back(due);
    due += absl::Seconds(gap(random));
  }
  return arrivals;
}

LoadResult LoadGenerator::Run(const SendRequest& send) {
  const std::vector<absl::Duration> arrivals = Arrivals();
  const bool is_open = options_.rate > 0;
  const int64_t n_requests = is_open ? static_cast<int64_t>(arrivals.size()) : options_.n_requests;
  std::vector<std::unique_ptr<RequestRecord>> records(static_cast<size_t>(n_requests));
  std::atomic<int64_t> next = 0;
  std::atomic<int> n_running = 0;
  std::atomic<int> n_running_max = 0;
  const absl::Duration start = clock_->Monotonic();

  const auto run_stream = [&](Cancellation& stop) {
    while (!is_stopped_) {
      const int64_t index = next++;
      if (index >= n_requests) return;
      const absl::Duration now = clock_->Monotonic() - start;
      if (!is_open && now >= options_.duration_max) return;
      const absl::Duration due = is_open ? arrivals[static_cast<size_t>(index)] : now;
      if (due > now && !stop.Sleep(due - now)) return;
      auto record = std::make_unique<RequestRecord>();
      record->due = due;
      int running = ++n_running;
      for (int peak = n_running_max;
           running > peak && !n_running_max.compare_exchange_weak(peak, running);) {
      }
      RequestRecorder recorder(clock_, start, record.get());
      record->status = send(index, recorder, stop);
      --n_running;
      record->end = clock_->Monotonic() - start;
      records[static_cast<size_t>(index)] = std::move(record);
    }
  };
  std::vector<std::thread> threads;
  for (const std::unique_ptr<Cancellation>& stream : streams_) {
    threads.emplace_back([&run_stream, &stream] { run_stream(*stream); });
  }
  for (std::thread& thread : threads) thread.join();

  LoadResult result{.concurrency_peak = n_running_max, .is_stopped = is_stopped_};
  for (const std::unique_ptr<RequestRecord>& record : records) {
    if (record == nullptr) continue;
    result.elapsed = std::max(result.elapsed, record->end);
    result.requests.push_back(std::move(*record));
  }
  return result;
}

}  // namespace walsh::client
