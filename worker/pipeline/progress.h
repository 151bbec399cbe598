// How far a job is, where its time goes, and whether it should go on.
//
// Work is counted in floating-point operations of matrix products or what takes as long, planned
// before the job starts. The fraction is work done over work planned, the ETA the rest at the rate
// of this run so far. The observer hears of a change of stage or layer at once, where it is entered
// and not passed, and otherwise at most twice a second, but for the time that the job waits for
// others: then it is asked all the time whether the job should go on.
//
// Wherever work is counted a step ends, and the job lets others have the device where they want it
// (yield.h). That time is no stage's, and the ETA is that of a job without such waits.
//
// Threads: used by the job's thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/pipeline/yield.h"

namespace walsh::pipeline {

class Progress {
 public:
  // `observer` may be empty, `yield` null: never. `settle` is called before each wait, and returns
  // when nothing that the job has begun still runs on a device.
  explicit Progress(const Observer& observer, Yield* yield = nullptr,
                    std::function<absl::Status()> settle = {});

  void SetLayers(int64_t layers_total) { current_.layers_total = layers_total; }
  void Plan(double work_total) { work_total_ = work_total; }

  // Tells the observer of a new stage or layer. Time from here on is charged to `stage`.
  absl::Status Enter(Stage stage, int64_t layer, std::string message = "");
  // As Enter where the job has not been in that stage before; else the observer hears of it with
  // the next report. For steps of milliseconds, which an observer across the network would slow
  // down.
  absl::Status Pass(Stage stage, int64_t layer);
  // Time from here on is charged to another stage than the one that is shown.
  void Charge(Stage stage);
  // An earlier run of the job has done so much of the work, and so many layers.
  void Resume(double work, int64_t n_layers);
  // Whether a layer that is finished is kept for a run that goes on where this one stops.
  void set_keeps_layers(bool keeps_layers) { current_.keeps_layers = keeps_layers; }
  // `work` more is done.
  absl::Status Advance(double work);
  // Work done so far within a step that Advance() will count as a whole afterwards.
  absl::Status Within(double work);
  // A step has ended that is not to be counted yet. Part of the three above.
  absl::Status YieldIfWanted();
  // That the job has waited for others.
  double seconds_yielded() const { return seconds_yielded_; }
  void LayerDone() { ++current_.layers_done; }
  void LinearDone(const LinearReport& linear) { current_.linears.push_back(linear); }

  // Charges the running stage and writes the seconds of all, [kStages].
  void FinishTimes(double* stage_seconds);

 private:
  using Time = std::chrono::steady_clock::time_point;

  void ChargeStage();
  absl::Status Report(double work_done);
  absl::Status Tell();

  const Observer& observer_;
  Yield* const yield_;
  const std::function<absl::Status()> settle_;
  const Time start_;
  Time stage_start_;
  Time last_report_;
  double work_total_ = 0;
  double work_done_ = 0;
  double work_before_ = 0;  // of these, an earlier run's
  double seconds_[kStages] = {};
  double seconds_yielded_ = 0;
  bool was_shown_[kStages] = {};
  Stage charged_ = Stage::kValidating;
  JobProgress current_;
};

}  // namespace walsh::pipeline
