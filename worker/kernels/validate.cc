#include "worker/kernels/validate.h"

#include <bit>
#include <cmath>
#include <limits>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::kernels {
namespace {

// BLAS counts in 32 bits; no row, column or token count of a real model comes near.
constexpr int64_t kSizeMax = std::numeric_limits<int32_t>::max();

// Collects the first violation of one operation's parameters.
class Checker {
 public:
  explicit Checker(std::string_view op) : op_(op) {}

  Checker& Size(std::string_view field, int64_t value) {
    if (value < 0 || value > kSizeMax) Fail(field, "must be in [0, ", kSizeMax, "], is ", value);
    return *this;
  }
  Checker& Positive(std::string_view field, int64_t value) {
    if (value < 1 || value > kSizeMax) Fail(field, "must be in [1, ", kSizeMax, "], is ", value);
    return *this;
  }
  Checker& Stride(std::string_view field, int64_t value, int64_t row) {
    if (value < row || value > kSizeMax) {
      Fail(field, "must be in [", row, ", ", kSizeMax, "], is ", value);
    }
    return *this;
  }
  // Required unless the array is empty.
  Checker& Pointer(std::string_view field, const void* pointer, int64_t rows, int64_t cols = 1) {
    if (pointer == nullptr && rows > 0 && cols > 0) Fail(field, "is null");
    return *this;
  }
  Checker& Index(std::string_view field, const int32_t* values, int64_t n, int64_t end) {
    if (!status_.ok()) return *this;
    for (int64_t i = 0; i < n; ++i) {
      if (values[i] < 0 || values[i] >= end) {
        Fail(absl::StrCat(absl::string_view(field.data(), field.size()), "[", i, "]"),
             "must be in [0, ", end, "), is ", values[i]);
        break;
      }
    }
    return *this;
  }
  Checker& Finite(std::string_view field, float value) {
    if (!std::isfinite(value)) Fail(field, "must be finite, is ", value);
    return *this;
  }
  template <typename... Parts>
  Checker& That(bool holds, std::string_view field, Parts... parts) {
    if (!holds) Fail(field, parts...);
    return *this;
  }
  absl::Status status() const { return status_; }

 private:
  template <typename... Parts>
  void Fail(std::string_view field, Parts... parts) {
    if (!status_.ok()) return;
    status_ = absl::InvalidArgumentError(
        absl::StrCat(absl::string_view(op_.data(), op_.size()), ": ",
                     absl::string_view(field.data(), field.size()), " ", parts...));
  }
  std::string_view op_;
  absl::Status status_;
};

// Of the products with an activated gate, which have the same fields.
template <typename Params>
absl::Status ValidateGated(std::string_view op, const Params& p) {
  return Checker(op)
      .Size("n_tokens", p.n_tokens)
      .Size("dim", p.dim)
      .Stride("gate_stride", p.gate_stride, p.dim)
      .Stride("up_stride", p.up_stride, p.dim)
      .Stride("y_stride", p.y_stride, p.dim)
      .Pointer("gate", p.gate, p.n_tokens, p.dim)
      .Pointer("up", p.up, p.n_tokens, p.dim)
      .Pointer("y", p.y, p.n_tokens, p.dim)
      .status();
}

}  // namespace

absl::Status Validate(const MatmulParams& p) {
  return Checker("Matmul")
      .Size("n_tokens", p.n_tokens)
      .Size("in", p.in)
      .Size("out", p.out)
      .Stride("x_stride", p.x_stride, p.in)
      .Stride("y_stride", p.y_stride, p.out)
      .Pointer("x", p.x, p.n_tokens, p.in)
      .Pointer("weights", p.weights, p.out, p.in)
      .Pointer("y", p.y, p.n_tokens, p.out)
      .status();
}

absl::Status Validate(const GramParams& p) {
  return Checker("Gram")
      .Size("n_tokens", p.n_tokens)
      .Size("dim", p.dim)
      .Stride("x_stride", p.x_stride, p.dim)
      .Pointer("x", p.x, p.n_tokens, p.dim)
      .Pointer("h", p.h, p.dim)
      .status();
}

absl::Status Validate(const CrossGramParams& p) {
  return Checker("CrossGram")
      .Size("n_tokens", p.n_tokens)
      .Size("dim", p.dim)
      .Stride("x_stride", p.x_stride, p.dim)
      .Stride("y_stride", p.y_stride, p.dim)
      .Pointer("x", p.x, p.n_tokens, p.dim)
      .Pointer("y", p.y, p.n_tokens, p.dim)
      .Pointer("c", p.c, p.dim)
      .status();
}

absl::Status Validate(const SubtractProductParams& p) {
  return Checker("SubtractProduct")
      .Size("m", p.m)
      .Size("n", p.n)
      .Size("k", p.k)
      .Stride("a_stride", p.a_stride, p.k)
      .Stride("b_stride", p.b_stride, p.n)
      .Stride("c_stride", p.c_stride, p.n)
      .Pointer("a", p.a, p.m, p.k)
      .Pointer("b", p.b, p.k, p.n)
      .Pointer("c", p.c, p.m, p.n)
      .status();
}

absl::Status Validate(const RmsNormParams& p) {
  return Checker("RmsNorm")
      .Size("n_tokens", p.n_tokens)
      .Size("dim", p.dim)
      .Finite("eps", p.eps)
      .That(p.eps >= 0, "eps", "must not be negative, is ", p.eps)
      .Pointer("x", p.x, p.n_tokens, p.dim)
      .Pointer("y", p.y, p.n_tokens, p.dim)
      .status();
}

absl::Status Validate(const RopeParams& p) {
  return Checker("Rope")
      .Size("n_tokens", p.n_tokens)
      .Size("n_heads", p.n_heads)
      .Size("head_dim", p.head_dim)
      .That(p.head_dim % 2 == 0, "head_dim", "must be even, is ", p.head_dim)
      .Stride("x_stride", p.x_stride, p.n_heads * p.head_dim)
      .Pointer("positions", p.positions, p.n_tokens)
      .Pointer("inverse_frequencies", p.inverse_frequencies, p.head_dim / 2)
      .Pointer("x", p.x, p.n_tokens, p.n_heads * p.head_dim)
      .Index("positions", p.positions, p.n_tokens, kSizeMax)
      .status();
}

absl::Status Validate(const AttentionParams& p) {
  const int64_t n_blocks =
      p.blocks == nullptr ? 0 : (p.n_past + p.n_new + kKvBlockTokens - 1) / kKvBlockTokens;
  return Checker("Attention")
      .Size("n_new", p.n_new)
      .Size("n_past", p.n_past)
      .Positive("n_heads", p.n_heads)
      .Positive("n_kv_heads", p.n_kv_heads)
      .Positive("head_dim", p.head_dim)
      .That(p.n_kv_heads > 0 && p.n_heads % p.n_kv_heads == 0, "n_heads",
            "must be a multiple of n_kv_heads ", p.n_kv_heads, ", is ", p.n_heads)
      .Size("window", p.window)
      .Finite("scale", p.scale)
      .Stride("q_stride", p.q_stride, p.n_heads * p.head_dim)
      .Stride("kv_stride", p.kv_stride, p.n_kv_heads * p.head_dim)
      .Stride("y_stride", p.y_stride, p.n_heads * p.head_dim)
      .Stride("block_stride", p.block_stride,
              p.blocks == nullptr ? 0 : kKvBlockTokens * p.kv_stride)
      .Index("blocks", p.blocks, n_blocks, kSizeMax)
      .Pointer("q", p.q, p.n_new)
      .Pointer("k", p.k, p.n_new)
      .Pointer("v", p.v, p.n_new)
      .Pointer("y", p.y, p.n_new)
      .status();
}

absl::Status Validate(const SiluMultiplyParams& p) { return ValidateGated("SiluMultiply", p); }

absl::Status Validate(const GeluMultiplyParams& p) { return ValidateGated("GeluMultiply", p); }

absl::Status Validate(const AddParams& p) {
  return Checker("Add")
      .That(p.n >= 0, "n", "must not be negative, is ", p.n)
      .Pointer("x", p.x, p.n)
      .Pointer("y", p.y, p.n)
      .status();
}

absl::Status Validate(const BlockWalshParams& p) {
  return Checker("BlockWalsh")
      .Size("rows", p.rows)
      .Size("cols", p.cols)
      .Positive("block", p.block)
      .That(p.block > 0 && std::has_single_bit(static_cast<uint64_t>(p.block)), "block",
            "must be a power of two, is ", p.block)
      .That(p.block > 0 && p.cols % p.block == 0, "cols", "must be a multiple of block ", p.block,
            ", is ", p.cols)
      .Stride("x_stride", p.x_stride, p.cols)
      .Pointer("x", p.x, p.rows, p.cols)
      .status();
}

absl::Status Validate(const FakeQuantizeParams& p) {
  return Checker("FakeQuantize")
      .Size("rows", p.rows)
      .Size("cols", p.cols)
      .Positive("group", p.group)
      .That(p.group > 0 && p.cols % p.group == 0, "cols", "must be a multiple of group ", p.group,
            ", is ", p.cols)
      .That(p.bits >= 2 && p.bits <= 8, "bits", "must be in [2, 8], is ", p.bits)
      .That(p.clip > 0 && p.clip <= 1, "clip", "must be in (0, 1], is ", p.clip)
      .Stride("x_stride", p.x_stride, p.cols)
      .Pointer("x", p.x, p.rows, p.cols)
      .status();
}

absl::Status Validate(const CrossEntropyParams& p) {
  return Checker("CrossEntropy")
      .Size("n_tokens", p.n_tokens)
      .Positive("vocab", p.vocab)
      .Pointer("logits", p.logits, p.n_tokens)
      .Pointer("targets", p.targets, p.n_tokens)
      .Pointer("loss", p.loss, p.n_tokens)
      .Index("targets", p.targets, p.n_tokens, p.vocab)
      .status();
}

absl::Status Validate(const KlDivergenceParams& p) {
  return Checker("KlDivergence")
      .Size("n_tokens", p.n_tokens)
      .Positive("vocab", p.vocab)
      .Pointer("reference", p.reference, p.n_tokens)
      .Pointer("logits", p.logits, p.n_tokens)
      .Pointer("divergence", p.divergence, p.n_tokens)
      .Pointer("agrees", p.agrees, p.n_tokens)
      .status();
}

absl::Status Validate(const PackedMatmulParams& p) {
  if (p.weights == nullptr) return absl::InvalidArgumentError("PackedMatmul: weights is null");
  return Checker("PackedMatmul")
      .Size("n_tokens", p.n_tokens)
      .Stride("x_stride", p.x_stride, p.weights->cols())
      .Stride("y_stride", p.y_stride, p.weights->rows())
      .Pointer("x", p.x, p.n_tokens, p.weights->cols())
      .Pointer("y", p.y, p.n_tokens, p.weights->rows())
      .status();
}

absl::Status ValidateBatch(std::span<const AttentionParams> items) {
  for (const AttentionParams& p : items) WALSH_RETURN_IF_ERROR(Validate(p));
  return absl::OkStatus();
}

absl::Status ValidateBatch(std::span<const PackedMatmulParams> items) {
  for (const PackedMatmulParams& p : items) {
    WALSH_RETURN_IF_ERROR(Validate(p));
    const PackedMatmulParams& first = items.front();
    WALSH_RETURN_IF_ERROR(Checker("PackedMatmulBatch")
                              .That(p.x == first.x && p.x_stride == first.x_stride, "x",
                                    "must be the same for all matrices")
                              .That(p.n_tokens == first.n_tokens, "n_tokens", "must be ",
                                    first.n_tokens, " for all matrices, is ", p.n_tokens)
                              .That(p.weights->cols() == first.weights->cols(), "weights",
                                    "must have ", first.weights->cols(), " columns, have ",
                                    p.weights->cols())
                              .status());
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels
