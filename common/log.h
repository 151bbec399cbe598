// Structured logging: one line per event, text or JSON, through spdlog.
//
//   WALSH_LOG(Info, "job leased", {"job", job.name()}, {"worker", id}, {"token", token});
//
// Values are escaped (control characters, ESC, bidirectional marks) and cut at 1 KiB. Prompts,
// generated text, keys and certificates are never logged.
//
// Threads: safe.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace walsh::log {

enum class Level { kDebug, kInfo, kWarning, kError };
enum class Format { kText, kJson };

// One key and its value, rendered at the call.
class Field {
 public:
  Field(std::string_view key, std::string_view value) : key_(key), value_(value), quoted_(true) {}
  Field(std::string_view key, const std::string& value) : Field(key, std::string_view(value)) {}
  Field(std::string_view key, const char* value) : Field(key, std::string_view(value)) {}
  Field(std::string_view key, bool value) : key_(key), value_(value ? "true" : "false") {}
  Field(std::string_view key, int value) : key_(key), value_(std::to_string(value)) {}
  Field(std::string_view key, int64_t value) : key_(key), value_(std::to_string(value)) {}
  Field(std::string_view key, uint64_t value) : key_(key), value_(std::to_string(value)) {}
  Field(std::string_view key, double value);
  Field(std::string_view key, const absl::Status& status);

  std::string_view key() const { return key_; }
  const std::string& value() const { return value_; }
  bool quoted() const { return quoted_; }

 private:
  std::string_view key_;
  std::string value_;
  bool quoted_ = false;
};

// Called once at start. `component` is "coordinator", "worker" or "client". Logs go to stderr.
void Configure(std::string_view component, Format format, Level level);
// "debug", "info", "warning" or "error"; "text" or "json". INVALID_ARGUMENT otherwise.
absl::Status ParseLevel(std::string_view text, Level* level);
absl::Status ParseFormat(std::string_view text, Format* format);

bool Enabled(Level level);
void Write(Level level, std::string_view message, std::initializer_list<Field> fields);

// One line in the configured format without time and component, for tests.
std::string Render(Format format, Level level, std::string_view message,
                   std::initializer_list<Field> fields);
// What values go through: control characters, ESC and bidirectional marks become \u escapes,
// invalid UTF-8 becomes U+FFFD, and the whole is cut at 1 KiB.
std::string Escape(std::string_view value);

}  // namespace walsh::log

#define WALSH_LOG(level, message, ...)                                            \
  do {                                                                            \
    if (::walsh::log::Enabled(::walsh::log::Level::k##level)) {                   \
      ::walsh::log::Write(::walsh::log::Level::k##level, message, {__VA_ARGS__}); \
    }                                                                             \
  } while (false)
