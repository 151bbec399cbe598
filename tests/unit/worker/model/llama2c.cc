#include "tests/unit/worker/model/llama2c.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <utility>

namespace walsh::testing {
namespace {

absl::StatusOr<std::string> ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError("cannot read the file");
  return std::string{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// Takes numbers from the front of a file's bytes.
class Cursor {
 public:
  explicit Cursor(const std::string& bytes) : bytes_(bytes) {}
  template <typename T>
  void Take(T* out, int64_t n) {
    const size_t size = static_cast<size_t>(n) * sizeof(T);
    good_ = good_ && at_ + size <= bytes_.size();
    if (good_) std::memcpy(out, bytes_.data() + at_, size);
    at_ += size;
  }
  Matrix TakeMatrix(int64_t rows, int64_t cols) {
    Matrix m(rows, cols);
    Take(m.data(), m.size());
    return m;
  }
  bool good() const { return good_; }

 private:
  const std::string& bytes_;
  size_t at_ = 0;
  bool good_ = true;
};

Matrix HalfSplitRows(const Matrix& interleaved, int64_t head_dim) {
  Matrix split(interleaved.rows(), interleaved.cols());
  for (int64_t row = 0; row < split.rows(); ++row) {
    const int64_t in_head = row % head_dim;
    const int64_t half = head_dim / 2;
    const int64_t from = row - in_head + in_head % half * 2 + in_head / half;
    std::copy_n(interleaved.row(from), split.cols(), split.row(row));
  }
  return split;
}

}  // namespace

absl::StatusOr<DenseModel> ReadLlama2cModel(const std::string& path) {
  absl::StatusOr<std::string> bytes = ReadAll(path);
  if (!bytes.ok()) return bytes.status();
  Cursor cursor(*bytes);
  std::array<int32_t, 7> header{};
  cursor.Take(header.data(), 7);
  DenseModel model;
  ModelConfig& c = model.config;
  c.architecture = "LlamaForCausalLM";
  c.hidden = header[0];
  c.intermediate = header[1];
  c.n_layers = header[2];
  c.n_heads = header[3];
  c.n_kv_heads = header[4];
  c.head_dim = c.hidden / c.n_heads;
  c.vocab = header[5];  // positive: the head is the embedding
  c.max_position = header[6];
  c.rms_norm_eps = 1e-5;
  c.rope_theta = 1e4;
  c.tied_embeddings = true;
  model.embedding = cursor.TakeMatrix(c.vocab, c.hidden);
  model.layers.resize(static_cast<size_t>(c.n_layers));
  const auto norms = [&](std::vector<float> DecoderLayer::*norm) {
    for (DecoderLayer& layer : model.layers) {
      (layer.*norm).resize(static_cast<size_t>(c.hidden));
      cursor.Take((layer.*norm).data(), c.hidden);
    }
  };
  const auto linears = [&](std::unique_ptr<Linear> DecoderLayer::*linear, int64_t out, int64_t in,
                           bool rotary) {
    for (DecoderLayer& layer : model.layers) {
      Matrix weights = cursor.TakeMatrix(out, in);
      if (rotary) weights = HalfSplitRows(weights, c.head_dim);
      layer.*linear = std::make_unique<DenseLinear>(std::move(weights));
    }
  };
  norms(&DecoderLayer::input_norm);
  linears(&DecoderLayer::q_proj, c.q_width(), c.hidden, true);
  linears(&DecoderLayer::k_proj, c.kv_width(), c.hidden, true);
  linears(&DecoderLayer::v_proj, c.kv_width(), c.hidden, false);
  linears(&DecoderLayer::o_proj, c.hidden, c.q_width(), false);
  norms(&DecoderLayer::post_attention_norm);
  linears(&DecoderLayer::gate_proj, c.intermediate, c.hidden, false);
  linears(&DecoderLayer::down_proj, c.hidden, c.intermediate, false);
  linears(&DecoderLayer::up_proj, c.intermediate, c.hidden, false);
  model.final_norm.resize(static_cast<size_t>(c.hidden));
  cursor.Take(model.final_norm.data(), c.hidden);
  if (!cursor.good()) return absl::DataLossError("the file ends early");
  return model;
}

absl::StatusOr<Llama2cTokenizer> Llama2cTokenizer::Read(const std::string& path, int64_t vocab) {
  absl::StatusOr<std::string> bytes = ReadAll(path);
  if (!bytes.ok()) return bytes.status();
  Cursor cursor(*bytes);
  int32_t longest = 0;
  cursor.Take(&longest, 1);
  Llama2cTokenizer tokenizer;
  for (int64_t i = 0; i < vocab && cursor.good(); ++i) {
    float score = 0;
    int32_t length = 0;
    cursor.Take(&score, 1);
    cursor.Take(&length, 1);
    std::string piece(static_cast<size_t>(std::clamp(length, 0, longest)), '\0');
    cursor.Take(piece.data(), static_cast<int64_t>(piece.size()));
    tokenizer.ids_.emplace(piece, static_cast<int32_t>(i));  // the first of equal ones
    tokenizer.pieces_.push_back(std::move(piece));
    tokenizer.scores_.push_back(score);
  }
  if (!cursor.good()) return absl::DataLossError("the file ends early");
  return tokenizer;
}

int32_t Llama2cTokenizer::Find(const std::string& piece) const {
  const auto found = ids_.find(piece);
  return found == ids_.end() ? -1 : found->second;
}

std::vector<int32_t> Llama2cTokenizer::Encode(const std::string& text) const {
  constexpr int32_t kBos = 1;
  constexpr int32_t kFirstByte = 3;
  std::vector<int32_t> ids = {kBos, Find(" ")};
  for (size_t i = 0; i < text.size();) {
    size_t end = i + 1;
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) ++end;
    if (const int32_t id = Find(text.substr(i, end - i)); id >= 0) {
      ids.push_back(id);
    } else {
      for (; i < end; ++i) ids.push_back(kFirstByte + static_cast<unsigned char>(text[i]));
    }
    i = end;
  }
  for (;;) {
    float best = -1e10f;
    size_t best_at = 0;
    int32_t best_id = -1;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const int32_t id = Find(pieces_[ids[i]] + pieces_[ids[i + 1]]);
      if (id >= 0 && scores_[id] > best) {
        best = scores_[id];
        best_at = i;
        best_id = id;
      }
    }
    if (best_id < 0) return ids;
    ids[best_at] = best_id;
    ids.erase(ids.begin() + static_cast<int64_t>(best_at) + 1);
  }
}

}  // namespace walsh::testing
