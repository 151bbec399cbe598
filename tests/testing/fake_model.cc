#include "tests/testing/fake_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/utf8.h"
#include "tests/testing/ahead_runner.h"

namespace walsh::testing {
namespace {

constexpr int32_t kVocab = 258;
constexpr int64_t kLayers = 2;

class ByteTokenizer final : public Tokenizer {
 public:
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options) const override {
    std::vector<int32_t> ids;
    if (options.add_special_tokens) ids.push_back(kFakeBos);
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string TokenBytes(int32_t id, bool skip_special) const override {
    if (id >= 0 && id < 256) return std::string(1, static_cast<char>(id));
    if (skip_special) return "";
    return id == kFakeBos ? "<s>" : id == kFakeEos ? "</s>" : "";
  }
  std::string Decode(std::span<const int32_t> ids, bool skip_special) const override {
    std::string bytes;
    for (const int32_t id : ids) bytes += TokenBytes(id, skip_special);
    return ReplaceInvalidUtf8(bytes);
  }
  bool strips_leading_space() const override { return false; }
  int32_t vocab_size() const override { return kVocab; }
  int32_t bos() const override { return kFakeBos; }
  int32_t eos() const override { return kFakeEos; }
  bool IsSpecial(int32_t id) const override { return id >= 256; }
  int32_t TokenId(std::string_view token) const override {
    if (token == "<s>") return kFakeBos;
    if (token == "</s>") return kFakeEos;
    return token.size() == 1 ? static_cast<unsigned char>(token[0]) : -1;
  }
};

// "role: content\n" for each message; a real template is the tokenizer's own business.
class PlainTemplate final : public ChatTemplate {
 public:
  explicit PlainTemplate(std::function<void()> before) : before_(std::move(before)) {}
  absl::StatusOr<std::string> Render(const Variables& variables) const override {
    if (before_) before_();
    std::string text;
    for (const ChatMessage& message : variables.messages) {
      absl::StrAppend(&text, message.role, ": ", message.content, "\n");
    }
    if (variables.add_generation_prompt) text += "assistant: ";
    return text;
  }

 private:
  const std::function<void()> before_;
};

uint64_t Hash(std::span<const int32_t> history) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const int32_t token : history) {
    hash = (hash ^ static_cast<uint64_t>(token)) * 0x100000001b3u;
  }
  return hash ^ (hash >> 29);
}

}  // namespace

std::vector<int32_t> ByteTokens(std::string_view text) {
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

std::shared_ptr<FakeModel> FakeModel::Create(Behaviour behaviour) {
  return std::make_shared<FakeModel>(std::move(behaviour));
}

FakeModel::FakeModel(Behaviour behaviour)
    : behaviour_(std::move(behaviour)), tokenizer_(std::make_unique<ByteTokenizer>()) {
  config_.architecture = "LlamaForCausalLM";
  config_.hidden = 8;
  config_.intermediate = 8;
  config_.n_layers = kLayers;
  config_.n_heads = 1;
  config_.n_kv_heads = 1;
  config_.head_dim = 2;
  config_.vocab = kVocab;
  config_.max_position = behaviour_.max_position;
  config_.eos_tokens = {kFakeEos};
  if (!behaviour_.chat_template.empty()) {
    chat_template_ = std::make_unique<PlainTemplate>(behaviour_.before_render);
  }
  constexpr int64_t kPieceBytes = 64 << 10;
  for (int64_t n = 0; n < behaviour_.memory_bytes; n += kPieceBytes) {
    ballast_.emplace_back(static_cast<size_t>(kPieceBytes), 1);
  }
}

FakeModel::~FakeModel() = default;

void FakeModel::Logits(std::span<const int32_t> history, std::span<float> logits) const {
  uint64_t state = Hash(history);
  const auto best =
      behaviour_.next ? behaviour_.next(history) : static_cast<int32_t>('a' + (state >> 8) % 26);
  for (float& logit : logits) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    logit = static_cast<float>(state >> 40) * 0x1p-24f * 3.0f;
  }
  logits[best] = 4.0f;
  if (behaviour_.edit) behaviour_.edit(history, logits);
}

absl::StatusOr<std::unique_ptr<engine::ModelRunner>> FakeModel::MakeRunner(
    const RunnerLimits& limits) const {
  auto runner = LoadedModel::MakeRunner(limits);
  if (!runner.ok() || !behaviour_.runs_ahead) return runner;
  return std::make_unique<AheadRunner>(*std::move(runner), &n_ahead_);
}

absl::Status FakeModel::Forward(const Batch& batch, const kernels::Stream&, ForwardScratch&,
                                Matrix& logits) const {
  ++n_forwards_;
  n_rows_ += static_cast<int64_t>(batch.tokens.size());
  if (behaviour_.before_forward) {
    if (absl::Status status = behaviour_.before_forward(batch); !status.ok()) return status;
  }
  const int64_t kv_width = config_.kv_width();
  int64_t n_logits = 0;
  for (const Batch::Sequence& s : batch.sequences) n_logits += s.needs_logits ? 1 : 0;
  if (logits.rows() < n_logits) logits = Matrix(n_logits, kVocab);
  int64_t row = 0;
  for (const Batch::Sequence& s : batch.sequences) {
    WALSH_CHECK_LE(engine::KvBlocks(s.n_past + s.n_rows), static_cast<int64_t>(s.blocks.size()));
    const auto offset = [&](int64_t position) {
      return kernels::KvRowOffset(position, kv_width, s.blocks.data(), batch.kv->block_stride());
    };
    // Every layer's keys and values get the token; the last layer's values are read back.
    for (int64_t i = 0; i < s.n_rows; ++i) {
      const int64_t position = s.n_past + i;
      WALSH_CHECK_EQ(batch.positions[s.first_row + i], static_cast<int32_t>(position));
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        float* key = batch.kv->keys(layer) + offset(position);
        float* value = batch.kv->values(layer) + offset(position);
        *key = *value = static_cast<float>(batch.tokens[s.first_row + i]);
      }
    }
    if (!s.needs_logits) continue;
    std::vector<int32_t> history;
    for (int64_t position = 0; position < s.n_past + s.n_rows; ++position) {
      history.push_back(static_cast<int32_t>(batch.kv->values(kLayers - 1)[offset(position)]));
    }
    Logits(history, {logits.row(row++), static_cast<size_t>(kVocab)});
  }
  return absl::OkStatus();
}

std::vector<int32_t> FakeModel::Greedy(std::vector<int32_t> prompt, int n_tokens) const {
  std::vector<int32_t> output;
  std::vector<float> logits(kVocab);
  while (static_cast<int>(output.size()) < n_tokens) {
    Logits(prompt, logits);
    const auto best =
        static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    output.push_back(best);
    prompt.push_back(best);
    if (best == kFakeEos) break;
  }
  return output;
}

}  // namespace walsh::testing
