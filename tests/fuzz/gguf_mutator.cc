#include "tests/fuzz/gguf_mutator.h"

#include <cstring>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "tests/fuzz/mutate_bytes.h"
#include "tests/testing/checkpoint_bytes.h"

namespace walsh::fuzz {
namespace {

using testing::Raw;

constexpr size_t kAlignment = 32;
constexpr uint32_t kStringType = 8;
constexpr uint32_t kArrayType = 9;

size_t RoundUp(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

// Where the strings and numbers of a file are, up to the first thing that makes no sense.
class Fields {
 public:
  struct Field {
    size_t offset;  // of a string's bytes, which its length of 8 bytes is before
    size_t size;
    bool is_string;
  };

  explicit Fields(std::string_view bytes) : bytes_(bytes) { Walk(); }
  const std::vector<Field>& fields() const { return fields_; }
  // Past the last field of metadata and tensor infos.
  size_t end() const { return at_; }

 private:
  void Walk() {
    uint64_t n_tensors = 0;
    uint64_t n_keys = 0;
    at_ = 8;  // magic and version
    if (!Number(&n_tensors) || !Number(&n_keys)) return;
    for (uint64_t i = 0; i < n_keys; ++i) {
      uint32_t type = 0;
      if (!String() || !Number(&type) || !ValueOf(type)) return;
    }
    for (uint64_t i = 0; i < n_tensors; ++i) {
      uint32_t rank = 0;
      if (!String() || !Number(&rank)) return;
      uint64_t dim = 0;
      for (uint32_t k = 0; k < rank; ++k) {
        if (!Number(&dim)) return;
      }
      uint32_t type = 0;
      uint64_t offset = 0;
      if (!Number(&type) || !Number(&offset)) return;
    }
  }

  bool ValueOf(uint32_t type) {
    if (type == kStringType) return String();
    if (type != kArrayType) return Scalar(type);
    uint32_t item_type = 0;
    uint64_t n_items = 0;
    if (!Number(&item_type) || !Number(&n_items)) return false;
    for (uint64_t i = 0; i < n_items; ++i) {
      if (!(item_type == kStringType ? String() : Scalar(item_type))) return false;
    }
    return true;
  }
  bool Scalar(uint32_t type) {
    constexpr size_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // by enum gguf_type
    return type < std::size(kBytes) && kBytes[type] > 0 && Add(kBytes[type], /*is_string=*/false);
  }
  template <typename T>
  bool Number(T* value) {
    if (!Add(sizeof(T), /*is_string=*/false)) return false;
    std::memcpy(value, bytes_.data() + at_ - sizeof(T), sizeof(T));
    return true;
  }
  bool String() {
    uint64_t length = 0;
    if (!Number(&length)) return false;
    fields_.pop_back();  // set by the string's own size only
    return Add(length, /*is_string=*/true);
  }
  bool Add(uint64_t n_bytes, bool is_string) {
    if (at_ > bytes_.size() || n_bytes > bytes_.size() - at_) return false;
    fields_.push_back({at_, static_cast<size_t>(n_bytes), is_string});
    at_ += static_cast<size_t>(n_bytes);
    return true;
  }

  std::string_view bytes_;
  size_t at_ = 0;
  std::vector<Field> fields_;
};

std::string Number(size_t n_bytes, std::minstd_rand& random) {
  constexpr int64_t kInteresting[] = {
      0,   1,   2,  3,  4,    8,       31,      32,        33,        64, 127,
      255, 256, -1, -2, 1000, 1 << 16, 1 << 20, 1LL << 31, INT64_MAX, 9,  INT64_MIN};
  return Raw(kInteresting[random() % std::size(kInteresting)]).substr(0, n_bytes);
}

}  // namespace

size_t MutateGgufInput(uint8_t* data, size_t size, size_t size_max, uint32_t seed) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  const Fields walked(bytes);
  if (seed % 4 == 0 || walked.fields().empty()) return LLVMFuzzerMutate(data, size, size_max);

  std::minstd_rand random(seed);
  const Fields::Field field = walked.fields()[random() % walked.fields().size()];
  std::string mutated = bytes.substr(0, walked.end());
  if (field.is_string) {
    const std::string text = MutateBytes(bytes.substr(field.offset, field.size));
    mutated.replace(field.offset - sizeof(uint64_t), sizeof(uint64_t) + field.size,
                    Raw(uint64_t{text.size()}) + text);
  } else {
    mutated.replace(field.offset, field.size, Number(field.size, random));
  }
  const size_t data_begin = RoundUp(walked.end());
  if (data_begin < bytes.size()) {
    mutated.resize(RoundUp(mutated.size()));
    mutated += bytes.substr(data_begin);
  }
  return Deliver(mutated, data, size_max);
}

}  // namespace walsh::fuzz
