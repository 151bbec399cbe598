#include "worker/pipeline/progress.h"

#include <algorithm>
#include <utility>

#include "common/status_macros.h"

namespace walsh::pipeline {
namespace {

using std::chrono::steady_clock;

constexpr double kReportIntervalSeconds = 0.5;
// Before that an estimate would say more about start-up than about the job.
constexpr double kEtaMinSeconds = 1.0;
constexpr double kEtaMinFraction = 0.005;
// A wait that is longer than this shows: the job seems to stand still.
constexpr double kShownWaitSeconds = 2.0;

double Seconds(steady_clock::duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace

Progress::Progress(const Observer& observer, Yield* yield, std::function<absl::Status()> settle)
    : observer_(observer),
      yield_(yield),
      settle_(std::move(settle)),
      start_(steady_clock::now()),
      stage_start_(start_),
      last_report_(start_) {}

void Progress::ChargeStage() {
  const Time now = steady_clock::now();
  seconds_[static_cast<int>(charged_)] += Seconds(now - stage_start_);
  stage_start_ = now;
}

void Progress::Charge(Stage stage) {
  ChargeStage();
  charged_ = stage;
}

absl::Status Progress::Enter(Stage stage, int64_t layer, std::string message) {
  Charge(stage);
  current_.stage = stage;
  current_.layer = layer;
  current_.message = std::move(message);
  return Report(work_done_);
}

absl::Status Progress::Pass(Stage stage, int64_t layer) {
  if (!was_shown_[static_cast<int>(stage)]) return Enter(stage, layer);
  Charge(stage);
  current_.stage = stage;
  current_.layer = layer;
  current_.message.clear();
  return Within(0);
}

void Progress::Resume(double work, int64_t n_layers) {
  work_done_ += work;
  work_before_ += work;
  current_.layers_done += n_layers;
}

absl::Status Progress::Advance(double work) {
  work_done_ += work;
  return Within(0);
}

absl::Status Progress::Within(double work) {
  WALSH_RETURN_IF_ERROR(YieldIfWanted());
  if (Seconds(steady_clock::now() - last_report_) < kReportIntervalSeconds) {
    return absl::OkStatus();
  }
  return Report(work_done_ + work);
}

absl::Status Progress::YieldIfWanted() {
  if (yield_ == nullptr || !yield_->IsWanted()) return absl::OkStatus();
  if (settle_) WALSH_RETURN_IF_ERROR(settle_());
  const Time start = steady_clock::now();
  const std::string message = current_.message;
  const absl::Status status = yield_->Wait([&] {
    if (Seconds(steady_clock::now() - start) > kShownWaitSeconds) {
      current_.message = "waits for the model's requests";
    }
    return Tell();
  });
  current_.message = message;
  const steady_clock::duration waited = steady_clock::now() - start;
  seconds_yielded_ += Seconds(waited);
  stage_start_ += waited;
  return status;
}

absl::Status Progress::Report(double work_done) {
  last_report_ = steady_clock::now();
  was_shown_[static_cast<int>(current_.stage)] = true;
  if (work_total_ > 0) {
    // Never back, even where a step turns out smaller than planned.
    current_.fraction = std::max(current_.fraction, std::min(1.0, work_done / work_total_));
    const double elapsed = Seconds(last_report_ - start_) - seconds_yielded_;
    const double done_here = current_.fraction - work_before_ / work_total_;
    if (elapsed >= kEtaMinSeconds && done_here >= kEtaMinFraction) {
      current_.eta_seconds = elapsed / done_here * (1 - current_.fraction);
    }
  }
  return Tell();
}

absl::Status Progress::Tell() {
  if (!observer_) return absl::OkStatus();
  absl::Status status = observer_(current_);
  current_.linears.clear();
  return status;
}

void Progress::FinishTimes(double* stage_seconds) {
  ChargeStage();
  std::copy(std::begin(seconds_), std::end(seconds_), stage_seconds);
}

}  // namespace walsh::pipeline
