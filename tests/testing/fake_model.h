// A model without weights, for tests of everything around one.
//
// Its vocabulary is the 256 bytes, 256 <s> and 257 </s>; text is its bytes. The next token depends
// on the whole history, which it keeps in the KV cache that the engine hands it and reads back from
// there, so that a mistake in the cache's book-keeping changes the output.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "worker/engine/loaded_model.h"

namespace walsh::testing {

inline constexpr int32_t kFakeBos = 256;
inline constexpr int32_t kFakeEos = 257;

class FakeModel final : public engine::LoadedModel {
 public:
  struct Behaviour {
    int64_t max_position = 256;
    // The most probable next token after a history; by default a hash of it, as a letter.
    std::function<int32_t(std::span<const int32_t> history)> next = {};
    // Called before each forward pass; an error fails the step.
    std::function<absl::Status(const Batch&)> before_forward = {};
    // Changes the logits of one sequence.
    std::function<void(std::span<const int32_t> history, std::span<float> logits)> edit = {};
    bool runs_ahead = false;   // its runner takes two steps at once
    int64_t memory_bytes = 0;  // really allocated, in pieces of 64 KiB
    int64_t step_bytes = 0;    // only said
    std::string chat_template = {};
    // Called when a chat is rendered, as a long one takes its time.
    std::function<void()> before_render = {};
  };
  static std::shared_ptr<FakeModel> Create(Behaviour behaviour);
  FakeModel() : FakeModel(Behaviour{}) {}
  explicit FakeModel(Behaviour behaviour);
  ~FakeModel() override;

  const ModelConfig& config() const override { return config_; }
  const ArtifactInfo& info() const override { return info_; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const ChatTemplate* chat_template() const override { return chat_template_.get(); }
  int64_t memory_bytes() const override { return behaviour_.memory_bytes; }
  int64_t packed_bytes_per_token() const override { return 0; }
  int64_t step_bytes(const RunnerLimits&) const override { return behaviour_.step_bytes; }
  absl::StatusOr<std::unique_ptr<engine::ModelRunner>> MakeRunner(
      const RunnerLimits& limits) const override;
  absl::Status Forward(const Batch& batch, const kernels::Stream& stream, ForwardScratch& scratch,
                       Matrix& logits) const override;

  // What the model answers to a prompt under greedy sampling, without any engine.
  std::vector<int32_t> Greedy(std::vector<int32_t> prompt, int n_tokens) const;

  int64_t n_forwards() const { return n_forwards_; }
  int64_t n_rows() const { return n_rows_; }
  // Steps that were started before the one before them was done.
  int64_t n_ahead() const { return n_ahead_; }

 private:
  void Logits(std::span<const int32_t> history, std::span<float> logits) const;

  const Behaviour behaviour_;
  ModelConfig config_;
  ArtifactInfo info_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> chat_template_;
  std::vector<std::vector<char>> ballast_;
  mutable std::atomic<int64_t> n_forwards_ = 0;
  mutable std::atomic<int64_t> n_rows_ = 0;
  mutable std::atomic<int64_t> n_ahead_ = 0;
};

// The bytes of a text as tokens.
std::vector<int32_t> ByteTokens(std::string_view text);

}  // namespace walsh::testing
