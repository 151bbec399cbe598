#include "worker/io/bounded_json.h"

#include <cstddef>
#include <exception>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

using nlohmann::json;

// Walks the events of a document without keeping it; the first violation ends the walk.
class BoundsChecker {
 public:
  BoundsChecker(std::string name, int depth_max) : name_(std::move(name)), depth_max_(depth_max) {}
  const absl::Status& status() const { return status_; }

  bool null() { return Scalar(); }
  bool boolean(bool) { return Scalar(); }
  bool number_integer(json::number_integer_t) { return Scalar(); }
  bool number_unsigned(json::number_unsigned_t) { return Scalar(); }
  bool number_float(json::number_float_t, const std::string&) { return Scalar(); }
  bool string(std::string&) { return Scalar(); }
  bool binary(json::binary_t&) { return Scalar(); }
  bool start_object(size_t) { return Enter(true); }
  bool start_array(size_t) { return Enter(false); }
  bool end_object() { return Leave(); }
  bool end_array() { return Leave(); }

  bool key(std::string& key) {
    if (keys_.back().insert(key).second) return true;
    return Fail(absl::StrCat("key '", key, "' appears twice in one object"));
  }
  bool parse_error(size_t position, const std::string&, const json::exception&) {
    return Fail(absl::StrCat("invalid JSON at byte ", position));
  }

 private:
  bool Scalar() {
    if (keys_.empty()) return Fail("the top level is not an object");
    return Count();
  }
  bool Count() {
    if (++n_values_ <= kJsonValuesMax) return true;
    return Fail(absl::StrCat("more than ", kJsonValuesMax, " values"));
  }
  bool Enter(bool is_object) {
    if (keys_.empty() && !is_object) return Fail("the top level is not an object");
    if (static_cast<int>(keys_.size()) == depth_max_) {
      return Fail(absl::StrCat("nested deeper than ", depth_max_, " levels"));
    }
    keys_.emplace_back();
    return Count();
  }
  bool Leave() {
    keys_.pop_back();
    return true;
  }
  bool Fail(std::string_view message) {
    status_ = absl::InvalidArgumentError(absl::StrCat(name_, ": ", std::string(message)));
    return false;
  }

  const std::string name_;
  const int depth_max_;
  std::vector<std::set<std::string>>
      keys_;  // one set for each open object; arrays have an empty one
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
    BoundsChecker checker(name, bounds.depth_max);
    if (!json::sax_parse(text.begin(), text.end(), &checker)) return checker.status();
    return json::parse(text.begin(), text.end());
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": invalid JSON: ", e.what()));
  }
}

}  // namespace walsh
