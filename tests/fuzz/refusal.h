// What a fuzz target asks of every refusal.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "absl/status/status.h"
#include "common/check.h"

namespace walsh::fuzz {

// The code is one of those that the header of what was called documents, and there is a message.
inline void CheckRefusal(const absl::Status& status,
                         std::initializer_list<absl::StatusCode> documented) {
  const bool is_documented =
      std::find(documented.begin(), documented.end(), status.code()) != documented.end();
  // Compared, so that it is printed.
  if (!is_documented) WALSH_CHECK_EQ(status.ToString(), "a status that the header documents");
  WALSH_CHECK(!status.message().empty());
}

}  // namespace walsh::fuzz
