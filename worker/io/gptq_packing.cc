#include "worker/io/gptq_packing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "worker/io/not_finite.h"
#include "worker/tensor/half.h"

namespace walsh {
namespace {

// Values that fill a whole number of words at every width.
constexpr int64_t kRun = 32;
constexpr int kBitsMax = 8;

using RunValues = std::array<uint8_t, kRun>;
using RunWords = std::array<uint32_t, kBitsMax>;  // the first `bits` count

RunWords PackRun(const RunValues& values, int bits) {
  RunWords words = {};
  for (int i = 0; i < kRun; ++i) {
    const int word = i * bits / 32;
    const int shift = i * bits % 32;
    const uint32_t value = values[static_cast<size_t>(i)];
    words[static_cast<size_t>(word)] |= value << shift;
    if (shift + bits > 32) words[static_cast<size_t>(word + 1)] |= value >> (32 - shift);
  }
  return words;
}

RunValues UnpackRun(const RunWords& words, int bits) {
  RunValues values;
  const uint32_t mask = (1u << bits) - 1u;
  for (int i = 0; i < kRun; ++i) {
    const int word = i * bits / 32;
    const int shift = i * bits % 32;
    uint32_t value = words[static_cast<size_t>(word)] >> shift;
    if (shift + bits > 32) value |= words[static_cast<size_t>(word + 1)] << (32 - shift);
    values[static_cast<size_t>(i)] = static_cast<uint8_t>(value & mask);
  }
  return values;
}

GptqShape ShapeOf(const QuantizedMatrix& m) {
  return {.rows = m.rows,
          .cols = m.cols,
          .bits = m.bits,
          .group_size = m.group_size,
          .symmetric = m.symmetric};
}

absl::Status CheckBits(const std::vector<uint8_t>& values, int bits, const char* what) {
  const auto limit = static_cast<unsigned>(1u << bits);
  for (const uint8_t value : values) {
    if (value >= limit) {
      return absl::InvalidArgumentError(
          absl::StrCat("a ", what, " is ", static_cast<int>(value), ", must be below ", limit));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckMatrix(const QuantizedMatrix& m) {
  WALSH_RETURN_IF_ERROR(ValidateGptqShape(ShapeOf(m)));
  const auto n_codes = static_cast<size_t>(m.rows * m.cols);
  const auto n_groups = static_cast<size_t>(m.rows * m.groups());
  if (m.codes.size() != n_codes || m.scales.size() != n_groups || m.zeros.size() != n_groups) {
    return absl::InvalidArgumentError(absl::StrCat(m.codes.size(), " codes, ", m.scales.size(),
                                                   " scales and ", m.zeros.size(), " zeros for ",
                                                   n_codes, " weights in ", n_groups, " groups"));
  }
  WALSH_RETURN_IF_ERROR(CheckBits(m.codes, m.bits, "code"));
  return CheckBits(m.zeros, m.bits, "zero");
}

void PackCodes(const QuantizedMatrix& m, std::vector<uint32_t>& qweight) {
  RunValues run;
  for (int64_t out = 0; out < m.rows; ++out) {
    for (int64_t in = 0; in < m.cols; in += kRun) {
      std::copy_n(m.codes.begin() + out * m.cols + in, kRun, run.begin());
      const RunWords words = PackRun(run, m.bits);
      const int64_t first_word = in / kRun * m.bits;
      for (int w = 0; w < m.bits; ++w) {
        qweight[static_cast<size_t>((first_word + w) * m.rows + out)] =
            words[static_cast<size_t>(w)];
      }
    }
  }
}

void PackZeros(const QuantizedMatrix& m, std::vector<uint32_t>& qzeros) {
  const int64_t row_words = m.rows / kRun * m.bits;
  RunValues run;
  for (int64_t group = 0; group < m.groups(); ++group) {
    for (int64_t out = 0; out < m.rows; out += kRun) {
      for (int64_t i = 0; i < kRun; ++i) {
        run[static_cast<size_t>(i)] = m.zeros[static_cast<size_t>((out + i) * m.groups() + group)];
      }
      const RunWords words = PackRun(run, m.bits);
      std::copy_n(words.begin(), m.bits, qzeros.begin() + group * row_words + out / kRun * m.bits);
    }
  }
}

absl::Status PackScales(const QuantizedMatrix& m, std::vector<uint16_t>& scales) {
  for (int64_t out = 0; out < m.rows; ++out) {
    for (int64_t group = 0; group < m.groups(); ++group) {
      const float scale = m.scales[static_cast<size_t>(out * m.groups() + group)];
      const uint16_t half = FloatToHalf(scale);
      if (!std::isfinite(scale) || HalfToFloat(half) != scale) {
        return absl::InvalidArgumentError(absl::StrCat("the scale of output ", out, ", group ",
                                                       group, " is ", scale,
                                                       ", not a finite value of half precision"));
      }
      scales[static_cast<size_t>(group * m.rows + out)] = half;
    }
  }
  return absl::OkStatus();
}

// Tiles of 32 outputs: their words lie side by side, and each output's codes are written in runs.
void UnpackCodes(const std::vector<uint32_t>& qweight, QuantizedMatrix& m) {
  RunWords words = {};
  for (int64_t tile = 0; tile < m.rows; tile += kRun) {
    for (int64_t in = 0; in < m.cols; in += kRun) {
      const int64_t first_word = in / kRun * m.bits;
      for (int64_t out = tile; out < tile + kRun; ++out) {
        for (int w = 0; w < m.bits; ++w) {
          words[static_cast<size_t>(w)] =
              qweight[static_cast<size_t>((first_word + w) * m.rows + out)];
        }
        const RunValues run = UnpackRun(words, m.bits);
        std::copy(run.begin(), run.end(), m.codes.begin() + out * m.cols + in);
      }
    }
  }
}

void UnpackZeros(const std::vector<uint32_t>& qzeros, QuantizedMatrix& m) {
  const int64_t row_words = m.rows / kRun * m.bits;
  RunWords words = {};
  for (int64_t group = 0; group < m.groups(); ++group) {
    for (int64_t out = 0; out < m.rows; out += kRun) {
      std::copy_n(qzeros.begin() + group * row_words + out / kRun * m.bits, m.bits, words.begin());
      const RunValues run = UnpackRun(words, m.bits);
      for (int64_t i = 0; i < kRun; ++i) {
        m.zeros[static_cast<size_t>((out + i) * m.groups() + group)] = run[static_cast<size_t>(i)];
      }
    }
  }
}

void UnpackScales(const std::vector<uint16_t>& scales, QuantizedMatrix& m) {
  for (int64_t group = 0; group < m.groups(); ++group) {
    for (int64_t out = 0; out < m.rows; ++out) {
      m.scales[static_cast<size_t>(out * m.groups() + group)] =
          HalfToFloat(scales[static_cast<size_t>(group * m.rows + out)]);
    }
  }
}

}  // namespace

absl::Status ValidateGptqShape(const GptqShape& shape) {
  if (shape.bits != 2 && shape.bits != 3 && shape.bits != 4 && shape.bits != 8) {
    return absl::InvalidArgumentError(absl::StrCat(shape.bits, " bits, must be 2, 3, 4 or 8"));
  }
  if (shape.rows < kRun || shape.rows % kRun != 0 || shape.cols < kRun || shape.cols % kRun != 0) {
    return absl::InvalidArgumentError(absl::StrCat("a matrix of ", shape.rows, " outputs and ",
                                                   shape.cols,
                                                   " inputs: both must be multiples of 32"));
  }
  if (shape.group_size < 1 || shape.cols % shape.group_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("groups of ", shape.group_size, " do not divide ", shape.cols, " inputs"));
  }
  return absl::OkStatus();
}

std::vector<int32_t> GroupIndex(const GptqShape& shape) {
  std::vector<int32_t> g_idx(static_cast<size_t>(shape.cols));
  for (int64_t in = 0; in < shape.cols; ++in) {
    g_idx[static_cast<size_t>(in)] = static_cast<int32_t>(in / shape.group_size);
  }
  return g_idx;
}

absl::Status CheckScales(std::span<const uint16_t> scales, const GptqShape& shape) {
  const std::optional<int64_t> bad = FirstNotFiniteHalf(scales);
  if (!bad.has_value()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("the scale at [", *bad / shape.rows, ", ", *bad % shape.rows, "] is ",
                   HalfToFloat(scales[static_cast<size_t>(*bad)]), ", must be finite"));
}

absl::StatusOr<GptqTensors> PackGptq(const QuantizedMatrix& matrix) {
  WALSH_RETURN_IF_ERROR(CheckMatrix(matrix));
  const GptqShape shape = ShapeOf(matrix);
  GptqTensors out;
  out.qweight.resize(static_cast<size_t>(shape.weight_words() * shape.rows));
  out.qzeros.resize(static_cast<size_t>(shape.groups() * shape.zero_words()));
  out.scales.resize(static_cast<size_t>(shape.groups() * shape.rows));
  out.g_idx = GroupIndex(shape);
  PackCodes(matrix, out.qweight);
  PackZeros(matrix, out.qzeros);
  WALSH_RETURN_IF_ERROR(PackScales(matrix, out.scales));
  return out;
}

absl::StatusOr<QuantizedMatrix> UnpackGptq(const GptqTensors& tensors, const GptqShape& shape) {
  WALSH_RETURN_IF_ERROR(ValidateGptqShape(shape));
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.qweight.size()), shape.weight_words() * shape.rows);
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.qzeros.size()), shape.groups() * shape.zero_words());
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.scales.size()), shape.groups() * shape.rows);
  WALSH_RETURN_IF_ERROR(CheckScales(tensors.scales, shape));
  QuantizedMatrix out;
  out.rows = shape.rows;
  out.cols = shape.cols;
  out.bits = shape.bits;
  out.group_size = shape.group_size;
  out.symmetric = shape.symmetric;
  out.codes.resize(static_cast<size_t>(shape.rows * shape.cols));
  out.zeros.resize(static_cast<size_t>(shape.rows * shape.groups()));
  out.scales.resize(static_cast<size_t>(shape.rows * shape.groups()));
  UnpackCodes(tensors.qweight, out);
  UnpackZeros(tensors.qzeros, out);
  UnpackScales(tensors.scales, out);
  return out;
}

}  // namespace walsh
