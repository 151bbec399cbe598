// Early return on a status that is not OK.
//
// Debian's Abseil (20220623) has no status macros of its own.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define WALSH_RETURN_IF_ERROR(expr)                                   \
  do {                                                                \
    if (::absl::Status walsh_status_ = (expr); !walsh_status_.ok()) { \
      return walsh_status_;                                           \
    }                                                                 \
  } while (false)

#define WALSH_STATUS_CONCAT_INNER_(a, b) a##b
#define WALSH_STATUS_CONCAT_(a, b) WALSH_STATUS_CONCAT_INNER_(a, b)

// WALSH_ASSIGN_OR_RETURN(auto value, FunctionThatReturnsStatusOr());
#define WALSH_ASSIGN_OR_RETURN(lhs, expr) \
  WALSH_ASSIGN_OR_RETURN_IMPL_(WALSH_STATUS_CONCAT_(walsh_status_or_, __LINE__), lhs, expr)
#define WALSH_ASSIGN_OR_RETURN_IMPL_(statusor, lhs, expr)  \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = *std::move(statusor)
