#include "worker/calibrate/self_text.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::calibrate {
namespace {

constexpr int64_t kBatchMax = 32;
constexpr int64_t kCacheBytesMax = 1 << 30;

int64_t DocumentTokensMax(const ModelConfig& config) {
  return std::min(kSelfDocumentTokensMax, config.max_position);
}

// Of the key-value cache, for one document.
int64_t DocumentBlocks(const ModelConfig& config) {
  return engine::KvBlocks(DocumentTokensMax(config));
}

// SplitMix64 (Steele et al. 2014).
uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Uniform in [0, 1), a function of its arguments alone.
double Uniform(uint64_t seed, int64_t document, int64_t position) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t stream = Mix(Mix(seed + kGolden) + kGolden * static_cast<uint64_t>(document + 1));
  return static_cast<double>(Mix(stream + kGolden * static_cast<uint64_t>(position)) >> 11) *
         0x1p-53;
}

// Draws from softmax(logits); −1 when they are not finite.
int32_t Draw(std::span<const float> logits, double uniform) {
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit - max);
  if (!std::isfinite(sum)) return -1;
  double left = uniform * sum;
  for (size_t i = 0; i < logits.size(); ++i) {
    left -= std::exp(logits[i] - max);
    if (left < 0) return static_cast<int32_t>(i);
  }
  // Rounding kept a little: the most likely token is never a wrong answer.
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

absl::StatusOr<int32_t> StartToken(const engine::LoadedModel& model) {
  const Tokenizer& tokenizer = model.tokenizer();
  for (int32_t id : {tokenizer.bos(), model.config().bos_token, tokenizer.TokenId("<|endoftext|>"),
                     tokenizer.eos()}) {
    if (id >= 0 && id < model.config().vocab) return id;
  }
  return absl::InvalidArgumentError(
      "the model has no start token to generate calibration text from; name a calibration file");
}

// One document of the batch and its part of the key-value cache.
struct Slot {
  int64_t document = 0;
  int64_t n_past = 0;
  std::vector<engine::BlockId> blocks;
};

class Generator {
 public:
  Generator(const engine::LoadedModel& model, engine::KvPool kv, int64_t n_tokens, uint64_t seed,
            ThreadPool& pool, int32_t start)
      : model_(model),
        kv_(std::move(kv)),
        n_tokens_(n_tokens),
        seed_(seed),
        pool_(pool),
        start_(start),
        eos_(model.EndTokens()) {
    slots_.resize(static_cast<size_t>(SelfTextBatch(model.config(), n_tokens)));
    engine::BlockId next = 0;
    for (Slot& slot : slots_) {
      slot.blocks.resize(static_cast<size_t>(DocumentBlocks(model.config())));
      for (engine::BlockId& block : slot.blocks) block = next++;
      StartDocument(slot);
    }
  }

  absl::StatusOr<std::vector<int32_t>> Run(const TokenProgress& progress) {
    while (n_generated_ < n_tokens_) {
      WALSH_RETURN_IF_ERROR(Step());
      WALSH_RETURN_IF_ERROR(progress(std::min(n_generated_, n_tokens_)));
    }
    std::vector<int32_t> ids;
    for (const std::vector<int32_t>& document : documents_) {
      ids.insert(ids.end(), document.begin(), document.end());
    }
    ids.resize(static_cast<size_t>(n_tokens_));
    return ids;
  }

 private:
  void StartDocument(Slot& slot) {
    slot.document = static_cast<int64_t>(documents_.size());
    slot.n_past = 0;
    documents_.push_back({start_});
    ++n_generated_;
  }

  absl::Status Step() {
    engine::LoadedModel::Batch batch;
    batch.kv = &kv_;
    for (const Slot& slot : slots_) {
      const auto row = static_cast<int64_t>(batch.tokens.size());
      batch.tokens.push_back(documents_[static_cast<size_t>(slot.document)].back());
      batch.positions.push_back(static_cast<int32_t>(slot.n_past));
      batch.sequences.push_back({row, 1, slot.n_past, slot.blocks, true});
    }
    WALSH_RETURN_IF_ERROR(
        model_.Forward(batch, {kernels::Backend::kCpu, &pool_}, scratch_, logits_));

    std::vector<int32_t> drawn(slots_.size());
    pool_.ParallelFor(static_cast<int64_t>(slots_.size()), [&](int64_t i) {
      const Slot& slot = slots_[static_cast<size_t>(i)];
      drawn[static_cast<size_t>(i)] =
          Draw({logits_.row(i), static_cast<size_t>(model_.config().vocab)},
               Uniform(seed_, slot.document, slot.n_past));
    });
    for (size_t i = 0; i < slots_.size(); ++i) {
      Slot& slot = slots_[i];
      if (drawn[i] < 0) {
        return absl::DataLossError(absl::StrCat("logits are not finite at position ", slot.n_past,
                                                " of generated document ", slot.document));
      }
      std::vector<int32_t>& document = documents_[static_cast<size_t>(slot.document)];
      document.push_back(drawn[i]);
      ++n_generated_;
      ++slot.n_past;
      const bool is_end = std::find(eos_.begin(), eos_.end(), drawn[i]) != eos_.end();
      if (is_end || static_cast<int64_t>(document.size()) >= DocumentTokensMax(model_.config())) {
        StartDocument(slot);
      }
    }
    return absl::OkStatus();
  }

  const engine::LoadedModel& model_;
  const engine::KvPool kv_;
  const int64_t n_tokens_;
  const uint64_t seed_;
  ThreadPool& pool_;
  const int32_t start_;
  const std::vector<int32_t> eos_;
  std::vector<Slot> slots_;
  std::vector<std::vector<int32_t>> documents_;
  int64_t n_generated_ = 0;
  ForwardScratch scratch_;
  Matrix logits_;
};

}  // namespace

int64_t SelfTextBatch(const ModelConfig& config, int64_t n_tokens) {
  const int64_t document = DocumentTokensMax(config);
  const int64_t cache_bytes = engine::KvPool::BytesPerToken(config.n_layers, config.kv_width()) *
                              DocumentBlocks(config) * engine::kKvBlockTokens;
  const int64_t documents = (n_tokens + document - 1) / document;
  return std::clamp(kCacheBytesMax / cache_bytes, int64_t{1}, std::min(kBatchMax, documents));
}

absl::StatusOr<std::vector<int32_t>> GenerateText(const engine::LoadedModel& model,
                                                  int64_t n_tokens, uint64_t seed, ThreadPool& pool,
                                                  const TokenProgress& progress) {
  if (n_tokens <= 0) return std::vector<int32_t>();
  WALSH_ASSIGN_OR_RETURN(const int32_t start, StartToken(model));
  WALSH_ASSIGN_OR_RETURN(
      engine::KvPool kv,
      engine::KvPool::Create(
          {.n_layers = model.config().n_layers,
           .kv_width = model.config().kv_width(),
           .n_blocks = SelfTextBatch(model.config(), n_tokens) * DocumentBlocks(model.config())}));
  return Generator(model, std::move(kv), n_tokens, seed, pool, start).Run(progress);
}

}  // namespace walsh::calibrate
