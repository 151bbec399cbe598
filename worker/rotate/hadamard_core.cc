#include "worker/rotate/hadamard_core.h"

#include <array>
#include <map>
#include <optional>
#include <utility>

#include "common/check.h"

namespace walsh::rotate {
namespace {

bool IsPrime(int64_t n) {
  for (int64_t d = 2; d * d <= n; ++d) {
    if (n % d == 0) return false;
  }
  return n > 1;
}

// A field of p or p² elements, numbered a + b·p for a + b·t, with t² the least non-residue mod p.
struct Field {
  int64_t p = 0;
  int64_t q = 0;
};

std::optional<Field> FieldOf(int64_t q) {
  if (IsPrime(q)) return Field{q, q};
  for (int64_t p = 3; p * p <= q; ++p) {
    if (p * p == q && IsPrime(p)) return Field{p, q};
  }
  return std::nullopt;
}

int64_t Difference(const Field& field, int64_t x, int64_t y) {
  const int64_t p = field.p;
  return (x % p - y % p + p) % p + (x / p - y / p + p) % p * p;
}

// χ of every element.
std::vector<int> QuadraticCharacters(const Field& field) {
  const int64_t p = field.p;
  std::vector<bool> is_residue(static_cast<size_t>(p));
  for (int64_t a = 0; a < p; ++a) is_residue[static_cast<size_t>(a * a % p)] = true;
  int64_t non_residue = 0;
  while (non_residue < p && is_residue[static_cast<size_t>(non_residue)]) ++non_residue;

  std::vector<int> character(static_cast<size_t>(field.q), -1);
  for (int64_t x = 1; x < field.q; ++x) {
    const int64_t a = x % p, b = x / p;
    const int64_t square = (a * a + b * b % p * non_residue) % p + 2 * a * b % p * p;
    character[static_cast<size_t>(square)] = 1;
  }
  character[0] = 0;
  return character;
}

// Zero diagonal, a border of ones (of `sign` in the first column) around χ(i − j).
std::vector<int> ConferenceMatrix(const Field& field, int sign) {
  const std::vector<int> character = QuadraticCharacters(field);
  const int64_t n = field.q + 1;
  std::vector<int> c(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      int& entry = c[static_cast<size_t>(i * n + j)];
      if (i == j) {
        entry = 0;
      } else if (i == 0) {
        entry = 1;
      } else if (j == 0) {
        entry = sign;
      } else {
        entry = character[static_cast<size_t>(Difference(field, i - 1, j - 1))];
      }
    }
  }
  return c;
}

// I + C, with C skew.
std::vector<int8_t> PaleyFirst(const Field& field) {
  const std::vector<int> c = ConferenceMatrix(field, -1);
  const int64_t m = field.q + 1;
  std::vector<int8_t> h(c.begin(), c.end());
  for (int64_t i = 0; i < m; ++i) h[static_cast<size_t>(i * m + i)] = 1;
  return h;
}

// C ⊗ [1 1; 1 −1] + I ⊗ [1 −1; −1 −1], with C symmetric.
std::vector<int8_t> PaleySecond(const Field& field) {
  const std::vector<int> conference = ConferenceMatrix(field, 1);
  const int64_t n = field.q + 1;
  const int64_t m = 2 * n;
  std::vector<int8_t> h(static_cast<size_t>(m * m));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const int c = conference[static_cast<size_t>(i * n + j)];
      const int diagonal = i == j ? 1 : 0;
      int8_t* top = &h[static_cast<size_t>(2 * i * m + 2 * j)];
      int8_t* bottom = top + m;
      top[0] = static_cast<int8_t>(c + diagonal);
      top[1] = static_cast<int8_t>(c - diagonal);
      bottom[0] = static_cast<int8_t>(c - diagonal);
      bottom[1] = static_cast<int8_t>(-c - diagonal);
    }
  }
  return h;
}

constexpr int64_t kWilliamsonOrder = 43;
constexpr int64_t kPrimitiveRoot = 3;  // of 43
constexpr int kClasses = 7;

// Williamson's array needs four symmetric circulants whose squares sum to 4 · 43 · I: first rows
// whose periodic autocorrelations cancel at every shift but 0. Rows that are constant on the seven
// cosets of the sixth roots of unity mod 43 (−1 is one, so they are symmetric) are 128, and so are
// few enough to try all pairs of them; the first four that cancel are taken.
class Williamson43 {
 public:
  Williamson43() {
    int64_t power = 1;
    for (int64_t e = 0; e < kWilliamsonOrder - 1; ++e) {
      class_[static_cast<size_t>(power)] = static_cast<int>(e % kClasses);
      if (e < kClasses) representative_[static_cast<size_t>(e)] = power;
      power = power * kPrimitiveRoot % kWilliamsonOrder;
    }
  }

  // Bit c of a mask: the row is −1 on class c. Its entry 0 is 1.
  int Entry(int mask, int64_t i) const {
    return i != 0 && ((mask >> class_[static_cast<size_t>(i)]) & 1) != 0 ? -1 : 1;
  }

  std::array<int, 4> FirstRows() const {
    using Correlations = std::array<int, kClasses>;
    std::map<Correlations, std::pair<int, int>> seen;
    for (int a = 0; a < 1 << kClasses; ++a) {
      for (int b = a; b < 1 << kClasses; ++b) {
        Correlations sum{}, negated{};
        for (size_t c = 0; c < kClasses; ++c) {
          sum[c] = Correlation(a, representative_[c]) + Correlation(b, representative_[c]);
          negated[c] = -sum[c];
        }
        seen.emplace(sum, std::pair(a, b));
        if (const auto it = seen.find(negated); it != seen.end()) {
          return {it->second.first, it->second.second, a, b};
        }
      }
    }
    WALSH_CHECK(false);
    return {};
  }

 private:
  int Correlation(int mask, int64_t shift) const {
    int sum = 0;
    for (int64_t i = 0; i < kWilliamsonOrder; ++i) {
      sum += Entry(mask, i) * Entry(mask, (i + shift) % kWilliamsonOrder);
    }
    return sum;
  }

  std::array<int, kWilliamsonOrder> class_{};
  std::array<int64_t, kClasses> representative_{};
};

std::vector<int8_t> WilliamsonMatrix() {
  // Row r, column c: which circulant, and its sign.
  constexpr int kBlock[4][4] = {{0, 1, 2, 3}, {1, 0, 3, 2}, {2, 3, 0, 1}, {3, 2, 1, 0}};
  constexpr int kSign[4][4] = {{1, 1, 1, 1}, {-1, 1, -1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}};
  const Williamson43 circulants;
  const std::array<int, 4> rows = circulants.FirstRows();
  constexpr int64_t kOrder = 4 * kWilliamsonOrder;
  std::vector<int8_t> h(static_cast<size_t>(kOrder * kOrder));
  for (int64_t i = 0; i < kOrder; ++i) {
    for (int64_t j = 0; j < kOrder; ++j) {
      const int64_t r = i / kWilliamsonOrder, c = j / kWilliamsonOrder;
      const int64_t shift = (j - i + kOrder) % kWilliamsonOrder;
      h[static_cast<size_t>(i * kOrder + j)] =
          static_cast<int8_t>(kSign[r][c] * circulants.Entry(rows[kBlock[r][c]], shift));
    }
  }
  return h;
}

}  // namespace

bool HasHadamardCore(int64_t order) {
  if (order == 1) return true;
  if (order < 12 || order > kHadamardCoreMax || order % 8 != 4) return false;
  return FieldOf(order / 2 - 1).has_value() || FieldOf(order - 1).has_value() ||
         order == 4 * kWilliamsonOrder;
}

std::vector<int8_t> HadamardCore(int64_t order) {
  WALSH_CHECK(HasHadamardCore(order));
  if (order == 1) return {1};
  if (const auto field = FieldOf(order / 2 - 1)) return PaleySecond(*field);
  if (const auto field = FieldOf(order - 1)) return PaleyFirst(*field);
  return WilliamsonMatrix();
}

}  // namespace walsh::rotate
