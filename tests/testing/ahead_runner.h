// A runner that takes the start of a step before the one before it is done, as a device does: it
// computes when it is waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "worker/engine/served_model.h"

namespace walsh::testing {

class AheadRunner final : public engine::ModelRunner {
 public:
  // `n_ahead` counts the steps that were started before the one before them was waited for.
  AheadRunner(std::unique_ptr<engine::ModelRunner> inner, std::atomic<int64_t>* n_ahead)
      : inner_(std::move(inner)), n_ahead_(n_ahead) {}

  bool can_run_ahead() const override { return true; }
  absl::Status Start(const engine::StepBatch& batch) override {
    if (!started_.empty()) ++*n_ahead_;
    Step step{.batch = batch};
    for (engine::StepBatch::Sequence& sequence : step.batch.sequences) {
      step.tables.emplace_back(sequence.blocks.begin(), sequence.blocks.end());
      sequence.blocks = step.tables.back();
    }
    started_.push_back(std::move(step));
    return absl::OkStatus();
  }
  absl::Status Wait() override {
    Step step = std::move(started_.front());
    started_.pop_front();
    for (int32_t& token : step.batch.tokens) {
      if (token < 0) token = made_.at(engine::StepBatch::IndexBefore(token));
    }
    made_.clear();
    if (absl::Status status = inner_->Run(step.batch); !status.ok()) return status;
    for (size_t i = 0; i < step.batch.sequences.size(); ++i) {
      const bool is_wanted = step.batch.sequences[i].wanted != engine::Wanted::kNothing;
      made_.push_back(is_wanted ? inner_->best(i) : -1);
    }
    return absl::OkStatus();
  }
  int32_t best(size_t index) const override { return made_.at(index); }
  std::span<float> logits(size_t index) override { return inner_->logits(index); }
  void Discard(engine::BlockId block) override { inner_->Discard(block); }
  int64_t kv_cache_bytes() const override { return inner_->kv_cache_bytes(); }

 private:
  struct Step {
    engine::StepBatch batch;
    std::deque<std::vector<engine::BlockId>> tables;
  };
  const std::unique_ptr<engine::ModelRunner> inner_;
  std::atomic<int64_t>* const n_ahead_;
  std::deque<Step> started_;
  std::vector<int32_t> made_;  // by the step that was waited for last
};

}  // namespace walsh::testing
