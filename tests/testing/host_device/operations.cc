// The operations of worker/kernels/cuda on the host, one plain loop each, as their headers specify
// them: what worker/pipeline/cuda is tested with where there is no device.
//
// Where the CPU has an operation of the same meaning (products, GPTQ, packing), that one is used.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/gptq/asymmetric_calibration.h"
#include "worker/gptq/error_propagation.h"
#include "worker/gptq/hessian.h"
#include "worker/gptq/quantize_linear.h"
#include "worker/io/gptq_packing.h"
#include "worker/kernels/cuda/compare.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/rotate.h"
#include "worker/kernels/cuda/row_forms.h"
#include "worker/kernels/cuda/stored_weights.h"
#include "worker/kernels/kernels.h"
#include "worker/kernels/thread_pool.h"
#include "worker/rotate/hadamard_core.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cuda {
namespace {

float ToFloat(float x) { return x; }
float ToFloat(bf16 x) { return __bfloat162float(x); }
template <typename T>
T FromFloat(double x) {
  return static_cast<T>(x);
}
template <>
bf16 FromFloat<bf16>(double x) {
  return __float2bfloat16(static_cast<float>(x));
}

kernels::Stream OneThread() {
  static ThreadPool pool(1);
  return {kernels::Backend::kCpu, &pool};
}

template <typename T>
Matrix Floats(int64_t rows, int64_t cols, const T* x) {
  Matrix m(rows, cols);
  std::transform(x, x + rows * cols, m.data(), [](T value) { return ToFloat(value); });
  return m;
}

template <typename T, typename Y>
absl::Status Product(int64_t n, int64_t in, int64_t out, const T* x, const T* w, Y* y,
                     int64_t y_stride, bool accumulate) {
  const Matrix inputs = Floats(n, in, x), weights = Floats(out, in, w);
  Matrix product(n, out);
  WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = n,
                                         .in = in,
                                         .out = out,
                                         .x = inputs.data(),
                                         .x_stride = in,
                                         .weights = weights.data(),
                                         .y = product.data(),
                                         .y_stride = out},
                                        OneThread()));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t o = 0; o < out; ++o) {
      Y& to = y[i * y_stride + o];
      to = FromFloat<Y>(product(i, o) + (accumulate ? ToFloat(to) : 0.0f));
    }
  }
  return absl::OkStatus();
}

int64_t Groups(int64_t cols, int64_t group_size) { return cols / group_size; }

}  // namespace

absl::Status CublasStatus(cublasStatus_t, std::string_view) { return absl::OkStatus(); }

absl::StatusOr<std::unique_ptr<Context>> Context::Create(int device, Priority) {
  if (device != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA device ", device, ": this machine has 1"));
  }
  std::unique_ptr<Context> context(new Context());
  context->properties_.sharedMemPerBlockOptin = 227 * 1024;
  context->properties_.major = 9;
  return context;
}
Context::~Context() = default;
absl::Status Context::Synchronize() { return absl::OkStatus(); }
absl::Status Context::MakeCurrent() const { return absl::OkStatus(); }
absl::Status Context::ReleaseUnusedMemory() { return absl::OkStatus(); }

absl::Status Gemm(Context&, const GemmParams<bf16>& p) {
  return Product(p.n_tokens, p.in, p.out, p.x, p.weights, p.y, p.y_stride == 0 ? p.out : p.y_stride,
                 p.accumulate);
}
absl::Status Gemm(Context&, const GemmParams<float>& p) {
  return Product(p.n_tokens, p.in, p.out, p.x, p.weights, p.y, p.y_stride == 0 ? p.out : p.y_stride,
                 p.accumulate);
}
absl::Status GemmFp32(Context&, const GemmFp32Params& p) {
  return Product(p.n_tokens, p.in, p.out, p.x, p.weights, p.y, p.out, p.accumulate);
}

absl::Status AccumulateGram(Context& context, const GramParams& p) {
  return AccumulateCrossGram(context,
                             {.n_tokens = p.n_tokens, .dim = p.dim, .x = p.x, .y = p.x, .c = p.h});
}
absl::Status MirrorGram(Context&, int64_t, float*) { return absl::OkStatus(); }
absl::Status Diagonal(Context&, int64_t dim, const float* h, float* diagonal) {
  for (int64_t i = 0; i < dim; ++i) diagonal[i] = h[i * dim + i];
  return absl::OkStatus();
}
absl::Status AccumulateCrossGram(Context&, const CrossGramParams& p) {
  const Matrix x = Floats(p.n_tokens, p.dim, p.x), y = Floats(p.n_tokens, p.dim, p.y);
  return kernels::CrossGram({.n_tokens = p.n_tokens,
                             .dim = p.dim,
                             .x = x.data(),
                             .x_stride = p.dim,
                             .y = y.data(),
                             .y_stride = p.dim,
                             .c = p.c},
                            OneThread());
}
absl::Status Subtract(Context&, int64_t n, const bf16* a, const bf16* b, bf16* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = __float2bfloat16(ToFloat(a[i]) - ToFloat(b[i]));
  return absl::OkStatus();
}
template <typename T>
absl::Status AddBias(Context&, int64_t n_tokens, int64_t dim, const float* bias, T* x) {
  for (int64_t i = 0; i < n_tokens * dim; ++i) x[i] = FromFloat<T>(ToFloat(x[i]) + bias[i % dim]);
  return absl::OkStatus();
}
template absl::Status AddBias<bf16>(Context&, int64_t, int64_t, const float*, bf16*);
template absl::Status AddBias<float>(Context&, int64_t, int64_t, const float*, float*);

template <typename Out>
absl::Status RmsNorm(Context&, int64_t n_tokens, int64_t dim, const float* x, const float* weight,
                     float eps, Out* y) {
  for (int64_t t = 0; t < n_tokens; ++t) {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += static_cast<double>(x[t * dim + i]) * x[t * dim + i];
    const double scale = 1 / std::sqrt(sum / static_cast<double>(dim) + eps);
    for (int64_t i = 0; i < dim; ++i) {
      y[t * dim + i] = FromFloat<Out>(x[t * dim + i] * scale * (weight ? weight[i] : 1.0f));
    }
  }
  return absl::OkStatus();
}
template absl::Status RmsNorm<bf16>(Context&, int64_t, int64_t, const float*, const float*, float,
                                    bf16*);
template absl::Status RmsNorm<float>(Context&, int64_t, int64_t, const float*, const float*, float,
                                     float*);

template <typename T>
absl::Status Rope(Context&, int64_t n_tokens, int64_t n_heads, int64_t head_dim, int64_t window,
                  const float* inverse_frequencies, T* x) {
  const int64_t half = head_dim / 2;
  for (int64_t row = 0; row < n_tokens * n_heads; ++row) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(row / n_heads % window) * inverse_frequencies[i];
      T& low = x[row * head_dim + i];
      T& high = x[row * head_dim + half + i];
      const double a = ToFloat(low), b = ToFloat(high);
      low = FromFloat<T>(a * std::cos(angle) - b * std::sin(angle));
      high = FromFloat<T>(b * std::cos(angle) + a * std::sin(angle));
    }
  }
  return absl::OkStatus();
}
template absl::Status Rope<bf16>(Context&, int64_t, int64_t, int64_t, int64_t, const float*, bf16*);
template absl::Status Rope<float>(Context&, int64_t, int64_t, int64_t, int64_t, const float*,
                                  float*);

namespace {

template <typename T>
absl::Status Attention(const WindowAttentionParams<T>& p) {
  const int64_t q_stride = p.n_heads * p.head_dim, kv_stride = p.n_kv_heads * p.head_dim;
  const double scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
  std::vector<double> scores(static_cast<size_t>(p.window));
  for (int64_t row = 0; row < p.n_windows * p.window; ++row) {
    const int64_t first = row / p.window * p.window;
    for (int64_t head = 0; head < p.n_heads; ++head) {
      const T* q = p.q + row * q_stride + head * p.head_dim;
      const int64_t kv = head / (p.n_heads / p.n_kv_heads) * p.head_dim;
      double largest = -INFINITY, total = 0;
      for (int64_t key = first; key <= row; ++key) {
        double dot = 0;
        for (int64_t d = 0; d < p.head_dim; ++d) {
          dot += static_cast<double>(ToFloat(q[d])) * ToFloat(p.k[key * kv_stride + kv + d]);
        }
        scores[static_cast<size_t>(key - first)] = dot * scale;
        largest = std::max(largest, dot * scale);
      }
      for (int64_t key = first; key <= row; ++key) {
        double& score = scores[static_cast<size_t>(key - first)];
        score = std::exp(score - largest);
        total += score;
      }
      for (int64_t d = 0; d < p.head_dim; ++d) {
        double sum = 0;
        for (int64_t key = first; key <= row; ++key) {
          sum += scores[static_cast<size_t>(key - first)] * ToFloat(p.v[key * kv_stride + kv + d]);
        }
        p.y[row * q_stride + head * p.head_dim + d] = FromFloat<T>(sum / total);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace
absl::Status WindowAttention(Context&, const WindowAttentionParams<bf16>& p) {
  return Attention(p);
}
absl::Status WindowAttention(Context&, const WindowAttentionParams<float>& p) {
  return Attention(p);
}

template <typename T>
absl::Status SiluMultiply(Context&, int64_t n, const T* gate, const T* up, T* y) {
  for (int64_t i = 0; i < n; ++i) {
    const double g = ToFloat(gate[i]);
    y[i] = FromFloat<T>(g / (1 + std::exp(-g)) * ToFloat(up[i]));
  }
  return absl::OkStatus();
}
template absl::Status SiluMultiply<bf16>(Context&, int64_t, const bf16*, const bf16*, bf16*);
template absl::Status SiluMultiply<float>(Context&, int64_t, const float*, const float*, float*);

template <typename T>
absl::Status GeluMultiply(Context&, int64_t n, const T* gate, const T* up, T* y) {
  for (int64_t i = 0; i < n; ++i) {
    const double g = ToFloat(gate[i]);
    const double inner = std::sqrt(2 / std::acos(-1.0)) * (g + 0.044715 * g * g * g);
    y[i] = FromFloat<T>(0.5 * g * (1 + std::tanh(inner)) * ToFloat(up[i]));
  }
  return absl::OkStatus();
}
template absl::Status GeluMultiply<bf16>(Context&, int64_t, const bf16*, const bf16*, bf16*);

template <typename T>
absl::Status Embed(Context&, int64_t n_tokens, int64_t dim, const int32_t* ids, const T* embedding,
                   float* hidden) {
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t i = 0; i < dim; ++i) hidden[t * dim + i] = ToFloat(embedding[ids[t] * dim + i]);
  }
  return absl::OkStatus();
}
template absl::Status Embed<float>(Context&, int64_t, int64_t, const int32_t*, const float*,
                                   float*);

namespace {

double LogSumExp(const float* row, int64_t n) {
  const double largest = *std::max_element(row, row + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(row[i] - largest);
  return largest + std::log(sum);
}

}  // namespace
absl::Status CrossEntropy(Context&, int64_t n_tokens, int64_t vocab, const float* logits,
                          const int32_t* targets, double* loss) {
  for (int64_t t = 0; t < n_tokens; ++t) {
    loss[t] = LogSumExp(logits + t * vocab, vocab) - logits[t * vocab + targets[t]];
  }
  return absl::OkStatus();
}
absl::Status KlDivergence(Context&, int64_t n_tokens, int64_t vocab, const float* reference,
                          const float* logits, double* kl, int32_t* top1) {
  for (int64_t t = 0; t < n_tokens; ++t) {
    const float* p = reference + t * vocab;
    const float* q = logits + t * vocab;
    const double log_p = LogSumExp(p, vocab), log_q = LogSumExp(q, vocab);
    kl[t] = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      kl[t] += std::exp(p[i] - log_p) * ((p[i] - log_p) - (q[i] - log_q));
    }
    top1[t] = std::max_element(p, p + vocab) - p == std::max_element(q, q + vocab) - q ? 1 : 0;
  }
  return absl::OkStatus();
}

template <typename From, typename To>
absl::Status Convert(Context&, int64_t n, const From* from, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = FromFloat<To>(ToFloat(from[i]));
  return absl::OkStatus();
}
template absl::Status Convert<float, bf16>(Context&, int64_t, const float*, bf16*);
template absl::Status Convert<bf16, float>(Context&, int64_t, const bf16*, float*);

// H[perm, perm] + diagonal = (Uᵀ U)⁻¹: with J the reversal, J H J = L Lᵀ gives U = J L⁻¹ J.
template <typename Real>
absl::Status Factor(const FactorHessianParams& p) {
  const int64_t n = p.dim;
  std::vector<Real> l(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = p.perm[n - 1 - i];
    for (int64_t j = 0; j < n; ++j) {
      const Real element = p.h[row * n + p.perm[n - 1 - j]];
      l[static_cast<size_t>(i * n + j)] =
          element + (i == j ? static_cast<Real>(p.diagonal_add[row]) : Real{0});
    }
  }
  if (!kernels::CholeskyLower(n, l.data()).ok()) {
    return absl::FailedPreconditionError("not positive definite");
  }
  WALSH_RETURN_IF_ERROR(kernels::InvertLower(n, l.data()));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const Real value = l[static_cast<size_t>((n - 1 - i) * n + n - 1 - j)];
      p.u[i * n + j] = j < i ? 0.0f : static_cast<float>(value);
    }
  }
  return absl::OkStatus();
}
absl::Status FactorHessian(Context&, const FactorHessianParams& p) {
  return p.in_double ? Factor<double>(p) : Factor<float>(p);
}

absl::Status PropagateError(Context&, const PropagateErrorParams& p) {
  gptq::HessianFactor factor;
  factor.order.assign(p.perm, p.perm + p.cols);
  factor.upper = Floats(p.cols, p.cols, p.u);
  Matrix weights = Floats(p.rows, p.cols, p.w);
  WALSH_RETURN_IF_ERROR(
      gptq::PropagateError(Floats(p.cols, p.cols, p.cross), factor, p.beta, OneThread(), weights));
  std::copy_n(weights.data(), weights.size(), p.w);
  return absl::OkStatus();
}

absl::Status CorrectAsymmetry(Context&, const CorrectAsymmetryParams& p) {
  if (p.cols < 0) return absl::InvalidArgumentError(absl::StrCat(p.cols, " columns"));
  gptq::HessianFactor factor;
  factor.order.assign(p.perm, p.perm + p.cols);
  factor.upper = Floats(p.cols, p.cols, p.u);
  for (int64_t i = 0; i < p.cols; ++i) std::fill_n(factor.upper.row(i), i, 0.0f);
  WALSH_RETURN_IF_ERROR(gptq::AddAsymmetricCalibration(Floats(p.cols, p.cols, p.cross), p.alpha,
                                                       OneThread(), factor));
  std::copy_n(factor.correction.data(), factor.correction.size(), p.correction);
  return absl::OkStatus();
}

absl::Status QuantizeColumns(Context&, const QuantizeColumnsParams& p) {
  gptq::HessianFactor factor;
  factor.hessian = Matrix(p.cols, p.cols);  // for the error figure only
  factor.order.assign(p.perm, p.perm + p.cols);
  factor.is_dead.assign(static_cast<size_t>(p.cols), 0);
  if (p.dead != nullptr) factor.is_dead.assign(p.dead, p.dead + p.cols);
  gptq::Options options;
  options.method = p.u == nullptr ? gptq::Method::kRtn : gptq::Method::kGptq;
  options.bits = p.bits;
  options.group_size = p.group_size;
  options.symmetric = p.symmetric;
  options.mse_clip = p.mse_clip;
  if (p.static_groups != nullptr) options.column_order = gptq::ColumnOrder::kActOrder;
  if (p.u != nullptr) {
    factor.upper = Floats(p.cols, p.cols, p.u);
    if (p.correction != nullptr) factor.correction = Floats(p.cols, p.cols, p.correction);
  }
  WALSH_ASSIGN_OR_RETURN(const gptq::QuantizedLinear result,
                         gptq::QuantizeLinear("linear", Floats(p.rows, p.cols, p.w), factor,
                                              options, *OneThread().pool));
  std::copy(result.matrix.codes.begin(), result.matrix.codes.end(), p.codes);
  std::copy(result.matrix.scales.begin(), result.matrix.scales.end(), p.scales);
  std::copy(result.matrix.zeros.begin(), result.matrix.zeros.end(), p.zeros);
  if (p.loss != nullptr) std::fill_n(p.loss, p.rows, 0.0f);
  return absl::OkStatus();
}

absl::Status Pack(const PackParams& p) {
  QuantizedMatrix m;
  m.rows = p.rows;
  m.cols = p.cols;
  m.bits = p.bits;
  m.group_size = p.group_size;
  const int64_t n_groups = p.rows * Groups(p.cols, p.group_size);
  m.codes.assign(p.codes, p.codes + p.rows * p.cols);
  m.scales.assign(p.scales, p.scales + n_groups);
  m.zeros.assign(p.zeros, p.zeros + n_groups);
  if (p.dequantized != nullptr) {
    const Matrix dense = Dequantize(m);
    for (int64_t i = 0; i < dense.size(); ++i) p.dequantized[i] = __float2bfloat16(dense.data()[i]);
  }
  if (p.qweight == nullptr) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const GptqTensors packed, PackGptq(m));
  std::copy(packed.qweight.begin(), packed.qweight.end(), p.qweight);
  std::copy(packed.qzeros.begin(), packed.qzeros.end(), p.qzeros);
  std::copy(packed.scales.begin(), packed.scales.end(), reinterpret_cast<uint16_t*>(p.half_scales));
  return absl::OkStatus();
}

absl::StatusOr<RowForms> ComputeRowForms(Context&, const RowFormsParams& p) {
  const Matrix h = Floats(p.cols, p.cols, p.h);
  Matrix w = Floats(p.rows, p.cols, p.w), product(p.rows, p.cols);
  const auto forms_of = [&](const Matrix& m) -> absl::StatusOr<std::vector<double>> {
    WALSH_RETURN_IF_ERROR(Product(p.rows, p.cols, p.cols, m.data(), h.data(), product.data(),
                                  p.cols, /*accumulate=*/false));
    std::vector<double> forms;
    for (int64_t r = 0; r < p.rows; ++r) {
      forms.push_back(std::inner_product(m.row(r), m.row(r) + p.cols, product.row(r), 0.0));
    }
    return forms;
  };
  RowForms forms;
  WALSH_ASSIGN_OR_RETURN(forms.output, forms_of(w));
  for (int64_t i = 0; i < w.size(); ++i) {
    const int64_t g = i / p.cols * Groups(p.cols, p.group_size) + i % p.cols / p.group_size;
    w.data()[i] -= p.scales[g] * static_cast<float>(p.codes[i] - p.zeros[g]);
  }
  WALSH_ASSIGN_OR_RETURN(forms.error, forms_of(w));
  return forms;
}

bool DeviceRotation::HasCore(int64_t core) {
  return std::find(std::begin(kCores), std::end(kCores), core) != std::end(kCores);
}

absl::StatusOr<DeviceRotation> DeviceRotation::Create(Context& context, const Tables& tables) {
  DeviceRotation rotation;
  rotation.width_ = tables.width;
  rotation.block_ = tables.block;
  rotation.core_ = tables.core;
  rotation.normalizer_ = tables.normalizer;
  WALSH_ASSIGN_OR_RETURN(rotation.row_order_,
                         DeviceBuffer<int32_t>::Allocate(
                             static_cast<int64_t>(tables.row_order.size()), context.stream()));
  std::copy(tables.row_order.begin(), tables.row_order.end(), rotation.row_order_.data());
  WALSH_ASSIGN_OR_RETURN(
      rotation.signs_,
      DeviceBuffer<double>::Allocate(static_cast<int64_t>(tables.signs.size()), context.stream()));
  std::copy(tables.signs.begin(), tables.signs.end(), rotation.signs_.data());
  return rotation;
}
absl::Status DeviceRotation::RotateRows(Context& context, int64_t rows, int64_t cols,
                                        const float* scale, float* x) const {
  return Rotate(context, false, rows, cols, scale, x);
}
absl::Status DeviceRotation::RotateColumns(Context& context, int64_t rows, int64_t cols,
                                           float* x) const {
  return Rotate(context, true, rows, cols, nullptr, x);
}
absl::Status DeviceRotation::Rotate(Context&, bool columns, int64_t rows, int64_t cols,
                                    const float* scale, float* x) const {
  const int64_t vectors = columns ? cols : rows;
  const int64_t pieces = (columns ? rows : cols) / width_;
  const int64_t step = columns ? cols : 1, vector_step = columns ? 1 : cols;
  const std::vector<int8_t> core = rotate::HadamardCore(core_);
  const int64_t sylvester = block_ / core_;
  std::vector<double> v(static_cast<size_t>(width_)), h(static_cast<size_t>(block_)), sums(h);
  for (int64_t i = 0; i < vectors * pieces; ++i) {
    float* piece = x + i / pieces * vector_step + i % pieces * width_ * step;
    for (int64_t j = 0; j < width_; ++j) {
      double value = piece[j * step];
      if (scale != nullptr) value *= scale[j];
      if (signs_.size() > 0) value *= signs_.data()[j];
      v[static_cast<size_t>(j)] = value;
    }
    for (int64_t start = 0; start < width_; start += block_) {
      for (int64_t s = 0; s < block_; ++s) {
        const int64_t to = row_order_.size() > 0 ? row_order_.data()[s] : s;
        h[static_cast<size_t>(to)] = v[static_cast<size_t>(start + s)];
      }
      for (int64_t half = 1; half < sylvester; half *= 2) {
        for (int64_t a = 0; a < block_; ++a) {
          if ((a % sylvester & half) != 0) continue;
          double& low = h[static_cast<size_t>(a)];
          double& high = h[static_cast<size_t>(a + half)];
          const double sum = low + high, difference = low - high;
          low = sum;
          high = difference;
        }
      }
      if (core_ > 1) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t to = 0; to < core_; ++to) {
          for (int64_t from = 0; from < core_; ++from) {
            const double sign = core[static_cast<size_t>(from * core_ + to)];
            for (int64_t a = 0; a < sylvester; ++a) {
              sums[static_cast<size_t>(to * sylvester + a)] +=
                  sign * h[static_cast<size_t>(from * sylvester + a)];
            }
          }
        }
        h = sums;
      }
      for (int64_t s = 0; s < block_; ++s) {
        piece[(start + s) * step] = static_cast<float>(h[static_cast<size_t>(s)] * normalizer_);
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Difference> Compare(Context&, int64_t n, const float* a, const float* b) {
  Difference found;
  for (int64_t i = 0; i < n; ++i) {
    const double x = a[i], y = b[i];
    if (!std::isfinite(x) || !std::isfinite(y)) {
      if (found.first_bad < 0) found.first_bad = i;
      continue;
    }
    found.largest = std::max(found.largest, std::abs(x));
    found.difference = std::max(found.difference, std::abs(x - y));
  }
  return found;
}

absl::Status ConvertStored(const ConvertStoredParams& p) {
  const auto* halves = static_cast<const uint16_t*>(p.x);
  for (int64_t i = 0; i < p.n; ++i) {
    p.y[i] = p.type == ScalarType::kF32   ? static_cast<const float*>(p.x)[i]
             : p.type == ScalarType::kF16 ? HalfToFloat(halves[i])
                                          : Bf16ToFloat(halves[i]);
    if (!std::isfinite(p.y[i])) *p.first_bad = std::min(*p.first_bad, p.first + i);
  }
  return absl::OkStatus();
}

absl::Status Unpack(const UnpackParams& p) {
  const auto* scales = reinterpret_cast<const uint16_t*>(p.scales);
  const auto value = [&](const uint32_t* words, int64_t stride, int64_t index) {
    uint32_t out = 0;
    for (int bit = 0; bit < p.bits; ++bit) {
      const int64_t at = index * p.bits + bit;
      out |= (words[at / 32 * stride] >> (at % 32) & 1u) << bit;
    }
    return static_cast<int>(out);
  };
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.cols; ++c) {
      const int64_t g = c / p.group_size;
      const int code = value(p.qweight + r, p.rows, c);
      const int zero = value(p.qzeros + g * (p.rows / 32 * p.bits), 1, r);
      const float scale = HalfToFloat(scales[g * p.rows + r]);
      p.y[r * p.cols + c] = __float2bfloat16(scale * static_cast<float>(code - zero));
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
