// Checks for our own bugs, on in every build.
//
// Nothing that comes from outside (file, request, environment) may reach one: that is an
// absl::Status.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace walsh::internal {

[[noreturn]] inline void CheckFailed(const char* file, int line, const char* expr,
                                     const std::string& operands = "") {
  std::fprintf(stderr, "%s:%d: check failed: %s%s%s\n", file, line, expr,
               operands.empty() ? "" : ", with ", operands.c_str());
  std::abort();
}

template <typename A, typename B>
std::string Operands(const A& a, const B& b) {
  std::ostringstream out;
  out << a << " and " << b;
  return out.str();
}

}  // namespace walsh::internal

#define WALSH_CHECK(cond)                                                   \
  do {                                                                      \
    if (!(cond)) ::walsh::internal::CheckFailed(__FILE__, __LINE__, #cond); \
  } while (false)

#define WALSH_CHECK_OP_(a, op, b)                                                      \
  do {                                                                                 \
    const auto& walsh_a_ = (a);                                                        \
    const auto& walsh_b_ = (b);                                                        \
    if (!(walsh_a_ op walsh_b_)) {                                                     \
      ::walsh::internal::CheckFailed(__FILE__, __LINE__, #a " " #op " " #b,            \
                                     ::walsh::internal::Operands(walsh_a_, walsh_b_)); \
    }                                                                                  \
  } while (false)

#define WALSH_CHECK_EQ(a, b) WALSH_CHECK_OP_(a, ==, b)
#define WALSH_CHECK_NE(a, b) WALSH_CHECK_OP_(a, !=, b)
#define WALSH_CHECK_LE(a, b) WALSH_CHECK_OP_(a, <=, b)
#define WALSH_CHECK_LT(a, b) WALSH_CHECK_OP_(a, <, b)
#define WALSH_CHECK_GE(a, b) WALSH_CHECK_OP_(a, >=, b)
#define WALSH_CHECK_GT(a, b) WALSH_CHECK_OP_(a, >, b)
