#include "worker/evaluate/evaluation_memory.h"

#include <algorithm>

#include "worker/evaluate/perplexity.h"
#include "worker/evaluate/tasks/log_likelihood.h"

namespace walsh::evaluate {
namespace {

constexpr int64_t kFloat = sizeof(float);

// Of one model.
class ModelBytes {
 public:
  explicit ModelBytes(const ModelConfig& config) : config_(config) {}

  // The embedding, while rows are looked up in it; as large is the head.
  int64_t Vocabulary() const { return config_.vocab * config_.hidden * kFloat; }
  int64_t Hidden(int64_t rows) const { return rows * config_.hidden * kFloat; }
  int64_t KeysAndValues(int64_t rows) const { return 2 * rows * config_.kv_width() * kFloat; }
  int64_t Logits() const { return kLogitRows * config_.vocab * kFloat; }
  // Of the rows that go through a layer at once.
  int64_t Scratch(int64_t rows) const {
    return rows * kFloat * 2 *
           (config_.hidden + config_.q_width() + config_.kv_width() + config_.intermediate);
  }
  // A layer in floats, and one of its linears on the way there: packed and unpacked codes, and its
  // columns before they come to their inputs.
  int64_t Layer() const {
    const int64_t attention = config_.hidden * config_.q_width();
    const int64_t mlp = config_.hidden * config_.intermediate;
    const int64_t layer = 2 * attention + 2 * config_.hidden * config_.kv_width() + 3 * mlp;
    return layer * kFloat + std::max(attention, mlp) * (kFloat + 2);
  }
  // What a block of windows takes up to the head, which stays.
  int64_t Forward(int64_t window, int64_t block_tokens) const {
    const int64_t rows = std::min(WindowsPerBatch(window) * window, block_tokens);
    const int64_t layer = Layer() + Scratch(rows) + KeysAndValues(rows);
    return Hidden(block_tokens) + std::max(Vocabulary(), layer);
  }
  int64_t Waiting(int64_t block_tokens) const { return Hidden(block_tokens) + Vocabulary(); }
  int64_t Tasks(int64_t item_tokens_max) const {
    const int64_t block = kTaskBlockTokens + item_tokens_max;
    const int64_t rows = std::max(kTaskBatchTokens, item_tokens_max);
    const int64_t cached = rows + std::max(kTaskCachedRows, item_tokens_max);
    return 2 * Vocabulary() + Hidden(block) + Layer() + Scratch(rows) + KeysAndValues(cached) +
           Logits();
  }

 private:
  const ModelConfig& config_;
};

// Text that is held beside its token ids, and what is allocated for each of its pieces.
int64_t HeldBytes(const Task& task) {
  constexpr int64_t kPerPiece = 128;
  int64_t n_bytes = 0;
  for (const TaskItem& item : task.items) {
    n_bytes += item.ForwardedBytes() * static_cast<int64_t>(1 + sizeof(int32_t)) +
               static_cast<int64_t>(item.contexts.size() + item.n_choices()) * kPerPiece;
  }
  return n_bytes;
}

int64_t TextBytes(const ModelBytes& model, const ModelConfig* reference,
                  const EvaluationShape& shape) {
  const int64_t alone = std::max(model.Forward(shape.window, shape.block_tokens),
                                 model.Waiting(shape.block_tokens) + model.Logits());
  if (reference == nullptr) return alone;
  const ModelBytes before(*reference);
  return std::max(before.Forward(shape.window, shape.block_tokens),
                  before.Waiting(shape.block_tokens) + before.Logits() + alone);
}

}  // namespace

void AddTasks(std::span<const Task> tasks, const ModelConfig& config, EvaluationShape& shape) {
  for (const Task& task : tasks) {
    shape.held_bytes += HeldBytes(task);
    for (const TaskItem& item : task.items) {
      // Each choice is cut to the model's context.
      const int64_t cut = static_cast<int64_t>(item.n_choices()) * (config.max_position + 1);
      shape.item_tokens_max =
          std::max(shape.item_tokens_max, std::min(item.ForwardedBytes() + 1, cut));
    }
  }
}

int64_t EvaluationBytes(const ModelConfig& config, const ModelConfig* reference,
                        const EvaluationShape& shape) {
  const ModelBytes model(config);
  const int64_t text = shape.block_tokens == 0 ? 0 : TextBytes(model, reference, shape);
  const int64_t tasks = shape.item_tokens_max == 0 ? 0 : model.Tasks(shape.item_tokens_max);
  return shape.held_bytes + std::max(text, tasks);
}

}  // namespace walsh::evaluate
