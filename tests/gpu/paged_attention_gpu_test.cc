// Attention against the paged pool, what fills the pool, and the ends of a forward pass, against
// double on the host over the same inputs: queries in bf16, keys and values as the pool has them,
// in bf16 or as codes. Those of decoding are what QkvToCache makes of the rows, which is held to
// double by itself, and the pool must end with the same bits.
//
// All of the pool that no row sees is NaN, as are outputs before a call and what lies behind them:
// whatever is read or written beside a sequence shows. Block tables are shuffled.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/gpu_fixture.h"
#include "tests/testing/host_device/pooled_head.h"
#include "worker/kernels/cuda/paged_attention.h"
#include "worker/kernels/cuda/paged_kv.h"
#include "worker/kernels/cuda/qkv_to_cache.h"
#include "worker/kernels/cuda/token_rows.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::PooledHead;
using ::walsh::testing::StatusIs;

constexpr double kLimit = 1e-5;  // NMSE of bf16 results accumulated in fp32
// Of one row: where one token has nearly all the weight, that weight's rounding to bf16 and the
// result's are both up to 2^-9 of the result.
constexpr double kRowLimit = 1.6e-5;
// Where codes become a tile in bf16: a key's rounding, up to 2^-9 of each element, moves a score of
// these tests by 0.0025 (one standard deviation; 0.03 at the very most), and its weight by as much
// of itself. On an H200 one row in 100 was beyond 4e-5, the largest was 1.8e-4 with four heads.
constexpr double kTileRowLimit = 4e-4;
constexpr int64_t kBehind = 64;  // elements of poison behind an output
constexpr uint16_t kPoison = 0xffff;
constexpr uint8_t kPoisonByte = 0xff;

using Bits = std::vector<uint16_t>;

uint16_t BitsOf(bf16 x) {
  uint16_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
Bits BitsOf(const std::vector<bf16>& values) {
  Bits bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) bits[i] = BitsOf(values[i]);
  return bits;
}
std::vector<bf16> ToBf16(const std::vector<float>& values) {
  std::vector<bf16> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = __float2bfloat16(values[i]);
  return out;
}
std::vector<bf16> PoisonOnHost(int64_t n) {
  std::vector<bf16> values(static_cast<size_t>(n));
  std::memset(static_cast<void*>(values.data()), 0xff, values.size() * sizeof(bf16));
  return values;
}

std::vector<float> InverseFrequencies(int64_t head_dim) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    frequencies.push_back(
        std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(head_dim)));
  }
  return frequencies;
}

struct Heads {
  const char* name;
  int64_t n_heads, n_kv_heads, head_dim;
};
constexpr Heads kLlama2{"Llama2", 32, 32, 128};
constexpr Heads kLlama3{"Llama3", 32, 8, 128};
constexpr Heads kQwen{"Qwen", 14, 2, 64};
constexpr Heads kSmolLm2{"SmolLm2", 9, 3, 64};
constexpr Heads kGemma3{"Gemma3", 4, 1, 256};
constexpr Heads kPhi{"Phi", 6, 6, 96};
constexpr Heads kManyQueries{"ManyQueries", 40, 2, 32};
constexpr Heads kTiny{"Tiny", 4, 2, 16};
constexpr Heads kStories{"Stories", 6, 6, 48};

// Forms of a pool's heads in codes, all that there are for heads of this size.
std::vector<KvForm> FormsOfCodes(int64_t head_dim) {
  std::vector<KvForm> forms;
  for (const int bits : {8, 4}) {
    for (const int64_t group : {KvForm::kHead, int64_t{32}, int64_t{64}, int64_t{128}}) {
      const KvForm form{.bits = bits, .group_size = group, .clip = bits == 8 ? 1.0f : 0.95f};
      if (CheckKvForm(form, head_dim).ok()) forms.push_back(form);
    }
  }
  return forms;
}
std::string NameOf(const KvForm& form) {
  if (!form.is_quantized()) return "bf16";
  return absl::StrCat(form.bits, " bits in groups of ", form.group_size);
}

struct Length {
  int64_t n_past = 0;
  int64_t n_rows = 1;
};

using Bytes = std::vector<uint8_t>;

// A pool and a batch of sequences in it. Sequence i always has the same keys and values for the
// same `seeds[i]`, wherever it is.
class PagedBatch {
 public:
  PagedBatch(const Heads& heads, const std::vector<Length>& lengths, int64_t window,
             std::vector<uint32_t> seeds = {}, uint32_t shuffle = 1, const KvForm& form = {})
      : heads_(heads), lengths_(lengths), window_(window), seeds_(std::move(seeds)) {
    if (seeds_.empty()) {
      seeds_.resize(lengths.size());
      std::iota(seeds_.begin(), seeds_.end(), 100u);
    }
    int64_t n_blocks = 3;  // spare
    int64_t longest = 0;
    for (const Length& length : lengths) {
      layout_.n_rows += length.n_rows;
      const int64_t n = (length.n_past + length.n_rows + kPoolBlockTokens - 1) / kPoolBlockTokens;
      n_blocks += n;
      longest = std::max(longest, n);
    }
    layout_.n_sequences = static_cast<int64_t>(lengths.size());
    layout_.max_blocks = (longest + kTableAlignment - 1) / kTableAlignment * kTableAlignment;
    shape_ = {.n_blocks = n_blocks,
              .n_kv_heads = heads.n_kv_heads,
              .head_dim = heads.head_dim,
              .form = form};
    std::vector<int32_t> blocks(static_cast<size_t>(n_blocks));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(shuffle));

    pool_ = Bytes(static_cast<size_t>(shape_.size_bytes()), kPoisonByte);
    int64_t row = 0;
    auto next = blocks.begin();
    for (size_t i = 0; i < lengths.size(); ++i) {
      const int64_t n_tokens = lengths[i].n_past + lengths[i].n_rows;
      const int64_t n = (n_tokens + kPoolBlockTokens - 1) / kPoolBlockTokens;
      tables_.emplace_back(next, next + n);
      next += n;
      keys_.push_back(Floats(Random(seeds_[i], 0, n_tokens * KvWidth())));
      values_.push_back(Floats(Random(seeds_[i] + 1000, 0, n_tokens * KvWidth())));
      const std::vector<bf16> q =
          Random(seeds_[i] + 2000, lengths[i].n_past * QWidth(), lengths[i].n_rows * QWidth());
      q_.insert(q_.end(), q.begin(), q.end());
      for (const bf16 x : Random(seeds_[i] + 3000, lengths[i].n_past * QkvWidth(),
                                 lengths[i].n_rows * QkvWidth())) {
        qkv_.push_back(__bfloat162float(x) * 1.001f);  // more than bf16 holds
      }
      const int64_t seen = window > 0 ? std::max<int64_t>(0, lengths[i].n_past + 1 - window) : 0;
      for (int64_t t = seen; t < n_tokens; ++t) {
        ForToken(pool_, i, t, [&](float* values, PooledHead head) {
          head.Store({values, static_cast<size_t>(heads.head_dim)});
          for (int64_t d = 0; d < heads.head_dim; ++d) values[d] = head[d];
        });
      }
      first_rows_.push_back(row);
      row += lengths[i].n_rows;
    }
    for (size_t i = 0; i < lengths.size(); ++i) {
      sequences_.push_back({.first_row = first_rows_[i],
                            .n_rows = lengths[i].n_rows,
                            .n_past = lengths[i].n_past,
                            .table = tables_[i]});
    }
    image_.resize(static_cast<size_t>(layout_.size()));
    EXPECT_OK(layout_.Pack(sequences_, n_blocks, image_));
  }

  int64_t QWidth() const { return heads_.n_heads * heads_.head_dim; }
  int64_t KvWidth() const { return heads_.n_kv_heads * heads_.head_dim; }
  int64_t QkvWidth() const { return QWidth() + 2 * KvWidth(); }
  int64_t n_rows() const { return layout_.n_rows; }
  const KvBatchLayout& layout() const { return layout_; }
  const KvPoolShape& shape() const { return shape_; }
  const std::vector<int32_t>& image() const { return image_; }
  const Bytes& pool() const { return pool_; }
  const std::vector<bf16>& q() const { return q_; }
  const std::vector<float>& qkv() const { return qkv_; }
  const std::vector<int32_t>& table(size_t sequence) const { return tables_[sequence]; }
  int64_t first_row(size_t sequence) const { return first_rows_[sequence]; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(heads_.head_dim)); }
  // The pool without the rows' own tokens.
  Bytes PoolBeforeRows() {
    Bytes pool = pool_;
    ForRowTokens(pool, [&](float*, const PooledHead& head) {
      std::fill(head.codes().begin(), head.codes().end(), kPoisonByte);
      std::fill(head.grids().begin(), head.grids().end(), kPoisonByte);
    });
    return pool;
  }
  // Takes queries, keys and values of the rows from what QkvToCache made of them.
  void TakeRows(const std::vector<bf16>& q, const Bytes& pool) {
    q_ = q;
    pool_ = pool;
    ForRowTokens(pool_, [&](float* to, const PooledHead& head) {
      for (int64_t d = 0; d < heads_.head_dim; ++d) to[d] = head[d];
    });
  }
  // In a pool of this batch's shape.
  PooledHead HeadIn(Bytes& pool, size_t sequence, int64_t token, int64_t kv_head,
                    bool is_value) const {
    return {{.data = pool.data(), .shape = shape_},
            tables_[sequence][token / kPoolBlockTokens],
            token,
            kv_head,
            is_value};
  }

  // Row `row` of sequence `sequence` by the definition, all heads.
  std::vector<double> Expected(size_t sequence, int64_t row) const {
    const int64_t position = lengths_[sequence].n_past + row;
    const int64_t first = window_ > 0 ? std::max<int64_t>(0, position + 1 - window_) : 0;
    const int64_t dim = heads_.head_dim;
    std::vector<double> y(static_cast<size_t>(QWidth()), 0.0);
    for (int64_t h = 0; h < heads_.n_heads; ++h) {
      const int64_t kv = h / (heads_.n_heads / heads_.n_kv_heads) * dim;
      const bf16* q = q_.data() + (first_rows_[sequence] + row) * QWidth() + h * dim;
      std::vector<double> weights;
      double largest = -std::numeric_limits<double>::infinity();
      for (int64_t t = first; t <= position; ++t) {
        const float* k = keys_[sequence].data() + t * KvWidth() + kv;
        double score = 0;
        for (int64_t d = 0; d < dim; ++d) score += Value(q[d]) * static_cast<double>(k[d]);
        weights.push_back(score * scale());
        largest = std::max(largest, weights.back());
      }
      double sum = 0;
      for (double& w : weights) sum += w = std::exp(w - largest);
      for (int64_t t = first; t <= position; ++t) {
        const float* v = values_[sequence].data() + t * KvWidth() + kv;
        const double weight = weights[t - first] / sum;
        for (int64_t d = 0; d < dim; ++d) y[h * dim + d] += weight * static_cast<double>(v[d]);
      }
    }
    return y;
  }

 private:
  static double Value(bf16 x) { return static_cast<double>(__bfloat162float(x)); }
  static std::vector<float> Floats(const std::vector<bf16>& x) {
    std::vector<float> y(x.size());
    std::transform(x.begin(), x.end(), y.begin(), [](bf16 v) { return __bfloat162float(v); });
    return y;
  }
  // Sums of four uniform numbers, near a normal distribution of 1.5, each from its place alone
  // (splitmix64): rows of q belong to positions, so that a sequence's chunks have those of the
  // whole.
  static std::vector<bf16> Random(uint32_t seed, int64_t first, int64_t n) {
    std::vector<bf16> values(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      uint64_t z = (uint64_t{seed} << 40) + static_cast<uint64_t>(first + i);
      z = (z + 1) * 0x9E3779B97F4A7C15u;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      z ^= z >> 31;
      const uint64_t sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
      values[i] = __float2bfloat16(2.6f * (static_cast<float>(sum) / 65536.0f - 2.0f));
    }
    return values;
  }
  // Calls visit(values, head) for each head of a token's key and value: where it lies in keys_ or
  // values_ and in the pool.
  template <typename Visit>
  void ForToken(Bytes& pool, size_t sequence, int64_t token, const Visit& visit) {
    for (int64_t h = 0; h < heads_.n_kv_heads; ++h) {
      for (const bool is_value : {false, true}) {
        std::vector<float>& values = is_value ? values_[sequence] : keys_[sequence];
        visit(values.data() + token * KvWidth() + h * heads_.head_dim,
              HeadIn(pool, sequence, token, h, is_value));
      }
    }
  }
  template <typename Visit>
  void ForRowTokens(Bytes& pool, const Visit& visit) {
    for (size_t i = 0; i < lengths_.size(); ++i) {
      for (int64_t row = 0; row < lengths_[i].n_rows; ++row) {
        ForToken(pool, i, lengths_[i].n_past + row, visit);
      }
    }
  }

  Heads heads_;
  std::vector<Length> lengths_;
  int64_t window_;
  std::vector<uint32_t> seeds_;
  KvBatchLayout layout_;
  KvPoolShape shape_;
  std::vector<std::vector<int32_t>> tables_;
  // [n_tokens, kv_width] of each sequence, as the pool has them.
  std::vector<std::vector<float>> keys_, values_;
  std::vector<bf16> q_;
  Bytes pool_;
  std::vector<float> qkv_;
  std::vector<int64_t> first_rows_;
  std::vector<KvSequence> sequences_;
  std::vector<int32_t> image_;
};

class PagedAttentionGpuTest : public GpuTest {
 protected:
  enum class Kind { kDecode, kPrefill };
  // Which parts of the transform a decoding row has beside its rotation.
  struct With {
    bool bias = false;
    bool norm = false;
    HeadTransform heads = HeadTransform::kNone;
  };

  // y of the batch's rows; what lies behind them must stay poison.
  Bits Run(Kind kind, const Heads& heads, PagedBatch& b, int64_t window) {
    return kind == Kind::kPrefill ? RunPrefill(heads, b, window) : RunDecode(heads, b, window);
  }

  Bits RunPrefill(const Heads& heads, const PagedBatch& b, int64_t window) {
    const auto pool = Upload(b.pool());
    const auto image = Upload(b.image());
    const auto q = Upload(b.q());
    auto y = Poisoned<bf16>(b.n_rows() * b.QWidth() + kBehind);
    EXPECT_OK(PagedPrefillAttention(Params(heads, b, window, pool, image, q, y)));
    return RowBits(b, y);
  }

  // From the batch's rows of qkv: it takes over what QkvToCache makes of them.
  Bits RunDecode(const Heads& heads, PagedBatch& b, int64_t window) {
    return RunDecode(heads, b, window, With{});
  }
  Bits RunDecode(const Heads& heads, PagedBatch& b, int64_t window, const With& with) {
    const Transform transform(*this, heads, with);
    const Bytes before = b.PoolBeforeRows();
    TakeRows(heads, b, transform.params());

    auto pool = Upload(before);
    const auto image = Upload(b.image());
    const auto qkv = Upload(b.qkv());
    auto y = Poisoned<bf16>(b.n_rows() * b.QWidth() + kBehind);
    EXPECT_OK(PagedDecodeAttention(
        DecodeParams(heads, b, window, transform.params(), pool, image, qkv, y)));
    EXPECT_TRUE(Download(pool) == b.pool()) << "the pool is not as QkvToCache leaves it";
    return RowBits(b, y);
  }

  // The batch takes over what QkvToCache makes of its rows.
  void TakeRows(const Heads& heads, PagedBatch& b, const QkvTransform& transform) {
    auto pool = Upload(b.PoolBeforeRows());
    const auto image = Upload(b.image());
    const auto qkv = Upload(b.qkv());
    auto q = Poisoned<bf16>(b.n_rows() * b.QWidth());
    EXPECT_OK(QkvToCache({.batch = b.layout().View(image.data()),
                          .pool = {.data = pool.data(), .shape = b.shape()},
                          .n_heads = heads.n_heads,
                          .qkv_float = qkv.data(),
                          .transform = transform,
                          .q = q.data(),
                          .stream = context().stream()}));
    b.TakeRows(Download(q), Download(pool));
  }

  Bits RowBits(const PagedBatch& b, const DeviceBuffer<bf16>& y) {
    Bits bits = BitsOf(Download(y));
    const int64_t size = b.n_rows() * b.QWidth();
    EXPECT_TRUE(std::all_of(bits.begin() + size, bits.end(), [](uint16_t x) {
      return x == kPoison;
    })) << "written behind the rows";
    bits.resize(static_cast<size_t>(size));
    return bits;
  }

  PagedAttentionParams Params(const Heads& heads, const PagedBatch& b, int64_t window,
                              const DeviceBuffer<uint8_t>& pool, const DeviceBuffer<int32_t>& image,
                              const DeviceBuffer<bf16>& q, DeviceBuffer<bf16>& y) {
    return {.batch = b.layout().View(image.data()),
            .pool = {.data = const_cast<uint8_t*>(pool.data()), .shape = b.shape()},
            .n_heads = heads.n_heads,
            .window = window,
            .scale = b.scale(),
            .q = q.data(),
            .y = y.data(),
            .stream = context().stream()};
  }
  PagedDecodeParams DecodeParams(const Heads& heads, const PagedBatch& b, int64_t window,
                                 const QkvTransform& transform, DeviceBuffer<uint8_t>& pool,
                                 const DeviceBuffer<int32_t>& image, const DeviceBuffer<float>& qkv,
                                 DeviceBuffer<bf16>& y) {
    return {.batch = b.layout().View(image.data()),
            .pool = {.data = pool.data(), .shape = b.shape()},
            .n_heads = heads.n_heads,
            .window = window,
            .scale = b.scale(),
            .qkv = qkv.data(),
            .transform = transform,
            .y = y.data(),
            .stream = context().stream()};
  }

  class Transform {
   public:
    Transform(PagedAttentionGpuTest& test, const Heads& heads, const With& with)
        : with_(with),
          bias_(test.Upload(
              RandomNormal((heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim, 41))),
          q_norm_(test.Upload(RandomNormal(heads.head_dim, 42))),
          k_norm_(test.Upload(RandomNormal(heads.head_dim, 43))),
          frequencies_(test.Upload(InverseFrequencies(heads.head_dim))) {}
    QkvTransform params() const {
      return {.bias = with_.bias ? bias_.data() : nullptr,
              .q_norm = with_.norm ? q_norm_.data() : nullptr,
              .k_norm = with_.norm ? k_norm_.data() : nullptr,
              .eps = 1e-6f,
              .inverse_frequencies = frequencies_.data(),
              .heads = with_.heads};
    }

   private:
    With with_;
    DeviceBuffer<float> bias_, q_norm_, k_norm_, frequencies_;
  };

  static void ExpectClose(const PagedBatch& b, const std::vector<Length>& lengths, const Bits& y,
                          const std::string& what, int64_t rows_compared = 16,
                          double limit = kRowLimit) {
    for (size_t i = 0; i < lengths.size(); ++i) {
      const int64_t n = lengths[i].n_rows;
      const int64_t step = std::max<int64_t>(1, n / rows_compared);
      for (int64_t row = 0; row < n; row = row + step < n || row == n - 1 ? row + step : n - 1) {
        const std::vector<double> expected = b.Expected(i, row);
        std::vector<double> actual;
        for (int64_t c = 0; c < b.QWidth(); ++c) {
          uint32_t bits = uint32_t{y[(b.first_row(i) + row) * b.QWidth() + c]} << 16;
          float value = 0;
          std::memcpy(&value, &bits, sizeof(value));
          actual.push_back(static_cast<double>(value));
        }
        EXPECT_LE(NormalizedSquaredError(actual, expected), limit)
            << what << ", sequence " << i << " of " << lengths[i].n_past << " + " << n
            << " tokens, row " << row;
      }
    }
  }

  static Bits RowsOf(const PagedBatch& b, const Bits& y, size_t sequence, int64_t n_rows) {
    const auto begin = y.begin() + b.first_row(sequence) * b.QWidth();
    return {begin, begin + n_rows * b.QWidth()};
  }
};

std::vector<Length> DecodeLengths(const std::vector<int64_t>& contexts) {
  std::vector<Length> lengths;
  for (const int64_t n : contexts) lengths.push_back({.n_past = n - 1, .n_rows = 1});
  return lengths;
}

class DecodeGpuTest : public PagedAttentionGpuTest, public ::testing::WithParamInterface<Heads> {};
class PrefillGpuTest : public PagedAttentionGpuTest, public ::testing::WithParamInterface<Heads> {};
const auto kNameOfHeads = [](const ::testing::TestParamInfo<Heads>& info) {
  return std::string(info.param.name);
};
INSTANTIATE_TEST_SUITE_P(Shapes, DecodeGpuTest,
                         ::testing::Values(kLlama2, kLlama3, kQwen, kSmolLm2, kGemma3, kPhi,
                                           kManyQueries, kTiny, kStories),
                         kNameOfHeads);
INSTANTIATE_TEST_SUITE_P(Shapes, PrefillGpuTest,
                         ::testing::Values(kLlama2, kLlama3, kQwen, kSmolLm2, kGemma3, kPhi,
                                           kManyQueries, kTiny, kStories),
                         kNameOfHeads);

const std::vector<int64_t> kContexts = {1, 15, 16, 17, 128, 512, 513, 1000, 4097};

TEST_P(DecodeGpuTest, MixedBatchIsCloseToDouble) {
  const std::vector<Length> lengths = DecodeLengths(kContexts);
  for (const int64_t window : {0, 1, 100, 512, 1024}) {
    PagedBatch b(GetParam(), lengths, window);
    const Bits y = RunDecode(GetParam(), b, window, {.bias = window == 0, .norm = window == 100});
    ExpectClose(b, lengths, y, absl::StrCat("window ", window));
  }
}

TEST_P(DecodeGpuTest, TransformIsThatOfQkvToCache) {
  const std::vector<Length> lengths = DecodeLengths({1, 40, 257});
  for (const bool bias : {false, true}) {
    for (const bool norm : {false, true}) {
      PagedBatch b(GetParam(), lengths, 0);
      const Bits y = RunDecode(GetParam(), b, 0, {.bias = bias, .norm = norm});
      ExpectClose(b, lengths, y, absl::StrCat(bias ? "bias " : "", norm ? "norms" : ""));
    }
  }
}

// More blocks than a warp has the places of at once, 32 for each of 32 warps.
TEST_F(PagedAttentionGpuTest, LongContexts) {
  const std::vector<Length> lengths = DecodeLengths({16384, 16385, 16417, 40000});
  for (const int64_t window : {0, 20000}) {
    PagedBatch b(kTiny, lengths, window);
    ExpectClose(b, lengths, RunDecode(kTiny, b, window), absl::StrCat("window ", window));
  }
}

// Each sequence alone, and among 31 others in another order and other blocks.
TEST_P(DecodeGpuTest, SameBitsAloneAndInABatch) {
  for (const int64_t window : {0, 200}) {
    std::vector<int64_t> contexts;
    std::vector<uint32_t> seeds;
    for (int64_t i = 0; i < 32; ++i) {
      contexts.push_back(kContexts[static_cast<size_t>(i) % kContexts.size()] + i / 9);
      seeds.push_back(static_cast<uint32_t>(500 + i));
    }
    PagedBatch b(GetParam(), DecodeLengths(contexts), window, seeds, 2);
    const Bits y = RunDecode(GetParam(), b, window);
    EXPECT_EQ(y, RunDecode(GetParam(), b, window)) << "another run";
    for (size_t i = 0; i < contexts.size(); i += 5) {
      PagedBatch alone(GetParam(), DecodeLengths({contexts[i]}), window, {seeds[i]}, 3);
      EXPECT_EQ(RunDecode(GetParam(), alone, window), RowsOf(b, y, i, 1))
          << "context " << contexts[i] << ", window " << window;
    }
  }
}

// Sequences without rows have places in the batch, as a graph's bucket has more than there are.
TEST_F(PagedAttentionGpuTest, SequencesWithoutRowsAreLeftOut) {
  std::vector<Length> lengths = DecodeLengths({300, 70});
  lengths.insert(lengths.begin() + 1, {.n_past = 40, .n_rows = 0});
  lengths.push_back({.n_past = 0, .n_rows = 0});
  PagedBatch b(kLlama3, lengths, 0);
  for (const Kind kind : {Kind::kDecode, Kind::kPrefill}) {
    ExpectClose(b, lengths, Run(kind, kLlama3, b, 0), "with gaps");
  }
}

// More sequences than a warp looks at together.
TEST_F(PagedAttentionGpuTest, HundredsOfSequences) {
  std::vector<int64_t> contexts;
  for (int64_t i = 0; i < 300; ++i) contexts.push_back(1 + i * 37 % 400);
  const std::vector<Length> lengths = DecodeLengths(contexts);
  PagedBatch b(kSmolLm2, lengths, 0);
  for (const Kind kind : {Kind::kDecode, Kind::kPrefill}) {
    ExpectClose(b, lengths, Run(kind, kSmolLm2, b, 0), "300 sequences");
  }
}

// One graph for lengths that change between its replays.
TEST_F(PagedAttentionGpuTest, GraphIsReplayedWithOtherLengths) {
  const PagedBatch longest(kLlama3, DecodeLengths({700, 900, 513}), 0);
  const Transform transform(*this, kLlama3, {});
  auto pool = Upload(longest.pool());
  auto image = Upload(longest.image());
  const auto qkv = Upload(longest.qkv());
  auto y = Poisoned<bf16>(longest.n_rows() * longest.QWidth());
  PagedDecodeParams params =
      DecodeParams(kLlama3, longest, 0, transform.params(), pool, image, qkv, y);
  params.overlap_previous = true;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(params.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  for (int i = 0; i < 2; ++i) EXPECT_OK(PagedDecodeAttention(params));
  ASSERT_EQ(cudaStreamEndCapture(params.stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  for (const std::array<int64_t, 3>& contexts :
       {std::array<int64_t, 3>{700, 900, 513}, {1, 128, 512}, {129, 640, 3}}) {
    // The same rows: only lengths change.
    std::vector<int32_t> changed = longest.image();
    const KvBatch places = longest.layout().View(changed.data());
    for (int64_t i = 0; i < 3; ++i) {
      changed[places.n_past - changed.data() + i] = static_cast<int32_t>(contexts[i] - 1);
    }
    ASSERT_EQ(cudaMemcpyAsync(image.data(), changed.data(), changed.size() * sizeof(int32_t),
                              cudaMemcpyHostToDevice, params.stream),
              cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(executable, params.stream), cudaSuccess);
    const Bits replayed = BitsOf(Download(y));
    auto expected = Poisoned<bf16>(y.size());
    PagedDecodeParams direct = params;
    direct.y = expected.data();
    direct.overlap_previous = false;
    EXPECT_OK(PagedDecodeAttention(direct));
    EXPECT_EQ(replayed, BitsOf(Download(expected)));
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

TEST_P(PrefillGpuTest, MixedBatchIsCloseToDouble) {
  for (const int64_t window : {0, 1, 100, 1024}) {
    const std::vector<Length> lengths = {{0, 1},   {0, 15},    {5, 17},   {16, 64},  {100, 129},
                                         {0, 300}, {1000, 65}, {4090, 7}, {4096, 1}, {63, 128}};
    const PagedBatch b(GetParam(), lengths, window);
    ExpectClose(b, lengths, RunPrefill(GetParam(), b, window), absl::StrCat("window ", window), 8);
  }
}

TEST_P(PrefillGpuTest, SameBitsWhereverChunksAreCut) {
  constexpr int64_t kTokens = 450;
  for (const int64_t window : {0, 90}) {
    const PagedBatch whole(GetParam(), {{.n_past = 0, .n_rows = kTokens}}, window, {7});
    const Bits y = RunPrefill(GetParam(), whole, window);
    EXPECT_EQ(y, RunPrefill(GetParam(), whole, window)) << "another run";
    const std::vector<int64_t> cuts = {0, 1, 17, 64, 100, 228, 229, kTokens};
    // Each chunk alone, and all in one launch, as if each were a sequence.
    std::vector<Length> chunks;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      chunks.push_back({.n_past = cuts[i], .n_rows = cuts[i + 1] - cuts[i]});
      const PagedBatch alone(GetParam(), {chunks.back()}, window, {7}, 9);
      const Bits expected(y.begin() + cuts[i] * whole.QWidth(),
                          y.begin() + cuts[i + 1] * whole.QWidth());
      EXPECT_EQ(RunPrefill(GetParam(), alone, window), expected)
          << "rows " << cuts[i] << " to " << cuts[i + 1] << ", window " << window;
    }
    const PagedBatch together(GetParam(), chunks, window, std::vector<uint32_t>(chunks.size(), 7),
                              11);
    EXPECT_EQ(RunPrefill(GetParam(), together, window), y) << "window " << window;
  }
}

// Decoding sequences and prefilling ones are parts of one batch.
TEST_F(PagedAttentionGpuTest, PartsOfABatch) {
  const std::vector<Length> lengths = {{99, 1}, {300, 1}, {40, 70}, {0, 33}};
  PagedBatch b(kLlama3, lengths, 0);
  const Transform transform(*this, kLlama3, {});
  const Bytes before = b.PoolBeforeRows();
  TakeRows(kLlama3, b, transform.params());
  auto pool = Upload(before);
  const auto image = Upload(b.image());
  const auto qkv = Upload(b.qkv());
  auto q = Poisoned<bf16>(b.n_rows() * b.QWidth());
  auto y = Poisoned<bf16>(b.n_rows() * b.QWidth());
  PagedDecodeParams decode = DecodeParams(kLlama3, b, 0, transform.params(), pool, image, qkv, y);
  const KvBatch all = decode.batch;
  decode.batch = all.Sequences(0, 2);
  EXPECT_OK(PagedDecodeAttention(decode));
  EXPECT_OK(QkvToCache({.batch = all,
                        .pool = decode.pool,
                        .n_heads = kLlama3.n_heads,
                        .qkv_float = qkv.data(),
                        .transform = transform.params(),
                        .q = q.data(),
                        .stream = context().stream()}));
  PagedAttentionParams prefill = Params(kLlama3, b, 0, pool, image, q, y);
  prefill.batch = all.Sequences(2, 2);
  EXPECT_OK(PagedPrefillAttention(prefill));
  ExpectClose(b, lengths, BitsOf(Download(y)), "decode and prefill");
}

// Codes in the place of bf16.
class CodesGpuTest : public PagedAttentionGpuTest, public ::testing::WithParamInterface<Heads> {};
INSTANTIATE_TEST_SUITE_P(Shapes, CodesGpuTest,
                         ::testing::Values(kLlama2, kLlama3, kQwen, kSmolLm2, kGemma3, kPhi,
                                           kManyQueries),
                         kNameOfHeads);

bool HasHadamard(const Heads& heads) { return (heads.head_dim & (heads.head_dim - 1)) == 0; }

TEST_P(CodesGpuTest, DecodingIsCloseToDouble) {
  const std::vector<Length> lengths = DecodeLengths(kContexts);
  for (const KvForm& form : FormsOfCodes(GetParam().head_dim)) {
    for (const int64_t window : {0, 1, 100}) {
      PagedBatch b(GetParam(), lengths, window, {}, 1, form);
      const Bits y = RunDecode(GetParam(), b, window, {.bias = window == 0, .norm = window == 100});
      ExpectClose(b, lengths, y, absl::StrCat(NameOf(form), ", window ", window));
    }
  }
}

TEST_P(CodesGpuTest, DecodingRotatesHeadsAsQkvToCache) {
  if (!HasHadamard(GetParam())) GTEST_SKIP() << "heads of " << GetParam().head_dim;
  const std::vector<Length> lengths = DecodeLengths({1, 40, 257});
  for (const KvForm& form : FormsOfCodes(GetParam().head_dim)) {
    for (const HeadTransform heads : {HeadTransform::kHadamard, HeadTransform::kWalsh}) {
      PagedBatch b(GetParam(), lengths, 0, {}, 1, form);
      const Bits y = RunDecode(GetParam(), b, 0, {.norm = true, .heads = heads});
      ExpectClose(b, lengths, y,
                  absl::StrCat(NameOf(form), heads == HeadTransform::kWalsh ? ", Walsh" : ""));
    }
  }
}

TEST_P(CodesGpuTest, DecodingHasTheSameBitsAloneAndInABatch) {
  std::vector<int64_t> contexts;
  std::vector<uint32_t> seeds;
  for (int64_t i = 0; i < 32; ++i) {
    contexts.push_back(kContexts[static_cast<size_t>(i) % kContexts.size()] + i / 9);
    seeds.push_back(static_cast<uint32_t>(500 + i));
  }
  for (const KvForm& form : FormsOfCodes(GetParam().head_dim)) {
    PagedBatch b(GetParam(), DecodeLengths(contexts), 0, seeds, 2, form);
    const Bits y = RunDecode(GetParam(), b, 0);
    EXPECT_EQ(y, RunDecode(GetParam(), b, 0)) << NameOf(form) << ", another run";
    for (size_t i = 0; i < contexts.size(); i += 5) {
      PagedBatch alone(GetParam(), DecodeLengths({contexts[i]}), 0, {seeds[i]}, 3, form);
      EXPECT_EQ(RunDecode(GetParam(), alone, 0), RowsOf(b, y, i, 1))
          << NameOf(form) << ", context " << contexts[i];
    }
  }
}

TEST_P(CodesGpuTest, PrefillIsCloseToDouble) {
  const std::vector<Length> lengths = {{0, 1},   {0, 15},    {5, 17},   {16, 64},  {100, 129},
                                       {0, 300}, {1000, 65}, {4090, 7}, {4096, 1}, {63, 128}};
  for (const KvForm& form : FormsOfCodes(GetParam().head_dim)) {
    for (const int64_t window : {0, 1, 100}) {
      const PagedBatch b(GetParam(), lengths, window, {}, 1, form);
      ExpectClose(b, lengths, RunPrefill(GetParam(), b, window),
                  absl::StrCat(NameOf(form), ", window ", window), 8, kTileRowLimit);
    }
  }
}

TEST_P(CodesGpuTest, PrefillHasTheSameBitsWhereverChunksAreCut) {
  constexpr int64_t kTokens = 450;
  for (const KvForm& form : FormsOfCodes(GetParam().head_dim)) {
    const PagedBatch whole(GetParam(), {{.n_past = 0, .n_rows = kTokens}}, 90, {7}, 1, form);
    const Bits y = RunPrefill(GetParam(), whole, 90);
    std::vector<Length> chunks;
    const std::vector<int64_t> cuts = {0, 1, 17, 64, 100, 228, 229, kTokens};
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      chunks.push_back({.n_past = cuts[i], .n_rows = cuts[i + 1] - cuts[i]});
    }
    const PagedBatch together(GetParam(), chunks, 90, std::vector<uint32_t>(chunks.size(), 7), 11,
                              form);
    EXPECT_EQ(RunPrefill(GetParam(), together, 90), y) << NameOf(form);
  }
}

TEST_F(PagedAttentionGpuTest, LongContextsOfCodes) {
  const std::vector<Length> lengths = DecodeLengths({16384, 16417, 40000});
  for (const KvForm& form : FormsOfCodes(kManyQueries.head_dim)) {
    PagedBatch b(kManyQueries, lengths, 0, {}, 1, form);
    ExpectClose(b, lengths, RunDecode(kManyQueries, b, 0), NameOf(form));
  }
}

TEST_F(PagedAttentionGpuTest, RefusesFormsThatItDoesNotTake) {
  const PagedBatch b(kLlama3, {{.n_past = 3, .n_rows = 1}}, 0, {}, 1, {.bits = 8});
  auto pool = Upload(b.pool());
  const auto image = Upload(b.image());
  const auto q = Upload(b.q());
  const auto qkv = Upload(b.qkv());
  const Transform transform(*this, kLlama3, {});
  auto y = Poisoned<bf16>(b.n_rows() * b.QWidth());
  const PagedAttentionParams params = Params(kLlama3, b, 0, pool, image, q, y);
  const PagedDecodeParams decode =
      DecodeParams(kLlama3, b, 0, transform.params(), pool, image, qkv, y);
  const auto expect = [&](const KvForm& form, int64_t head_dim, const char* what) {
    PagedAttentionParams bad = params;
    PagedDecodeParams bad_decode = decode;
    bad.pool.shape.form = bad_decode.pool.shape.form = form;
    bad.pool.shape.head_dim = bad_decode.pool.shape.head_dim = head_dim;
    EXPECT_THAT(PagedPrefillAttention(bad),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)));
    EXPECT_THAT(PagedDecodeAttention(bad_decode),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)));
  };
  expect({.bits = 2}, 128, "2 bits");
  expect({.bits = 8}, 48, "heads of 48");
  expect({.bits = 4, .group_size = 128}, 128, "groups of 128");
  expect({.bits = 4, .group_size = 48}, 96, "groups of 48");
  expect({.bits = 4, .clip = 0}, 128, "clip ratio 0");
  PagedDecodeParams bad = decode;
  bad.pool.shape.form = {};
  bad.transform.heads = HeadTransform::kWalsh;
  EXPECT_THAT(PagedDecodeAttention(bad),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a pool of 16 bits")));
  bad = decode;
  bad.pool.shape.head_dim = 96;
  bad.transform.heads = HeadTransform::kHadamard;
  EXPECT_THAT(PagedDecodeAttention(bad),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("heads of 96")));
}

TEST_F(PagedAttentionGpuTest, RefusesWhatItDoesNotTake) {
  const Heads heads{"", 4, 2, 80};
  const PagedBatch b(heads, {{.n_past = 3, .n_rows = 1}}, 0);
  auto pool = Upload(b.pool());
  const auto image = Upload(b.image());
  const auto q = Upload(b.q());
  const auto qkv = Upload(b.qkv());
  const Transform transform(*this, heads, {});
  auto y = Poisoned<bf16>(b.n_rows() * b.QWidth());
  const PagedAttentionParams params = Params(heads, b, 0, pool, image, q, y);
  const PagedDecodeParams decode =
      DecodeParams(heads, b, 0, transform.params(), pool, image, qkv, y);
  const auto expect_of = [](const absl::Status& status, const char* what) {
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)));
  };
  // What both refuse.
  const auto expect = [&](const auto& change, const char* what) {
    PagedAttentionParams bad = params;
    PagedDecodeParams bad_decode = decode;
    change(bad);
    change(bad_decode);
    expect_of(PagedPrefillAttention(bad), what);
    expect_of(PagedDecodeAttention(bad_decode), what);
  };
  expect([](auto&) {}, "head_dim 80");
  expect([](auto& p) { p.n_heads = 5; }, "n_heads 5");
  expect([](auto& p) { p.batch.max_blocks = 6; }, "max_blocks 6");
  expect([](auto& p) { p.y += 1; }, "multiples of 16 bytes");
  expect([](auto& p) { p.y_stride = 8; }, "y_stride 8");
  expect([](auto& p) { p.scale = 0; }, "scale 0");
  expect([](auto& p) { p.window = -1; }, "window of -1");
  PagedAttentionParams bad = params;
  bad.q += 1;
  expect_of(PagedPrefillAttention(bad), "multiples of 16 bytes");
  PagedDecodeParams bad_decode = decode;
  bad_decode.qkv_stride = 639;
  expect_of(PagedDecodeAttention(bad_decode), "qkv_stride 639");
  bad_decode = decode;
  bad_decode.qkv += 1;
  expect_of(PagedDecodeAttention(bad_decode), "a multiple of 8 bytes");
  bad_decode = decode;
  bad_decode.transform.inverse_frequencies += 1;
  expect_of(PagedDecodeAttention(bad_decode), "multiples of 8 bytes");
  bad_decode = decode;
  bad_decode.batch.n_sequences = 70000;
  expect_of(PagedDecodeAttention(bad_decode), "70000 sequences");
}

TEST(KvBatchLayoutTest, RefusesWhatDoesNotFit) {
  const KvBatchLayout layout{.n_sequences = 2, .n_rows = 4, .max_blocks = 4};
  std::vector<int32_t> image(static_cast<size_t>(layout.size()));
  const std::vector<int32_t> table = {3, 1, 2, 0, 4};
  const std::span<const int32_t> two(table.data(), 2);
  const auto expect = [&](const std::vector<KvSequence>& sequences, const char* what) {
    EXPECT_THAT(layout.Pack(sequences, 5, image),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)));
  };
  EXPECT_OK(layout.Pack(std::vector<KvSequence>{{0, 2, 30, two}, {2, 2, 0, two}}, 5, image));
  expect({{0, 2, 31, two}}, "table of 2 blocks of 16 for 33 tokens");
  expect({{0, 5, 0, two}}, "a batch has 4 rows");
  expect({{0, 1, 0, table}}, "table of 5 blocks, the limit is 4");
  expect({{0, 2, 0, two}, {1, 1, 0, two}}, "row 1 is of sequences 0 and 1");
  expect({{}, {}, {}}, "3 sequences, the limit is 2");
  EXPECT_THAT(layout.Pack(std::vector<KvSequence>{{0, 1, 0, two}}, 3, image),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block 3, the pool has 3")));
  image.pop_back();
  expect({}, "it takes");
}

// Every element of q and of the pool: what it should be, or poison. Values of a grid are less than
// half a step off, after what lies beyond the grid was cut off, and the grid is that of the group.
class QkvToCacheGpuTest : public GpuTest {
 protected:
  struct With {
    bool bias = false;
    bool norm = false;
    bool is_bf16 = true;
    KvForm form = {};
    HeadTransform heads = HeadTransform::kNone;
  };

  // The value and its grid, of a group of `x` that begins at `first`.
  static void ExpectOnGrid(const std::vector<double>& x, const PooledHead& head, const KvForm& form,
                           const std::string& what) {
    const auto dim = static_cast<int64_t>(x.size());
    const int64_t group = dim / form.n_groups(dim);
    const double levels = std::ldexp(1.0, form.bits) - 1;
    for (int64_t first = 0; first < dim; first += group) {
      const auto clip = static_cast<double>(form.clip);
      const auto begin = x.begin() + first;
      const double high = clip * std::max(0.0, *std::max_element(begin, begin + group));
      const double low = clip * std::min(0.0, *std::min_element(begin, begin + group));
      const double scale = (high - low) / levels;
      EXPECT_NEAR(static_cast<double>(head.scale(first)), scale, scale * 0x1p-14) << what;
      const int zero = head.zero(first);
      EXPECT_NEAR(zero, -low / scale, 0.51) << what;
      for (int64_t d = first; d < first + group; ++d) {
        const double nearest = std::clamp(x[d], -zero * scale, (levels - zero) * scale);
        EXPECT_NEAR(static_cast<double>(head[d]), nearest, 0.51 * scale) << what << " " << d;
      }
    }
  }

  void Check(const Heads& heads, const std::vector<Length>& lengths, const With& with) {
    const PagedBatch b(heads, lengths, 0, {}, 1, with.form);
    const std::string what =
        absl::StrCat(heads.name, with.bias ? ", bias" : "", with.norm ? ", norms" : "",
                     with.is_bf16 ? ", bf16 to " : ", float to ", NameOf(with.form), ", heads ",
                     static_cast<int>(with.heads));
    const int64_t dim = heads.head_dim;
    const int64_t n_row_heads = heads.n_heads + 2 * heads.n_kv_heads;
    const int64_t width = n_row_heads * dim;
    const std::vector<float> random = RandomNormal(b.n_rows() * width, 21);
    const std::vector<bf16> rounded = ToBf16(random);
    const std::vector<float> bias = RandomNormal(width, 22);
    const std::vector<float> q_norm = RandomNormal(dim, 23);
    const std::vector<float> k_norm = RandomNormal(dim, 24);
    const std::vector<float> frequencies = InverseFrequencies(dim);
    const auto d_float = Upload(random);
    const auto d_bf16 = Upload(rounded);
    const auto d_bias = Upload(bias);
    const auto d_q_norm = Upload(q_norm);
    const auto d_k_norm = Upload(k_norm);
    const auto d_frequencies = Upload(frequencies);
    const auto image = Upload(b.image());
    auto pool = Poisoned<uint8_t>(b.shape().size_bytes());
    auto q = Poisoned<bf16>(b.n_rows() * b.QWidth() + kBehind);
    constexpr float kEps = 1e-6f;
    ASSERT_OK(QkvToCache({.batch = b.layout().View(image.data()),
                          .pool = {.data = pool.data(), .shape = b.shape()},
                          .n_heads = heads.n_heads,
                          .qkv_float = with.is_bf16 ? nullptr : d_float.data(),
                          .qkv_bf16 = with.is_bf16 ? d_bf16.data() : nullptr,
                          .transform = {.bias = with.bias ? d_bias.data() : nullptr,
                                        .q_norm = with.norm ? d_q_norm.data() : nullptr,
                                        .k_norm = with.norm ? d_k_norm.data() : nullptr,
                                        .eps = kEps,
                                        .inverse_frequencies = d_frequencies.data(),
                                        .heads = with.heads},
                          .q = q.data(),
                          .stream = context().stream()}));
    const std::vector<bf16> actual_q = Download(q);
    Bytes actual_pool = Download(pool);
    Bytes beside = actual_pool;  // poison where it was to be written
    std::vector<double> actual;
    std::vector<double> expected;
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t r = 0; r < lengths[s].n_rows; ++r) {
        const int64_t row = b.first_row(s) + r;
        const int64_t position = lengths[s].n_past + r;
        for (int64_t head = 0; head < n_row_heads; ++head) {
          std::vector<double> x(static_cast<size_t>(dim));
          double squares = 0;
          for (int64_t d = 0; d < dim; ++d) {
            const int64_t at = head * dim + d;
            x[d] = static_cast<double>(with.is_bf16 ? __bfloat162float(rounded[row * width + at])
                                                    : random[row * width + at]);
            if (with.bias) x[d] += static_cast<double>(bias[at]);
            squares += x[d] * x[d];
          }
          const bool is_query = head < heads.n_heads;
          const bool is_value = head >= heads.n_heads + heads.n_kv_heads;
          if (with.norm && !is_value) {
            const std::vector<float>& norm = is_query ? q_norm : k_norm;
            for (int64_t d = 0; d < dim; ++d) {
              x[d] *= static_cast<double>(norm[d]) /
                      std::sqrt(squares / static_cast<double>(dim) + static_cast<double>(kEps));
            }
          }
          for (int64_t d = 0; !is_value && d < dim / 2; ++d) {
            const double angle =
                static_cast<double>(position) * static_cast<double>(frequencies[d]);
            const double low = x[d];
            const double high = x[d + dim / 2];
            x[d] = low * std::cos(angle) - high * std::sin(angle);
            x[d + dim / 2] = high * std::cos(angle) + low * std::sin(angle);
          }
          if (!is_value) {
            testing::TransformHead(with.heads, with.form.n_groups(dim) > 1, x);
          }
          if (is_query) {
            for (int64_t d = 0; d < dim; ++d) {
              expected.push_back(x[d]);
              actual.push_back(static_cast<double>(
                  __bfloat162float(actual_q[row * b.QWidth() + head * dim + d])));
            }
            continue;
          }
          const int64_t kv_head = (head - heads.n_heads) % heads.n_kv_heads;
          const PooledHead in_pool = b.HeadIn(actual_pool, s, position, kv_head, is_value);
          const PooledHead in_beside = b.HeadIn(beside, s, position, kv_head, is_value);
          std::fill(in_beside.codes().begin(), in_beside.codes().end(), kPoisonByte);
          std::fill(in_beside.grids().begin(), in_beside.grids().end(), kPoisonByte);
          if (with.form.is_quantized()) {
            ExpectOnGrid(x, in_pool, with.form, what);
            continue;
          }
          for (int64_t d = 0; d < dim; ++d) {
            expected.push_back(x[d]);
            actual.push_back(static_cast<double>(in_pool[d]));
          }
        }
      }
    }
    EXPECT_LE(NormalizedSquaredError(actual, expected), kLimit) << what;
    EXPECT_EQ(std::count(beside.begin(), beside.end(), kPoisonByte),
              static_cast<int64_t>(beside.size()))
        << what << ": written beside the rows' tokens";
    for (int64_t i = b.n_rows() * b.QWidth(); i < static_cast<int64_t>(actual_q.size()); ++i) {
      EXPECT_EQ(BitsOf(actual_q[i]), kPoison);
    }
  }
};

TEST_F(QkvToCacheGpuTest, RowsOfSeveralSequences) {
  const std::vector<Length> lengths = {{0, 1}, {15, 2}, {1000, 1}, {0, 33}, {40, 0}};
  for (const Heads& heads : {kLlama2, kLlama3, kQwen, kSmolLm2, kGemma3, kPhi, kTiny, kStories}) {
    for (const bool bias : {false, true}) {
      for (const bool norm : {false, true}) Check(heads, lengths, {bias, norm, bias == norm});
    }
  }
}

TEST_F(QkvToCacheGpuTest, RowsAsCodes) {
  const std::vector<Length> lengths = {{0, 1}, {15, 2}, {1000, 1}, {0, 5}, {40, 0}};
  for (const Heads& heads : {kLlama3, kQwen, kGemma3, kPhi, kManyQueries}) {
    for (const KvForm& form : FormsOfCodes(heads.head_dim)) {
      for (const HeadTransform transform :
           {HeadTransform::kNone, HeadTransform::kHadamard, HeadTransform::kWalsh}) {
        if (transform != HeadTransform::kNone && !HasHadamard(heads)) continue;
        Check(
            heads, lengths,
            {.norm = form.bits == 8, .is_bf16 = form.bits == 8, .form = form, .heads = transform});
      }
    }
  }
}

// A head of zeros stays one, and what is not finite is seen.
TEST_F(QkvToCacheGpuTest, CodesOfWhatHasNoGrid) {
  constexpr Heads kOne{"One", 1, 1, 64};
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const KvForm& form : FormsOfCodes(kOne.head_dim)) {
    PagedBatch b(kOne, {{.n_past = 0, .n_rows = 4}}, 0, {}, 1, form);
    std::vector<float> rows(static_cast<size_t>(b.n_rows() * b.QkvWidth()), 0.0f);
    // Of the values: all zero, one NaN, one infinite, all tiny.
    const int64_t value = 2 * kOne.head_dim;
    rows[b.QkvWidth() + value + 63] = std::nanf("");
    rows[2 * b.QkvWidth() + value + 63] = -kInfinity;
    std::fill_n(rows.begin() + 3 * b.QkvWidth() + value, kOne.head_dim, 0x1p-120f);
    const auto qkv = Upload(rows);
    const auto frequencies = Upload(InverseFrequencies(kOne.head_dim));
    const auto image = Upload(b.image());
    auto pool = Poisoned<uint8_t>(b.shape().size_bytes());
    auto q = Poisoned<bf16>(b.n_rows() * b.QWidth());
    ASSERT_OK(QkvToCache({.batch = b.layout().View(image.data()),
                          .pool = {.data = pool.data(), .shape = b.shape()},
                          .n_heads = 1,
                          .qkv_float = qkv.data(),
                          .transform = {.inverse_frequencies = frequencies.data()},
                          .q = q.data(),
                          .stream = context().stream()}));
    Bytes written = Download(pool);
    for (int64_t d = 0; d < kOne.head_dim; ++d) {
      for (const int64_t token : {0, 3}) {
        EXPECT_EQ(b.HeadIn(written, 0, token, 0, true)[d], 0.0f) << NameOf(form) << " " << d;
      }
      for (const int64_t token : {1, 2}) {
        const bool is_bad = form.group_size != 32 || d >= 32;
        EXPECT_EQ(std::isnan(b.HeadIn(written, 0, token, 0, true)[d]), is_bad)
            << NameOf(form) << " " << d;
      }
    }
  }
}

// Where an angle in fp32 would be off by more than bf16 rounds.
TEST_F(QkvToCacheGpuTest, FarPositions) {
  Check(kTiny, {{131070, 2}, {65535, 1}}, {.is_bf16 = false});
}

TEST_F(QkvToCacheGpuTest, RefusesWhatItDoesNotTake) {
  QkvToCacheParams params{.pool = {.shape = {.n_blocks = 1, .n_kv_heads = 2, .head_dim = 64}},
                          .n_heads = 3};
  EXPECT_THAT(QkvToCache(params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("n_heads 3")));
  params.n_heads = 4;
  EXPECT_THAT(QkvToCache(params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("one of qkv_float")));
  params.pool.shape.head_dim = 260;
  EXPECT_THAT(QkvToCache(params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("head_dim 260")));
}

class TokenRowsGpuTest : public GpuTest {
 protected:
  std::vector<int32_t> RunArgMax(const std::vector<float>& logits, int64_t n_rows, int64_t vocab,
                                 int64_t stride) {
    const auto d_logits = Upload(logits);
    auto ids = Poisoned<int32_t>(n_rows);
    const std::vector<unsigned long long> zeros(static_cast<size_t>(2 * n_rows), 0);
    auto workspace = Upload(zeros);
    std::vector<int32_t> first;
    // Twice over the same workspace.
    for (int i = 0; i < 2; ++i) {
      EXPECT_OK(ArgMax({.n_rows = n_rows,
                        .vocab = vocab,
                        .logits = d_logits.data(),
                        .stride = stride,
                        .ids = ids.data(),
                        .workspace = workspace.data(),
                        .stream = context().stream()}));
      if (i == 0) first = Download(ids);
    }
    EXPECT_EQ(Download(ids), first);
    EXPECT_EQ(Download(workspace), zeros);
    return first;
  }
};

TEST_F(TokenRowsGpuTest, ArgMaxSweep) {
  constexpr int64_t kRows = 3;
  for (const int64_t vocab : {1, 2, 3, 4, 5, 31, 1023, 1025, 8191, 8192, 8193, 32003, 151936}) {
    const int64_t stride = (vocab + 3) / 4 * 4 + 4;
    std::vector<float> logits = RandomNormal(kRows * stride, 31, 4.0f);
    std::vector<int32_t> expected;
    for (int64_t r = 0; r < kRows; ++r) {
      float* row = logits.data() + r * stride;
      // Many ties of the largest, −0 and +0 among them in the last row.
      const float largest = *std::max_element(row, row + vocab);
      for (int64_t i = r; i < vocab; i += 1 + vocab / 5) row[i] = largest;
      if (r == 2) {
        for (int64_t i = 0; i < vocab; ++i) row[i] = row[i] == largest ? 0.0f : -1.0f;
        *std::find(row, row + vocab, 0.0f) = -0.0f;
      }
      for (int64_t i = vocab; i < stride; ++i) row[i] = std::nanf("");
      expected.push_back(static_cast<int32_t>(std::max_element(row, row + vocab) - row));
    }
    EXPECT_EQ(RunArgMax(logits, kRows, vocab, stride), expected) << vocab;
  }
}

TEST_F(TokenRowsGpuTest, ArgMaxOfNoToken) {
  constexpr int64_t kVocab = 20000;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> logits(5 * kVocab, -kInfinity);
  logits[1 * kVocab + 19999] = -std::numeric_limits<float>::max();
  std::fill_n(logits.begin() + 2 * kVocab, kVocab, 1.0f);
  logits[2 * kVocab + 9000] = std::nanf("");
  logits[3 * kVocab + 12345] = kInfinity;
  std::fill_n(logits.begin() + 4 * kVocab, kVocab, -std::nanf(""));
  EXPECT_EQ(RunArgMax(logits, 5, kVocab, kVocab), (std::vector<int32_t>{-1, 19999, -1, -1, -1}));
}

TEST_F(TokenRowsGpuTest, ArgMaxRefusesWhatItDoesNotTake) {
  EXPECT_THAT(ArgMax({.n_rows = 2, .vocab = 6}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("6 apart")));
  EXPECT_THAT(ArgMax({.n_rows = 70000, .vocab = 8}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("70000 rows")));
  EXPECT_THAT(ArgMax({.n_rows = 1, .vocab = 0}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("vocabulary of 0")));
}

TEST_F(TokenRowsGpuTest, NormedRowsAreAdded) {
  constexpr float kEps = 1e-2f;  // so large that it is seen
  for (const int64_t n : {0, 1, 33}) {
    for (const int64_t dim : {4, 288, 640, 1152, 5376}) {
      SCOPED_TRACE(std::to_string(n) + " x " + std::to_string(dim));
      const std::vector<float> x = RandomNormal(n * dim, 41, 0.2f);
      const std::vector<float> weight = RandomNormal(dim, 42);
      std::vector<float> hidden = RandomNormal(n * dim + kBehind, 43);
      const auto d_x = Upload(x);
      const auto d_weight = Upload(weight);
      auto d_hidden = Upload(hidden);
      ASSERT_OK(AddNormedRows({.n_rows = n,
                               .dim = dim,
                               .x = d_x.data(),
                               .weight = d_weight.data(),
                               .eps = kEps,
                               .hidden = d_hidden.data(),
                               .stream = context().stream()}));
      std::vector<double> expected(hidden.begin(), hidden.end());
      for (int64_t row = 0; row < n; ++row) {
        double squares = 0;
        for (int64_t i = 0; i < dim; ++i) {
          const auto v = static_cast<double>(x[static_cast<size_t>(row * dim + i)]);
          squares += v * v;
        }
        const double factor =
            1 / std::sqrt(squares / static_cast<double>(dim) + static_cast<double>(kEps));
        for (int64_t i = 0; i < dim; ++i) {
          const auto at = static_cast<size_t>(row * dim + i);
          expected[at] += factor * static_cast<double>(x[at]) *
                          static_cast<double>(weight[static_cast<size_t>(i)]);
        }
      }
      const std::vector<float> actual = Download(d_hidden);
      EXPECT_LT(NormalizedSquaredError(actual, expected), 1e-12);
      EXPECT_TRUE(std::equal(actual.end() - kBehind, actual.end(), hidden.end() - kBehind));
    }
  }
}

TEST_F(TokenRowsGpuTest, AddNormedRowsRefusesWhatItDoesNotTake) {
  EXPECT_THAT(AddNormedRows({.n_rows = 1, .dim = 6}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dim 6")));
  EXPECT_THAT(AddNormedRows({.n_rows = 70000, .dim = 8}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("70000 rows")));
  const auto x = Upload(RandomNormal(16, 44));
  EXPECT_THAT(AddNormedRows({.n_rows = 1, .dim = 8, .x = x.data() + 1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("multiples of 16 bytes")));
}

TEST_F(TokenRowsGpuTest, EmbedRowsSweep) {
  constexpr int64_t kVocab = 13;
  for (const int64_t n : {0, 1, 31}) {
    for (const int64_t dim : {8, 288, 576, 1024, 1032, 4096}) {
      const std::vector<bf16> table = ToBf16(RandomNormal(kVocab * dim, 1));
      std::vector<int32_t> ids;
      for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(i * 5 % (kVocab + 2)) - 1);
      const auto d_table = Upload(table);
      const auto d_ids = Upload(ids);
      auto hidden = Poisoned<float>(n * dim + kBehind);
      constexpr float kScale = 1.25f;
      ASSERT_OK(EmbedRows({.n_rows = n,
                           .dim = dim,
                           .vocab = kVocab,
                           .ids = d_ids.data(),
                           .table = d_table.data(),
                           .scale = kScale,
                           .hidden = hidden.data(),
                           .stream = context().stream()}));
      const std::vector<float> actual = Download(hidden);
      for (int64_t i = 0; i < n * dim; ++i) {
        const int32_t id = ids[i / dim];
        if (id < 0 || id >= kVocab) {
          ASSERT_TRUE(std::isnan(actual[i])) << n << " " << dim << " " << i;
        } else {
          ASSERT_EQ(actual[i], kScale * __bfloat162float(table[id * dim + i % dim]))
              << n << " " << dim << " " << i;
        }
      }
      for (int64_t i = n * dim; i < n * dim + kBehind; ++i) ASSERT_TRUE(std::isnan(actual[i]));
    }
  }
  EXPECT_THAT(EmbedRows({.n_rows = 1, .dim = 12}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dim 12")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
