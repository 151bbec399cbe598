// IsOk(), StatusIs(code, message) and the asserting assignment; Debian's Abseil has none.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh::testing {

inline const absl::Status& GetStatus(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& GetStatus(const absl::StatusOr<T>& status_or) {
  return status_or.status();
}

MATCHER(IsOk, "is OK") {
  const absl::Status& status = GetStatus(arg);
  *result_listener << status.ToString();
  return status.ok();
}

MATCHER_P2(StatusIs, code, message,
           "has code " + absl::StatusCodeToString(code) + " and a matching message") {
  const absl::Status& status = GetStatus(arg);
  *result_listener << status.ToString();
  return status.code() == code &&
         ::testing::ExplainMatchResult(message, std::string(status.message()), result_listener);
}

inline auto HasCode(absl::StatusCode code) { return StatusIs(code, ::testing::_); }

}  // namespace walsh::testing

#define ASSERT_OK(expr) ASSERT_THAT(expr, ::walsh::testing::IsOk())
#define EXPECT_OK(expr) EXPECT_THAT(expr, ::walsh::testing::IsOk())

#define WALSH_TEST_CONCAT_INNER_(a, b) a##b
#define WALSH_TEST_CONCAT_(a, b) WALSH_TEST_CONCAT_INNER_(a, b)
#define ASSERT_OK_AND_ASSIGN(lhs, expr) \
  ASSERT_OK_AND_ASSIGN_IMPL_(WALSH_TEST_CONCAT_(status_or_, __LINE__), lhs, expr)
#define ASSERT_OK_AND_ASSIGN_IMPL_(statusor, lhs, expr) \
  auto statusor = (expr);                               \
  ASSERT_OK(statusor);                                  \
  lhs = *std::move(statusor)
