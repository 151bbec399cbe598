#include "worker/rotate/walsh_matrix.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/rotate/hadamard_core.h"

namespace walsh::rotate {
namespace {

constexpr int64_t kDenseOrderMax = 8192;  // 64 MiB of entries

int64_t BitReverse(int64_t value, int bits) {
  int64_t reversed = 0;
  for (int b = 0; b < bits; ++b) reversed |= ((value >> b) & 1) << (bits - 1 - b);
  return reversed;
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
    if (twos >= 2 && HasHadamardCore(4 * odd)) return HadamardOrder{4 * odd, twos - 2};
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "no Hadamard matrix of order ", n,
      ": supported are m·2^k with m = 1, 12, 20, 28, 36, 44, 52, 60, 108, 140, 172 and other "
      "orders of Paley's constructions up to ",
      kHadamardCoreMax, "; use rotation gsr, whose blocks fit any width that 16 divides"));
}

std::vector<int32_t> WalshRowOrder(const HadamardOrder& order) {
  const int64_t n = order.n();
  const int64_t sylvester = int64_t{1} << order.log2_sylvester;
  std::vector<int32_t> natural(static_cast<size_t>(sylvester));
  std::vector<int64_t> sylvester_sequency(static_cast<size_t>(sylvester));
  for (int64_t s = 0; s < sylvester; ++s) {
    const int64_t row = BitReverse(s ^ (s >> 1), order.log2_sylvester);
    natural[static_cast<size_t>(s)] = static_cast<int32_t>(row);
    sylvester_sequency[static_cast<size_t>(row)] = s;
  }
  if (order.core == 1) return natural;

  // Row (i, a) of the product is row a of Sylvester's matrix under each sign of the core's row i.
  // Where two copies meet the sign changes as in the core's row if row a ends as it begins, and
  // just where it does not there if it ends otherwise: if it has an odd number of changes.
  const std::vector<int8_t> core = HadamardCore(order.core);
  std::vector<int64_t> sequency(static_cast<size_t>(n));
  for (int64_t i = 0; i < order.core; ++i) {
    const int64_t core_sequency =
        Sequency(std::span(core).subspan(static_cast<size_t>(i * order.core), order.core));
    for (int64_t a = 0; a < sylvester; ++a) {
      const int64_t inside = sylvester_sequency[static_cast<size_t>(a)];
      sequency[static_cast<size_t>(i * sylvester + a)] =
          order.core * inside + (inside % 2 == 0 ? core_sequency : order.core - 1 - core_sequency);
    }
  }
  std::vector<int32_t> rows(static_cast<size_t>(n));
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
