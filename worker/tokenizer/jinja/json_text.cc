#include "worker/tokenizer/jinja/json_text.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/python_text.h"

namespace walsh::jinja {
namespace {

class JsonWriter {
 public:
  explicit JsonWriter(std::optional<int64_t> indent) : indent_(indent) {}

  absl::Status Write(const Value& value) {
    if (value.is_none()) {
      out_ += "null";
    } else if (const bool* flag = value.boolean()) {
      out_ += *flag ? "true" : "false";
    } else if (value.integer() != nullptr) {
      out_ += ToText(value);
    } else if (const double* number = value.real()) {
      WriteReal(*number);
    } else if (const std::string* text = value.string()) {
      out_ += JsonOfString(*text);
    } else if (const List* list = value.list()) {
      return WriteList(*list);
    } else if (const Map* map = value.map()) {
      return WriteMap(*map);
    } else {
      return absl::InvalidArgumentError(absl::StrCat("tojson of ", std::string(value.TypeName())));
    }
    return absl::OkStatus();
  }

  std::string Take() { return std::move(out_); }

 private:
  void WriteReal(double number) {
    if (std::isnan(number)) {
      out_ += "NaN";
    } else if (std::isinf(number)) {
      out_ += number > 0 ? "Infinity" : "-Infinity";
    } else {
      out_ += ReprOfReal(number);
    }
  }

  absl::Status WriteList(const List& list) {
    if (list.items.empty()) {
      out_ += "[]";
      return absl::OkStatus();
    }
    out_ += "[";
    ++level_;
    for (size_t i = 0; i < list.items.size(); ++i) {
      Separate(i == 0);
      WALSH_RETURN_IF_ERROR(Write(list.items[i]));
    }
    Close("]");
    return absl::OkStatus();
  }

  absl::Status WriteMap(const Map& map) {
    if (map.items.empty()) {
      out_ += "{}";
      return absl::OkStatus();
    }
    out_ += "{";
    ++level_;
    for (size_t i = 0; i < map.items.size(); ++i) {
      Separate(i == 0);
      out_ += JsonOfString(map.items[i].first) + ": ";
      WALSH_RETURN_IF_ERROR(Write(map.items[i].second));
    }
    Close("}");
    return absl::OkStatus();
  }

  void NewLine() {
    out_ += "\n";
    out_.append(static_cast<size_t>(std::max<int64_t>(*indent_, 0) * level_), ' ');
  }
  void Separate(bool is_first) {
    if (!is_first) out_ += indent_ ? "," : ", ";
    if (indent_) NewLine();
  }
  void Close(std::string_view bracket) {
    --level_;
    if (indent_) NewLine();
    out_ += bracket;
  }

  const std::optional<int64_t> indent_;
  int64_t level_ = 0;
  std::string out_;
};

}  // namespace

absl::StatusOr<std::string> ToJson(const Value& value, std::optional<int64_t> indent) {
  JsonWriter writer(indent);
  WALSH_RETURN_IF_ERROR(writer.Write(value));
  return writer.Take();
}

}  // namespace walsh::jinja
