// Hadamard matrices of orders 4 · odd, built by rule.
//
//   m = 2 (q + 1)   Paley's second construction, q = 1 mod 4: 12, 20, 28, 36, 52, 60, 76, 100, 108,
//   … m = q + 1       Paley's first, q = 3 mod 4: 44, 68, 140, … m = 172         Williamson's array
//   of four symmetric circulants of order 43
//
// with q a prime or the square of one, tried in this order. Left out: higher powers of primes,
// which up to 1,024 give no order that these do not, and Williamson's other orders. What neither
// gives, such as 92, 116 or 428, has no core here.
//
// Source:  Paley 1933, "On orthogonal matrices"; Williamson 1944, "Hadamard's determinant theorem
//          and the sum of four squares"
// Symbols: χ(x) is 1 for squares of the field GF(q), −1 for other elements, 0 for 0
#pragma once

#include <cstdint>
#include <vector>

namespace walsh::rotate {

// A core is multiplied as a dense matrix: larger ones would cost more than the rest of a rotation.
inline constexpr int64_t kHadamardCoreMax = 1024;

// Whether there is a core of this order: 1, or one of the above.
bool HasHadamardCore(int64_t order);

// The core's entries ±1, [order, order]; symmetric where Paley's second construction gives it.
// `order` must be one that there is.
std::vector<int8_t> HadamardCore(int64_t order);

}  // namespace walsh::rotate
