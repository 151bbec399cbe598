// The operations of serving on the host, as their headers specify them: what worker/engine/cuda is
// tested with where there is no device. A ServingMatrix holds its weights as floats here, in the
// stacked order.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "common/status_macros.h"
#include "tests/testing/host_device/pooled_head.h"
#include "worker/io/gptq_packing.h"
#include "worker/kernels/counter_rng.h"
#include "worker/kernels/cuda/dense_matmul.h"
#include "worker/kernels/cuda/low_bit_gemm.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/paged_attention.h"
#include "worker/kernels/cuda/qkv_to_cache.h"
#include "worker/kernels/cuda/sample_rows.h"
#include "worker/kernels/cuda/serving_layout.h"
#include "worker/kernels/cuda/token_rows.h"
#include "worker/kernels/cuda/token_tiles.h"
#include "worker/kernels/cuda/transform_activations.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cuda {
namespace {

const float* FloatsOf(const ServingMatrix& matrix) {
  return reinterpret_cast<const float*>(matrix.blocks());
}
float* FloatsOf(DeviceBuffer<uint8_t>& blocks) { return reinterpret_cast<float*>(blocks.data()); }

// The value of `bits` bits that is number `index` in a stream of words, `stride` apart.
uint32_t FieldAt(const uint32_t* words, int64_t stride, int bits, int64_t index) {
  const int64_t bit = index * bits;
  const uint64_t low = words[bit / 32 * stride];
  const bool is_split = bit % 32 + bits > 32;
  const uint64_t high = is_split ? words[(bit / 32 + 1) * stride] : 0;
  return static_cast<uint32_t>((low | high << 32) >> (bit % 32)) & ((1u << bits) - 1);
}

float HalfAt(const __half* values, int64_t index) {
  return HalfToFloat(reinterpret_cast<const uint16_t*>(values)[index]);
}

// Of row `row` of a linear as it is stored, and column c of the matrix.
float WeightAt(const ServingMatrix::Source& source, const StoredLinear& linear, int64_t row,
               int64_t c) {
  const int64_t stored = source.column_order == nullptr ? c : source.column_order[c];
  const uint32_t code = FieldAt(linear.qweight + row, linear.rows, source.bits, stored);
  const int64_t group = c / source.group_size;
  const int64_t grid = group * linear.rows + row;
  if (linear.levels != nullptr) return HalfAt(linear.levels, 4 * grid + code);
  const float zero =
      linear.zeros != nullptr
          ? HalfAt(linear.zeros, grid)
          : static_cast<float>(FieldAt(linear.qzeros + group * (linear.rows / 32 * source.bits), 1,
                                       source.bits, row));
  return HalfAt(linear.scales, grid) * (static_cast<float>(code) - zero);
}

// Each block times the orthonormal Hadamard matrix in natural order: entry (i, j) has the sign of
// the parity of i & j.
void RotateBlocks(int64_t block, std::vector<double>& x) {
  if (block == 0) return;
  std::vector<double> in(static_cast<size_t>(block));
  for (auto first = x.begin(); first != x.end(); first += block) {
    std::copy_n(first, block, in.begin());
    for (int64_t i = 0; i < block; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < block; ++j) {
        const bool is_odd = std::popcount(static_cast<uint64_t>(i & j)) % 2 != 0;
        sum += is_odd ? -in[static_cast<size_t>(j)] : in[static_cast<size_t>(j)];
      }
      first[i] = sum / std::sqrt(static_cast<double>(block));
    }
  }
}

float Activated(LowBitOutput output, float gate) {
  const double g = gate;
  if (output == LowBitOutput::kSiluMul) return static_cast<float>(g / (1 + std::exp(-g)));
  const double inner = std::sqrt(2 / std::acos(-1.0)) * (g + 0.044715 * g * g * g);
  return static_cast<float>(0.5 * g * (1 + std::tanh(inner)));
}

using testing::PooledHead;
using testing::TransformHead;

// The one that has a sequence's token.
// What a product multiplies: the row of `params` whose first column is at `first`, behind its norm,
// in the order that is asked for, and rotated.
template <typename Params>
std::vector<double> InputRow(const Params& p, int64_t first, int64_t cols) {
  std::vector<double> x(static_cast<size_t>(cols));
  double squares = 0;
  for (int64_t c = 0; c < cols; ++c) {
    const int64_t from = p.input_order == nullptr ? c : p.input_order[c];
    const double value =
        p.x != nullptr ? __bfloat162float(p.x[first + from]) : p.x_float[first + from];
    squares += value * value;
    x[static_cast<size_t>(c)] = value * (p.norm_weight == nullptr ? 1 : p.norm_weight[from]);
  }
  RotateBlocks(p.rotation_block, x);
  if (p.has_norm) {
    const double factor = 1 / std::sqrt(squares / static_cast<double>(cols) + p.eps);
    for (double& value : x) value *= factor;
  }
  return x;
}
// A row of a product, pairs of them made one.
std::vector<float> OutputRow(const ServingMatrix& weights, const std::vector<double>& x,
                             LowBitOutput output, const float* bias) {
  const int64_t rows = weights.shape().rows;
  std::vector<float> y;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = FloatsOf(weights) + r * weights.shape().cols;
    double sum = bias == nullptr ? 0 : bias[r];
    for (size_t c = 0; c < x.size(); ++c) sum += row[c] * x[c];
    y.push_back(static_cast<float>(sum));
  }
  if (!IsOfPairs(output)) return y;
  const auto half = static_cast<size_t>(rows / 2);
  for (size_t r = 0; r < half; ++r) y[r] = Activated(output, y[r]) * y[r + half];
  y.resize(half);
  return y;
}
void WriteRow(const std::vector<float>& y, LowBitOutput output, int64_t at, float* y_float,
              __nv_bfloat16* y_bf16) {
  for (const float value : y) {
    if (y_bf16 != nullptr) {
      y_bf16[at] = __float2bfloat16(value);
    } else {
      y_float[at] = output == LowBitOutput::kAdd ? y_float[at] + value : value;
    }
    ++at;
  }
}

int64_t BlockOf(const KvBatch& batch, int64_t sequence, int64_t token) {
  return batch.tables[sequence * batch.max_blocks + token / kPoolBlockTokens];
}

void AttendRow(const PagedAttentionParams& p, int64_t sequence, int64_t row, int64_t position) {
  const KvPoolShape& shape = p.pool.shape;
  const int64_t dim = shape.head_dim;
  const int64_t first = p.window > 0 ? std::max<int64_t>(0, position + 1 - p.window) : 0;
  for (int64_t h = 0; h < p.n_heads; ++h) {
    const int64_t kv_head = h / (p.n_heads / shape.n_kv_heads);
    const bf16* q = p.q + (row * p.n_heads + h) * dim;
    std::vector<double> scores;
    for (int64_t t = first; t <= position; ++t) {
      const PooledHead k(p.pool, BlockOf(p.batch, sequence, t), t, kv_head, false);
      double score = 0;
      for (int64_t i = 0; i < dim; ++i) score += __bfloat162float(q[i]) * k[i];
      scores.push_back(score * p.scale);
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (double& score : scores) sum += score = std::exp(score - largest);
    for (int64_t i = 0; i < dim; ++i) {
      double y = 0;
      for (int64_t t = first; t <= position; ++t) {
        const PooledHead v(p.pool, BlockOf(p.batch, sequence, t), t, kv_head, true);
        y += scores[static_cast<size_t>(t - first)] / sum * v[i];
      }
      p.y[(row * p.n_heads + h) * dim + i] = __float2bfloat16(static_cast<float>(y));
    }
  }
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// −1 where there is a NaN, or none above −infinity.
int32_t BestOf(std::span<const float> logits) {
  if (std::any_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x); })) return -1;
  const auto best = std::max_element(logits.begin(), logits.end());
  return *best > -kInfinity ? static_cast<int32_t>(best - logits.begin()) : -1;
}

// The first n, most probable first.
std::vector<int32_t> MostProbable(std::span<const float> logits, int64_t n) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  ids.resize(static_cast<size_t>(std::min<int64_t>(n, static_cast<int64_t>(ids.size()))));
  return ids;
}

void ChangeLogits(const SampleRowsParams& p, const SampleRow& row, std::span<float> logits) {
  const auto is_token = [&](int32_t id) { return id >= 0 && id < p.vocab; };
  std::vector<SeenToken> seen(p.seen + row.first_seen, p.seen + row.first_seen + row.n_seen);
  if (row.uncounted >= 0) {
    const int32_t token = p.made[row.uncounted];
    const auto it = std::find_if(seen.begin(), seen.end(),
                                 [&](const SeenToken& entry) { return entry.token == token; });
    if (it == seen.end()) {
      seen.push_back({.token = token, .n_output = 1});
    } else {
      ++it->n_output;
    }
  }
  for (const SeenToken& entry : seen) {
    if (!is_token(entry.token)) continue;
    float& logit = logits[entry.token];
    const auto repetition = static_cast<float>(row.repetition_penalty);
    logit = logit > 0 ? logit / repetition : logit * repetition;
    if (entry.n_output == 0) continue;
    logit -= static_cast<float>(row.presence_penalty + row.frequency_penalty * entry.n_output);
  }
  for (int32_t i = row.first_excluded; i < row.first_excluded + row.n_excluded; ++i) {
    if (is_token(p.excluded[i])) logits[p.excluded[i]] = -kInfinity;
  }
}

int32_t Draw(const SampleRow& row, std::span<const float> logits, float largest) {
  const double floor = row.min_p > 0 ? largest + row.temperature * std::log(row.min_p) : -kInfinity;
  std::vector<int32_t> ids =
      MostProbable(logits, row.top_k > 0 ? row.top_k : static_cast<int64_t>(logits.size()));
  std::vector<double> weights(logits.size());
  double total = 0;
  for (const int32_t id : ids) {
    if (logits[id] < static_cast<float>(floor)) continue;
    weights[id] = std::exp((static_cast<double>(logits[id]) - largest) / row.temperature);
    total += weights[id];
  }
  double mass = 0;
  for (const int32_t id : ids) {
    if (row.top_p < 1 && mass > 0 && mass >= row.top_p * total) weights[id] = 0;
    mass += weights[id];
  }
  const double target = UniformAt(row.seed, row.position) * mass;
  double sum = 0;
  for (size_t id = 0; id < weights.size(); ++id) {
    sum += weights[id];
    if (sum > target) return static_cast<int32_t>(id);
  }
  return ids.front();
}

int32_t SampleOneRow(const SampleRowsParams& p, int64_t index, std::span<float> logits) {
  const SampleRow& row = p.rows[index];
  if (row.changed_seen >= 0) p.seen[row.first_seen + row.changed_seen] = row.changed;
  const std::vector<float> raw(logits.begin(), logits.end());
  const int32_t raw_best = BestOf(raw);
  if (raw_best < 0 || std::isinf(raw[raw_best])) return kNotFinite;
  ChangeLogits(p, row, logits);
  const int32_t best = BestOf(logits);
  if (best < 0) return kNoTokenLeft;
  const bool draws = row.temperature > 0 && !std::isinf(logits[best]);
  const int32_t token = draws ? Draw(row, logits, logits[best]) : best;
  if (row.n_top_logprobs < 0) return token;
  double sum = 0;
  for (const float x : raw) sum += std::exp(static_cast<double>(x) - raw[raw_best]);
  const double log_sum = raw[raw_best] + std::log(sum);
  p.logprobs[index] = static_cast<float>(raw[token] - log_sum);
  int64_t place = index * kTopLogprobsMax;
  for (const int32_t id : MostProbable(raw, std::min(row.n_top_logprobs, kTopLogprobsMax))) {
    p.top_ids[place] = id;
    p.top_logprobs[place++] = static_cast<float>(raw[id] - log_sum);
  }
  return token;
}

}  // namespace

// -- Quantized weights --------------------------------------------------------------------------

absl::Status ValidateServingShape(const ServingShape& shape) {
  const int64_t group = shape.group_size;
  if (group == 32 || group == 64 || group % 128 == 0 || group == shape.cols) {
    return absl::OkStatus();
  }
  return absl::UnimplementedError("a group of another size");
}

absl::StatusOr<ServingMatrix> ServingMatrix::Allocate(const ServingShape& shape,
                                                      cudaStream_t stream) {
  ServingMatrix matrix;
  matrix.shape_ = shape;
  WALSH_ASSIGN_OR_RETURN(matrix.blocks_,
                         DeviceBuffer<uint8_t>::Allocate(shape.rows * shape.cols * 4, stream));
  return matrix;
}

absl::StatusOr<ServingMatrix> ServingMatrix::Build(const Source& source, cudaStream_t stream) {
  ServingShape shape{.cols = source.cols,
                     .bits = source.bits,
                     .group_size = source.group_size,
                     .has_codebook = source.linears[0].levels != nullptr,
                     .order = source.order};
  for (const StoredLinear& linear : source.linears) shape.rows += linear.rows;
  WALSH_ASSIGN_OR_RETURN(ServingMatrix matrix, Allocate(shape, stream));
  float* to = FloatsOf(matrix.blocks_);
  for (const StoredLinear& linear : source.linears) {
    for (int64_t r = 0; r < linear.rows; ++r) {
      for (int64_t c = 0; c < source.cols; ++c) {
        *to++ = WeightAt(source, linear, linear.row_order == nullptr ? r : linear.row_order[r], c);
      }
    }
  }
  return matrix;
}

absl::StatusOr<ServingMatrix> ServingMatrix::Quantize(const Dense& dense, cudaStream_t stream) {
  constexpr int64_t kGroup = 128;
  WALSH_ASSIGN_OR_RETURN(
      ServingMatrix matrix,
      Allocate({.rows = dense.rows, .cols = dense.cols, .bits = 8, .group_size = kGroup}, stream));
  float* to = FloatsOf(matrix.blocks_);
  for (int64_t r = 0; r < dense.rows; ++r) {
    for (int64_t first = 0; first < dense.cols; first += kGroup) {
      const __nv_bfloat16* from = dense.weights + r * dense.cols + first;
      const int64_t n = std::min(kGroup, dense.cols - first);
      float largest = 0;
      for (int64_t i = 0; i < n; ++i) {
        largest = std::max(largest, std::fabs(__bfloat162float(from[i])));
      }
      const float scale = HalfToFloat(FloatToHalf(largest / 127));
      for (int64_t i = 0; i < n; ++i) {
        const float value = __bfloat162float(from[i]);
        *to++ = scale == 0 ? 0 : scale * std::nearbyint(value / scale);
      }
    }
  }
  return matrix;
}

absl::Status ServingMatrix::Dequantize(__nv_bfloat16* weights, cudaStream_t) const {
  const float* from = FloatsOf(*this);
  std::transform(from, from + shape_.rows * shape_.cols, weights,
                 [](float value) { return __float2bfloat16(value); });
  return absl::OkStatus();
}

int64_t LowBitWorkspaceBytes(int64_t, int64_t) { return 1; }

absl::Status LowBitMatmul(const LowBitMatmulParams& p) {
  const int64_t cols = p.weights->shape().cols;
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    const std::vector<double> x = InputRow(p, t * (p.x_stride == 0 ? cols : p.x_stride), cols);
    const std::vector<float> y = OutputRow(*p.weights, x, p.output, p.bias);
    const auto n = static_cast<int64_t>(y.size());
    WriteRow(y, p.output, t * (p.y_stride == 0 ? n : p.y_stride), p.y_float, p.y_bf16);
  }
  return absl::OkStatus();
}

// Tiles are plain rows here.
int64_t TokenTilesCapacity(int64_t n_tokens) { return n_tokens; }
int64_t TokenTilesSize(int64_t capacity, int64_t cols) { return capacity * cols; }

absl::Status MakeTokenTiles(const MakeTokenTilesParams& p) {
  const int64_t cols = p.tiles.cols;
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    const std::vector<double> x = InputRow(p, t * cols, cols);
    for (int64_t c = 0; c < cols; ++c) {
      p.tiles.data[t * cols + c] = __float2bfloat16(static_cast<float>(x[static_cast<size_t>(c)]));
    }
  }
  return absl::OkStatus();
}

bool HasLowBitGemm() { return true; }

absl::Status LowBitGemm(const LowBitGemmParams& p) {
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    std::vector<double> x;
    for (int64_t c = 0; c < p.x.cols; ++c) {
      x.push_back(__bfloat162float(p.x.data[t * p.x.cols + c]));
    }
    const std::vector<float> y = OutputRow(*p.weights, x, p.output, p.bias);
    const auto n = static_cast<int64_t>(y.size());
    WriteRow(y, p.output, t * (p.y_stride == 0 ? n : p.y_stride), p.y_float,
             p.y_tiles.data != nullptr ? p.y_tiles.data : p.y_bf16);
  }
  return absl::OkStatus();
}

absl::Status DenseMatmul(const DenseMatmulParams& p) {
  const int64_t y_stride = p.y_stride == 0 ? p.rows : p.y_stride;
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    const auto x = [&](int64_t c) {
      const int64_t at = t * p.cols + c;
      return static_cast<double>(p.x != nullptr ? __bfloat162float(p.x[at]) : p.x_float[at]);
    };
    double squares = 0;
    for (int64_t c = 0; c < p.cols; ++c) squares += x(c) * x(c);
    const double factor =
        p.has_norm ? 1 / std::sqrt(squares / static_cast<double>(p.cols) + p.eps) : 1;
    for (int64_t r = 0; r < p.rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < p.cols; ++c) {
        sum += __bfloat162float(p.weights[r * p.cols + c]) * x(c) *
               (p.norm_weight == nullptr ? 1 : p.norm_weight[c]);
      }
      const auto y = static_cast<float>(sum * factor + (p.bias == nullptr ? 0 : p.bias[r]));
      const int64_t at = t * y_stride + r;
      if (p.y_bf16 != nullptr) {
        p.y_bf16[at] = __float2bfloat16(y);
      } else {
        p.y_float[at] = p.accumulate ? p.y_float[at] + y : y;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status TransformActivations(const TransformActivationsParams& p) {
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    std::vector<double> x(static_cast<size_t>(p.cols));
    for (int64_t c = 0; c < p.cols; ++c) {
      const int64_t from = p.input_order == nullptr ? c : p.input_order[c];
      x[static_cast<size_t>(c)] = __bfloat162float(p.x[t * p.cols + from]);
    }
    RotateBlocks(p.rotation_block, x);
    std::transform(x.begin(), x.end(), p.y + t * p.cols,
                   [](double value) { return __float2bfloat16(static_cast<float>(value)); });
  }
  return absl::OkStatus();
}

// -- Attention ----------------------------------------------------------------------------------

bool IsPagedHeadDim(int64_t head_dim) { return head_dim >= 16; }

absl::Status QkvToCache(const QkvToCacheParams& p) {
  const KvPoolShape& shape = p.pool.shape;
  const int64_t dim = shape.head_dim;
  const int64_t n_rotated = p.n_heads + shape.n_kv_heads;
  const int64_t n_all = n_rotated + shape.n_kv_heads;
  for (int64_t row = 0; row < p.batch.n_rows; ++row) {
    const int64_t s = p.batch.sequence_of_row[row];
    if (s < 0) continue;
    const int64_t position = p.batch.n_past[s] + row - p.batch.first_row[s];
    for (int64_t h = 0; h < n_all; ++h) {
      std::vector<float> x(static_cast<size_t>(dim));
      double squares = 0;
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t at = h * dim + i;
        const float bias = p.transform.bias == nullptr ? 0 : p.transform.bias[at];
        x[static_cast<size_t>(i)] = p.qkv_float[row * n_all * dim + at] + bias;
        squares += x[static_cast<size_t>(i)] * x[static_cast<size_t>(i)];
      }
      const float* norm = h < p.n_heads   ? p.transform.q_norm
                          : h < n_rotated ? p.transform.k_norm
                                          : nullptr;
      for (int64_t i = 0; norm != nullptr && i < dim; ++i) {
        x[static_cast<size_t>(i)] *=
            norm[i] /
            static_cast<float>(std::sqrt(squares / static_cast<double>(dim) + p.transform.eps));
      }
      for (int64_t i = 0; h < n_rotated && i < dim / 2; ++i) {
        float& a = x[static_cast<size_t>(i)];
        float& b = x[static_cast<size_t>(i + dim / 2)];
        const double angle = static_cast<double>(position) * p.transform.inverse_frequencies[i];
        const auto sine = static_cast<float>(std::sin(angle));
        const auto cosine = static_cast<float>(std::cos(angle));
        std::tie(a, b) = std::pair(a * cosine - b * sine, b * cosine + a * sine);
      }
      if (h < n_rotated) TransformHead(p.transform.heads, shape.form.n_groups(dim) > 1, x);
      if (h < p.n_heads) {
        std::transform(x.begin(), x.end(), p.q + (row * p.n_heads + h) * dim,
                       [](float value) { return __float2bfloat16(value); });
      } else {
        const bool is_value = h >= n_rotated;
        PooledHead(p.pool, BlockOf(p.batch, s, position), position,
                   h - (is_value ? n_rotated : p.n_heads), is_value)
            .Store(x);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status PagedPrefillAttention(const PagedAttentionParams& p) {
  for (int64_t s = 0; s < p.batch.n_sequences; ++s) {
    for (int64_t i = 0; i < p.batch.n_sequence_rows[s]; ++i) {
      AttendRow(p, s, p.batch.first_row[s] + i, p.batch.n_past[s] + i);
    }
  }
  return absl::OkStatus();
}

absl::Status PagedDecodeAttention(const PagedDecodeParams& p) {
  const KvPoolShape& shape = p.pool.shape;
  std::vector<bf16> q(static_cast<size_t>(p.batch.n_rows * p.n_heads * shape.head_dim));
  WALSH_RETURN_IF_ERROR(QkvToCache({.batch = p.batch,
                                    .pool = p.pool,
                                    .n_heads = p.n_heads,
                                    .qkv_float = p.qkv,
                                    .transform = p.transform,
                                    .q = q.data()}));
  return PagedPrefillAttention({.batch = p.batch,
                                .pool = p.pool,
                                .n_heads = p.n_heads,
                                .window = p.window,
                                .scale = p.scale,
                                .q = q.data(),
                                .y = p.y});
}

// -- Ends of a pass -----------------------------------------------------------------------------

absl::Status EmbedRows(const EmbedRowsParams& p) {
  for (int64_t row = 0; row < p.n_rows; ++row) {
    const int32_t id = p.ids[row] < 0 ? p.made[-1 - p.ids[row]] : p.ids[row];
    const bool is_token = id >= 0 && id < p.vocab;
    for (int64_t i = 0; i < p.dim; ++i) {
      p.hidden[row * p.dim + i] = is_token ? p.scale * __bfloat162float(p.table[id * p.dim + i])
                                           : std::numeric_limits<float>::quiet_NaN();
    }
  }
  return absl::OkStatus();
}

absl::Status AddNormedRows(const AddNormedRowsParams& p) {
  for (int64_t row = 0; row < p.n_rows; ++row) {
    const float* x = p.x + row * p.dim;
    const double squares = std::inner_product(x, x + p.dim, x, 0.0);
    const double factor = 1 / std::sqrt(squares / static_cast<double>(p.dim) + p.eps);
    for (int64_t i = 0; i < p.dim; ++i) {
      p.hidden[row * p.dim + i] += static_cast<float>(factor * x[i] * p.weight[i]);
    }
  }
  return absl::OkStatus();
}

absl::Status ArgMax(const ArgMaxParams& p) {
  const int64_t stride = p.stride == 0 ? p.vocab : p.stride;
  for (int64_t row = 0; row < p.n_rows; ++row) {
    const float* logits = p.logits + row * stride;
    const int32_t best = BestOf({logits, static_cast<size_t>(p.vocab)});
    p.ids[row] = best >= 0 && std::isinf(logits[best]) ? -1 : best;
  }
  return absl::OkStatus();
}

absl::Status SampleRows(const SampleRowsParams& p) {
  const int64_t stride = p.stride == 0 ? p.vocab : p.stride;
  for (int64_t row = 0; row < p.n_rows; ++row) {
    const std::span<float> logits(p.logits + row * stride, static_cast<size_t>(p.vocab));
    p.ids[row] = SampleOneRow(p, row, logits);
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
