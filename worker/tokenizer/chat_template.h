// A model's own chat template, run by a bounded interpreter of a subset of Jinja (jinja/).
//
// Behaves as Hugging Face's apply_chat_template: trim_blocks and lstrip_blocks are on, tojson is
// plain JSON, `tools` and `documents` are none. Output, steps and nesting are limited
// (common/limits.h), there is no access to anything but the variables given, and whatever the
// subset lacks is an error that names it, never a guess.
//
// Errors:  INVALID_ARGUMENT    syntax error with line; raise_exception(...) of the template
//          UNIMPLEMENTED       a statement, filter, test or function outside the subset
//          RESOURCE_EXHAUSTED  a limit
// Threads: Render is safe from several threads.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace walsh {

struct ChatMessage {
  std::string role;
  std::string content;
};

class ChatTemplate {
 public:
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(std::string_view source);
  virtual ~ChatTemplate() = default;

  struct Variables {
    std::vector<ChatMessage> messages = {};
    bool add_generation_prompt = true;
    std::string bos_token = {};
    std::string eos_token = {};
    // What strftime_now shows, in UTC. Without it, the system's clock.
    std::optional<absl::Time> now = std::nullopt;
  };
  virtual absl::StatusOr<std::string> Render(const Variables& variables) const = 0;
};

}  // namespace walsh
