#include "client/load_generator.h"

#include <algorithm>
#include <random>
#include <system_error>
#include <thread>

#include "absl/strings/str_cat.h"

namespace walsh::client {

void RequestRecorder::OnTokens(int64_t n_tokens) {
  if (n_tokens <= 0) return;
  const absl::Duration now = clock_->Monotonic() - start_;
  if (record_->n_output_tokens == 0) {
    record_->first_token = now;
  } else {
    const double seconds = absl::ToDoubleSeconds(now - record_->last_token);
    record_->token_gaps.push_back(
        {.seconds = static_cast<float>(seconds / static_cast<double>(n_tokens)),
         .n_tokens = static_cast<int32_t>(n_tokens)});
  }
  record_->last_token = now;
  record_->n_output_tokens += n_tokens;
}

LoadGenerator::LoadGenerator(const LoadOptions& options, Clock* clock)
    : options_(options), clock_(clock) {
  const int64_t n_streams = std::min<int64_t>(options.concurrency, options.n_requests);
  for (int64_t i = 0; i < n_streams; ++i) {
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

absl::StatusOr<LoadResult> LoadGenerator::Run(const SendRequest& send) {
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
      if (now >= options_.duration_max) return;
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
  absl::Status started;
  try {
    for (const std::unique_ptr<Cancellation>& stream : streams_) {
      threads.emplace_back([&run_stream, &stream] { run_stream(*stream); });
    }
  } catch (const std::system_error& e) {
    started = absl::ResourceExhaustedError(absl::StrCat(
        "no threads for ", streams_.size(), " streams after ", threads.size(), ": ", e.what()));
    Stop();
  }
  for (std::thread& thread : threads) thread.join();
  if (!started.ok()) return started;

  LoadResult result{.concurrency_peak = n_running_max, .is_stopped = is_stopped_};
  for (const std::unique_ptr<RequestRecord>& record : records) {
    if (record == nullptr) {
      result.n_unsent += is_open ? 1 : 0;
      continue;
    }
    result.elapsed = std::max(result.elapsed, record->end);
    result.requests.push_back(std::move(*record));
  }
  return result;
}

}  // namespace walsh::client
