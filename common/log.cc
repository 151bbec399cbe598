#include "common/log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <atomic>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/utf8.h"

namespace walsh::log {
namespace {

constexpr size_t kValueBytesMax = 1024;
constexpr std::string_view kCutMark = "…";

struct Configuration {
  std::string component = "walsh";
  Format format = Format::kText;
  std::shared_ptr<spdlog::logger> logger;
};

std::shared_ptr<const Configuration> MakeConfiguration(std::string_view component, Format format) {
  auto logger =
      std::make_shared<spdlog::logger>("walsh", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern("%v");  // Write builds the whole line: spdlog would not escape a JSON field
  logger->set_level(spdlog::level::trace);
  return std::make_shared<const Configuration>(
      Configuration{std::string(component), format, std::move(logger)});
}

// Never destroyed, so that threads may log while the process exits.
std::shared_ptr<const Configuration>& Current() {
  static auto* const current =
      new std::shared_ptr<const Configuration>(MakeConfiguration("walsh", Format::kText));
  return *current;
}

std::atomic<Level> min_level{Level::kInfo};

std::string_view LevelName(Level level) {
  switch (level) {
    case Level::kDebug:
      return "debug";
    case Level::kInfo:
      return "info";
    case Level::kWarning:
      return "warning";
    case Level::kError:
      return "error";
  }
  return "error";
}

spdlog::level::level_enum SpdlogLevel(Level level) {
  switch (level) {
    case Level::kDebug:
      return spdlog::level::debug;
    case Level::kInfo:
      return spdlog::level::info;
    case Level::kWarning:
      return spdlog::level::warn;
    case Level::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

// Control characters would forge lines or drive a terminal; bidirectional marks and the two
// separators make a line read as something else.
bool MustEscape(uint32_t c) {
  return c < 0x20 || (c >= 0x7F && c <= 0x9F) || c == 0x061C || c == 0x200E || c == 0x200F ||
         (c >= 0x2028 && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
}

enum class Quotes { kKeep, kEscape };

std::string EscapeBounded(std::string_view value, Quotes quotes) {
  std::string out;
  size_t n_kept = 0;  // whole characters up to here leave room for the mark
  for (size_t pos = 0; pos < value.size();) {
    if (out.size() + kCutMark.size() <= kValueBytesMax) n_kept = out.size();
    const uint32_t c = NextCodePoint(value, &pos);
    if (MustEscape(c)) {
      absl::StrAppendFormat(&out, "\\u%04x", c);
    } else {
      if (quotes == Quotes::kEscape && (c == '"' || c == '\\')) out.push_back('\\');
      AppendUtf8(c, out);
    }
    if (out.size() > kValueBytesMax) {
      out.resize(n_kept);
      out.append(kCutMark);
      break;
    }
  }
  return out;
}

bool IsPlain(std::string_view value) {
  if (value.empty()) return false;
  for (const char c : value) {
    if (c == ' ' || c == '"' || c == '\\' || c == '=') return false;
  }
  return true;
}

std::string JsonString(std::string_view value) {
  return absl::StrCat("\"", EscapeBounded(value, Quotes::kEscape), "\"");
}

std::string RenderText(Level level, std::string_view message, std::initializer_list<Field> fields) {
  std::string line = absl::StrCat(std::string(LevelName(level)), " ", Escape(message));
  for (const Field& field : fields) {
    absl::StrAppend(&line, " ", Escape(field.key()), "=");
    const std::string escaped = Escape(field.value());
    absl::StrAppend(&line,
                    !field.quoted() || IsPlain(escaped) ? escaped : JsonString(field.value()));
  }
  return line;
}

std::string RenderJson(Level level, std::string_view message, std::initializer_list<Field> fields) {
  std::string line = absl::StrCat("{\"level\":\"", std::string(LevelName(level)),
                                  "\",\"message\":", JsonString(message));
  for (const Field& field : fields) {
    absl::StrAppend(&line, ",", JsonString(field.key()), ":",
                    field.quoted() ? JsonString(field.value()) : field.value());
  }
  line.push_back('}');
  return line;
}

}  // namespace

Field::Field(std::string_view key, double value)
    : key_(key),
      value_(absl::StrFormat("%.6g", value)),
      // JSON has no infinities and no NaN.
      quoted_(!(value - value == 0)) {}

Field::Field(std::string_view key, const absl::Status& status)
    : Field(key, std::string_view(status.ToString())) {}

void Configure(std::string_view component, Format format, Level level) {
  std::atomic_store(&Current(), MakeConfiguration(component, format));
  min_level.store(level, std::memory_order_relaxed);
}

absl::Status ParseLevel(std::string_view text, Level* level) {
  for (const Level candidate : {Level::kDebug, Level::kInfo, Level::kWarning, Level::kError}) {
    if (text == LevelName(candidate)) {
      *level = candidate;
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("log level '", Escape(text), "' is none of debug, info, warning, error"));
}

absl::Status ParseFormat(std::string_view text, Format* format) {
  if (text == "text") {
    *format = Format::kText;
  } else if (text == "json") {
    *format = Format::kJson;
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("log format '", Escape(text), "' is none of text, json"));
  }
  return absl::OkStatus();
}

bool Enabled(Level level) { return level >= min_level.load(std::memory_order_relaxed); }

void Write(Level level, std::string_view message, std::initializer_list<Field> fields) {
  const auto current = std::atomic_load(&Current());
  const std::string time =
      absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  std::string line;
  if (current->format == Format::kJson) {
    const std::string rendered = RenderJson(level, message, fields);
    line = absl::StrCat("{\"time\":\"", time, "\",\"component\":", JsonString(current->component),
                        ",", rendered.substr(1));
  } else {
    line = absl::StrCat(time, " ", current->component, " ", RenderText(level, message, fields));
  }
  current->logger->log(SpdlogLevel(level), spdlog::string_view_t(line.data(), line.size()));
}

std::string Render(Format format, Level level, std::string_view message,
                   std::initializer_list<Field> fields) {
  return format == Format::kJson ? RenderJson(level, message, fields)
                                 : RenderText(level, message, fields);
}

std::string Escape(std::string_view value) { return EscapeBounded(value, Quotes::kKeep); }

}  // namespace walsh::log
