#include "worker/rotate/walsh_matrix.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"

namespace walsh::rotate {
namespace {

constexpr int64_t kDenseOrderMax = 8192;  // 64 MiB of entries
constexpr int64_t kPaleyCore = 36;
constexpr int kPaleyPrime = 17;

int64_t BitReverse(int64_t value, int bits) {
  int64_t reversed = 0;
  for (int b = 0; b < bits; ++b) reversed |= ((value >> b) & 1) << (bits - 1 - b);
  return reversed;
}

// Paley's second construction: with C the symmetric conference matrix of order q + 1 (zero border
// of ones around the quadratic characters of i − j), H = C ⊗ [1 1; 1 −1] + I ⊗ [1 −1; −1 −1].
std::vector<int8_t> PaleyMatrix() {
  int character[kPaleyPrime];
  std::fill(std::begin(character), std::end(character), -1);
  character[0] = 0;
  for (int i = 1; i < kPaleyPrime; ++i) character[i * i % kPaleyPrime] = 1;

  constexpr int kConference = kPaleyPrime + 1;
  std::vector<int8_t> h(kPaleyCore * kPaleyCore);
  for (int i = 0; i < kConference; ++i) {
    for (int j = 0; j < kConference; ++j) {
      const int c = i == j               ? 0
                    : (i == 0 || j == 0) ? 1
                                         : character[(i - j + kPaleyPrime) % kPaleyPrime];
      const int diagonal = i == j ? 1 : 0;
      int8_t* top = &h[static_cast<size_t>(2 * i * kPaleyCore + 2 * j)];
      int8_t* bottom = top + kPaleyCore;
      top[0] = static_cast<int8_t>(c + diagonal);
      top[1] = static_cast<int8_t>(c - diagonal);
      bottom[0] = static_cast<int8_t>(c - diagonal);
      bottom[1] = static_cast<int8_t>(-c - diagonal);
    }
  }
  return h;
}

// Writes row `index` of H_core ⊗ H_{2^k}.
void HadamardRow(const HadamardOrder& order, std::span<const int8_t> core, int64_t index,
                 std::span<int8_t> row) {
  const int64_t sylvester = int64_t{1} << order.log2_sylvester;
  const auto a = static_cast<uint64_t>(index % sylvester);
  const int64_t i = index / sylvester;
  for (int64_t j = 0; j < order.core; ++j) {
    for (int64_t b = 0; b < sylvester; ++b) {
      const int sign = std::popcount(a & static_cast<uint64_t>(b)) % 2 == 0 ? 1 : -1;
      row[static_cast<size_t>(j * sylvester + b)] =
          static_cast<int8_t>(sign * core[static_cast<size_t>(i * order.core + j)]);
    }
  }
}

absl::StatusOr<HadamardOrder> DenseOrder(int64_t n) {
  if (n > kDenseOrderMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a Hadamard matrix of order ", n, " is not written out: the limit is ", kDenseOrderMax));
  }
  return FactorHadamardOrder(n);
}

}  // namespace

absl::StatusOr<HadamardOrder> FactorHadamardOrder(int64_t n) {
  if (n > 0) {
    const int twos = std::countr_zero(static_cast<uint64_t>(n));
    const int64_t odd = n >> twos;
    if (odd == 1) return HadamardOrder{1, twos};
    if (odd == 9 && twos >= 2) return HadamardOrder{kPaleyCore, twos - 2};
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no Hadamard matrix of order ", n,
                   ": supported are 2^k and 36·2^k; use rotation gsr, whose blocks fit any "
                   "width that 16 divides"));
}

std::vector<int8_t> HadamardCore(int64_t core) {
  if (core == 1) return {1};
  WALSH_CHECK_EQ(core, kPaleyCore);
  return PaleyMatrix();
}

std::vector<int32_t> WalshRowOrder(const HadamardOrder& order) {
  const int64_t n = order.n();
  std::vector<int32_t> rows(static_cast<size_t>(n));
  if (order.core == 1) {
    for (int64_t s = 0; s < n; ++s) {
      rows[static_cast<size_t>(s)] =
          static_cast<int32_t>(BitReverse(s ^ (s >> 1), order.log2_sylvester));
    }
    return rows;
  }
  const std::vector<int8_t> core = HadamardCore(order.core);
  std::vector<int8_t> row(static_cast<size_t>(n));
  std::vector<int64_t> sequency(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    HadamardRow(order, core, i, row);
    sequency[static_cast<size_t>(i)] = Sequency(row);
  }
  std::iota(rows.begin(), rows.end(), 0);
  std::stable_sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) {
    return sequency[static_cast<size_t>(a)] < sequency[static_cast<size_t>(b)];
  });
  return rows;
}

absl::StatusOr<std::vector<int8_t>> HadamardMatrix(int64_t n) {
  WALSH_ASSIGN_OR_RETURN(const HadamardOrder order, DenseOrder(n));
  const std::vector<int8_t> core = HadamardCore(order.core);
  std::vector<int8_t> h(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    HadamardRow(order, core, i, std::span(h).subspan(static_cast<size_t>(i * n), n));
  }
  return h;
}

absl::StatusOr<std::vector<int8_t>> WalshMatrix(int64_t n) {
  WALSH_ASSIGN_OR_RETURN(const HadamardOrder order, DenseOrder(n));
  const std::vector<int8_t> core = HadamardCore(order.core);
  const std::vector<int32_t> rows = WalshRowOrder(order);
  std::vector<int8_t> w(static_cast<size_t>(n * n));
  for (int64_t s = 0; s < n; ++s) {
    HadamardRow(order, core, rows[static_cast<size_t>(s)],
                std::span(w).subspan(static_cast<size_t>(s * n), n));
  }
  return w;
}

int64_t Sequency(std::span<const int8_t> row) {
  int64_t changes = 0;
  for (size_t i = 1; i < row.size(); ++i) changes += row[i] != row[i - 1] ? 1 : 0;
  return changes;
}

}  // namespace walsh::rotate
