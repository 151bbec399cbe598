#include "tests/fuzz/json_mutator.h"

#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>
#include <vector>

#include "tests/fuzz/mutate_bytes.h"

namespace walsh::fuzz {
namespace {

// Keeps the order of members, in which some formats have meaning.
using Json = nlohmann::ordered_json;

class Mutator {
 public:
  Mutator(Json* root, uint32_t seed) : root_(root), random_(seed) { Collect(root); }

  void ChangeOne() {
    Json& value = AnyValue();
    switch (Below(6)) {
      case 0:
        value = Scalar();
        return;
      case 1:
        // By way of a copy: the one may hold the other.
        value = Json(AnyValue());
        return;
      case 2:
        return Erase(value);
      case 3:
        return Add(value);
      default:
        return Adjust(value);
    }
  }

 private:
  size_t Below(size_t n) { return random_() % n; }
  Json& AnyValue() { return *values_[Below(values_.size())]; }

  void Collect(Json* value) {
    values_.push_back(value);
    for (Json& child : *value) {
      if (value->is_structured()) Collect(&child);
    }
  }

  // Where parsers go wrong: signs, widths, emptiness, another type.
  Json Scalar() {
    const Json scalars[] = {0,
                            1,
                            -1,
                            0.5,
                            1e308,
                            std::numeric_limits<int32_t>::max(),
                            std::numeric_limits<int32_t>::min(),
                            std::numeric_limits<int64_t>::max(),
                            std::numeric_limits<int64_t>::min(),
                            std::numeric_limits<uint64_t>::max(),
                            int64_t{1} << 53,
                            1 << 20,
                            "",
                            true,
                            false,
                            nullptr,
                            Json::array(),
                            Json::object()};
    return scalars[Below(std::size(scalars))];
  }

  void Adjust(Json& value) {
    if (value.is_string()) {
      value = MutateBytes(value.get<std::string>());
    } else if (value.is_number_unsigned()) {
      const auto number = value.get<uint64_t>();
      const uint64_t near[] = {number + 1, number - 1, number * 2, number / 2, number + 32};
      value = near[Below(std::size(near))];
    } else if (value.is_number_float()) {
      const double number = value.get<double>();
      const double near[] = {-number, number * 2, number / 1024, number + 1};
      value = near[Below(std::size(near))];
    } else if (value.is_boolean()) {
      value = !value.get<bool>();
    } else {
      value = Scalar();
    }
  }

  void Erase(Json& parent) {
    if (!parent.is_structured() || parent.empty()) return;
    parent.erase(std::next(parent.begin(), static_cast<std::ptrdiff_t>(Below(parent.size()))));
  }

  void Add(Json& parent) {
    Json copy = AnyValue();
    if (parent.is_array()) parent.push_back(std::move(copy));
    if (parent.is_object()) parent[Key(parent)] = std::move(copy);
  }

  // A key of this object with other bytes, or one of another object.
  std::string Key(const Json& parent) {
    const Json& other = Below(2) == 0 ? parent : AnyValue();
    if (!other.is_object() || other.empty()) return MutateBytes("key");
    const auto member = std::next(other.begin(), static_cast<std::ptrdiff_t>(Below(other.size())));
    return Below(2) == 0 ? member.key() : MutateBytes(member.key());
  }

  Json* root_;
  std::minstd_rand random_;
  std::vector<Json*> values_;
};

}  // namespace

std::optional<std::string> MutateJson(std::string_view text, uint32_t seed) {
  // Recursive where it collects and prints: no deeper than any parser of ours goes on reading.
  constexpr int kDepthMax = 64;
  bool is_too_deep = false;
  Json root = Json::parse(
      text,
      [&](int depth, Json::parse_event_t, const Json&) {
        is_too_deep |= depth > kDepthMax;
        return !is_too_deep;
      },
      /*allow_exceptions=*/false);
  if (root.is_discarded() || is_too_deep) return std::nullopt;
  Mutator(&root, seed).ChangeOne();
  return root.dump(-1, ' ', false, Json::error_handler_t::replace);
}

size_t MutateJsonInput(uint8_t* data, size_t size, size_t size_max, uint32_t seed) {
  std::optional<std::string> mutated;
  if (seed % 4 != 0) {
    mutated = MutateJson({reinterpret_cast<const char*>(data), size}, seed / 4);
  }
  return mutated ? Deliver(*mutated, data, size_max) : LLVMFuzzerMutate(data, size, size_max);
}

}  // namespace walsh::fuzz
