#include "worker/io/bounded_json.h"

#include <cstddef>
#include <exception>
#include <new>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/out_of_memory.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

using nlohmann::json;

// Builds a document from its events; the first violation ends the walk.
class BoundedBuilder {
 public:
  BoundedBuilder(std::string name, int depth_max) : name_(std::move(name)), depth_max_(depth_max) {}
  const absl::Status& status() const { return status_; }
  json TakeDocument() { return std::move(document_); }

  bool null() { return Scalar(nullptr); }
  bool boolean(bool value) { return Scalar(value); }
  bool number_integer(json::number_integer_t value) { return Scalar(value); }
  bool number_unsigned(json::number_unsigned_t value) { return Scalar(value); }
  bool number_float(json::number_float_t value, const std::string&) { return Scalar(value); }
  bool string(std::string& value) { return Scalar(std::move(value)); }
  bool binary(json::binary_t&) { return Fail("binary values"); }  // text has none
  bool start_object(size_t) { return Enter(json::value_t::object); }
  bool start_array(size_t) { return Enter(json::value_t::array); }
  bool end_object() { return Leave(); }
  bool end_array() { return Leave(); }

  bool key(std::string& key) {
    auto& members = open_.back()->get_ref<json::object_t&>();
    const auto [member, is_new] = members.try_emplace(std::move(key));
    member_ = &member->second;
    return is_new || Fail(absl::StrCat("key '", member->first, "' appears twice in one object"));
  }
  bool parse_error(size_t position, const std::string&, const json::exception&) {
    return Fail(absl::StrCat("invalid JSON at byte ", position));
  }

 private:
  template <typename T>
  bool Scalar(T&& value) {
    if (open_.empty()) return Fail("the top level is not an object");
    Place(std::forward<T>(value));
    return Count();
  }
  bool Enter(json::value_t type) {
    if (open_.empty() && type != json::value_t::object) {
      return Fail("the top level is not an object");
    }
    if (static_cast<int>(open_.size()) == depth_max_) {
      return Fail(absl::StrCat("nested deeper than ", depth_max_, " levels"));
    }
    open_.push_back(Place(json(type)));
    return Count();
  }
  bool Leave() {
    open_.pop_back();
    return true;
  }

  // A value where the document has come to. Nothing is added to an array while a value in it is
  // open, so that what is returned stays where it is for as long.
  template <typename T>
  json* Place(T&& value) {
    if (open_.empty()) {
      document_ = std::forward<T>(value);
      return &document_;
    }
    if (open_.back()->is_array()) {
      return &open_.back()->get_ref<json::array_t&>().emplace_back(std::forward<T>(value));
    }
    *member_ = std::forward<T>(value);
    return member_;
  }
  bool Count() {
    if (++n_values_ <= kJsonValuesMax) return true;
    return Fail(absl::StrCat("more than ", kJsonValuesMax, " values"));
  }
  bool Fail(std::string_view message) {
    status_ = absl::InvalidArgumentError(absl::StrCat(name_, ": ", std::string(message)));
    return false;
  }

  const std::string name_;
  const int depth_max_;
  json document_;
  std::vector<json*> open_;  // objects and arrays, the innermost last
  json* member_ = nullptr;   // of the innermost object, whose value comes next
  int64_t n_values_ = 0;
  absl::Status status_;
};

}  // namespace

absl::StatusOr<json> ParseBoundedJson(const std::string& name, std::string_view text,
                                      const JsonBounds& bounds) {
  if (static_cast<int64_t>(text.size()) > bounds.bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", text.size(), " bytes, at most ", bounds.bytes_max));
  }
  if (!IsValidUtf8(text)) return absl::InvalidArgumentError(absl::StrCat(name, ": not UTF-8"));
  try {
    BoundedBuilder builder(name, bounds.depth_max);
    if (!json::sax_parse(text.begin(), text.end(), &builder)) return builder.status();
    return builder.TakeDocument();
  } catch (const std::bad_alloc&) {
    return OutOfMemoryError(absl::StrCat(name, ": no memory left to parse it"));
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": invalid JSON: ", e.what()));
  }
}

std::optional<int64_t> Int64Of(const json& value) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() && !std::in_range<int64_t>(value.get<uint64_t>())) {
    return std::nullopt;
  }
  return value.get<int64_t>();
}

}  // namespace walsh
