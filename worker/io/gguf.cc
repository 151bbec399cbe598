#include "worker/io/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <set>
#include <span>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr char kAlignmentKey[] = "general.alignment";
constexpr int64_t kAlignmentDefault = 32;
constexpr int64_t kKeyBytesMax = 256;

enum class ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// Bytes of one value in the file: exact for scalars, the least for strings; 0 for no known type.
int64_t MinimumBytes(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
    case ValueType::kInt8:
    case ValueType::kBool:
      return 1;
    case ValueType::kUint16:
    case ValueType::kInt16:
      return 2;
    case ValueType::kUint32:
    case ValueType::kInt32:
    case ValueType::kFloat32:
      return 4;
    case ValueType::kUint64:
    case ValueType::kInt64:
    case ValueType::kFloat64:
    case ValueType::kString:
      return 8;
    case ValueType::kArray:
      return 12;
  }
  return 0;
}

// Reads forward through a file in windows, so that small fields cost no system call each.
class Cursor {
 public:
  explicit Cursor(const RandomAccessFile& file) : file_(file) {}

  int64_t position() const { return position_; }
  int64_t remaining() const { return file_.size() - position_; }

  absl::Status ReadBytes(std::span<std::byte> out, std::string_view what) {
    if (static_cast<int64_t>(out.size()) > remaining()) {
      return absl::DataLossError(absl::StrCat(file_.name(), ": truncated: ", std::string(what),
                                              " at byte ", position_, " needs ", out.size(),
                                              " bytes, ", remaining(), " are left"));
    }
    while (!out.empty()) {
      const int64_t in_window = position_ - window_begin_;
      const bool is_inside = in_window >= 0 && in_window < static_cast<int64_t>(window_.size());
      if (!is_inside) {
        WALSH_RETURN_IF_ERROR(FillWindow());
        continue;
      }
      const size_t n = std::min(out.size(), window_.size() - static_cast<size_t>(in_window));
      std::copy_n(window_.begin() + in_window, n, out.begin());
      out = out.subspan(n);
      position_ += static_cast<int64_t>(n);
    }
    return absl::OkStatus();
  }

  template <typename T>
  absl::StatusOr<T> Read(std::string_view what) {
    static_assert(std::is_trivially_copyable_v<T>);
    T value{};
    WALSH_RETURN_IF_ERROR(ReadBytes(std::as_writable_bytes(std::span(&value, 1)), what));
    return value;
  }

  absl::StatusOr<std::string> ReadString(std::string_view what, int64_t bytes_max) {
    WALSH_ASSIGN_OR_RETURN(const uint64_t length, Read<uint64_t>(what));
    if (length > static_cast<uint64_t>(bytes_max)) {
      return absl::InvalidArgumentError(absl::StrCat(file_.name(), ": ", std::string(what), " has ",
                                                     length, " bytes, at most ", bytes_max));
    }
    // Before the allocation: a short file must not reserve what it only claims to hold.
    if (static_cast<int64_t>(length) > remaining()) {
      return absl::DataLossError(absl::StrCat(file_.name(), ": truncated: ", std::string(what),
                                              " has ", length, " bytes, ", remaining(),
                                              " are left"));
    }
    std::string text(length, '\0');
    WALSH_RETURN_IF_ERROR(ReadBytes(std::as_writable_bytes(std::span(text)), what));
    if (!IsValidUtf8(text)) {
      return absl::InvalidArgumentError(
          absl::StrCat(file_.name(), ": ", std::string(what), " is not UTF-8"));
    }
    return text;
  }

 private:
  absl::Status FillWindow() {
    constexpr int64_t kWindowBytes = 256 << 10;
    window_.resize(static_cast<size_t>(std::min(kWindowBytes, remaining())));
    window_begin_ = position_;
    return file_.ReadAt(position_, window_);
  }

  const RandomAccessFile& file_;
  std::vector<std::byte> window_;
  int64_t window_begin_ = 0;
  int64_t position_ = 0;
};

class Parser {
 public:
  explicit Parser(const RandomAccessFile& file) : file_(file), cursor_(file) {}

  absl::StatusOr<GgufContents> Parse() {
    WALSH_RETURN_IF_ERROR(ReadPreamble());
    for (uint64_t i = 0; i < n_keys_; ++i) WALSH_RETURN_IF_ERROR(ReadKey());
    WALSH_ASSIGN_OR_RETURN(const int64_t alignment, Alignment());
    out_.tensors.reserve(n_tensors_);
    for (uint64_t i = 0; i < n_tensors_; ++i) WALSH_RETURN_IF_ERROR(ReadTensorInfo(alignment));
    WALSH_RETURN_IF_ERROR(PlaceTensors(alignment));
    return std::move(out_);
  }

 private:
  absl::Status Malformed(const std::string& message) const {
    return absl::InvalidArgumentError(absl::StrCat(file_.name(), ": ", message));
  }

  absl::Status ReadPreamble() {
    WALSH_ASSIGN_OR_RETURN(const auto magic, (cursor_.Read<std::array<char, 4>>("the magic")));
    if (std::string_view(magic.data(), magic.size()) != kMagic) {
      return Malformed("does not begin with 'GGUF'");
    }
    WALSH_ASSIGN_OR_RETURN(const auto version, cursor_.Read<uint32_t>("the version"));
    if (version != 0 && (version & 0xffffu) == 0) {
      return absl::UnimplementedError(
          absl::StrCat(file_.name(), ": big-endian GGUF is not supported"));
    }
    if (version != 2 && version != 3) {
      return absl::UnimplementedError(absl::StrCat(file_.name(), ": GGUF version ", version,
                                                   " is not supported; supported: 2, 3"));
    }
    WALSH_ASSIGN_OR_RETURN(n_tensors_, cursor_.Read<uint64_t>("the number of tensors"));
    WALSH_ASSIGN_OR_RETURN(n_keys_, cursor_.Read<uint64_t>("the number of keys"));
    if (n_tensors_ > static_cast<uint64_t>(limits::kTensorsMax)) {
      return Malformed(absl::StrCat(n_tensors_, " tensors, at most ", limits::kTensorsMax));
    }
    if (n_keys_ > static_cast<uint64_t>(limits::kGgufKeysMax)) {
      return Malformed(absl::StrCat(n_keys_, " keys, at most ", limits::kGgufKeysMax));
    }
    // The least that so many keys (length, type, value) and tensors (length, rank, type, offset)
    // take in the file.
    constexpr uint64_t kKeyBytes = 8 + 4 + 1;
    constexpr uint64_t kTensorBytes = 8 + 4 + 4 + 8;
    const uint64_t least = n_keys_ * kKeyBytes + n_tensors_ * kTensorBytes;
    if (least > static_cast<uint64_t>(cursor_.remaining())) {
      return absl::DataLossError(absl::StrCat(file_.name(), ": truncated: ", n_keys_, " keys and ",
                                              n_tensors_, " tensors take at least ", least,
                                              " bytes, ", cursor_.remaining(), " are left"));
    }
    return absl::OkStatus();
  }

  absl::Status CheckName(const std::string& what, const std::string& name) const {
    const bool is_printable =
        std::all_of(name.begin(), name.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
    if (!name.empty() && is_printable) return absl::OkStatus();
    return Malformed(absl::StrCat(what, " is not a printable ASCII name"));
  }

  absl::Status ReadKey() {
    const std::string what = absl::StrCat("key ", out_.metadata.size());
    WALSH_ASSIGN_OR_RETURN(const std::string key, cursor_.ReadString(what, kKeyBytesMax));
    WALSH_RETURN_IF_ERROR(CheckName(what, key));
    const std::string where = absl::StrCat("key '", key, "'");
    WALSH_ASSIGN_OR_RETURN(const auto type, cursor_.Read<uint32_t>(where));
    GgufValue value;
    WALSH_RETURN_IF_ERROR(ReadValue(where, static_cast<ValueType>(type), value));
    if (out_.metadata.emplace(key, std::move(value)).second) return absl::OkStatus();
    return Malformed(absl::StrCat(where, " appears twice"));
  }

  absl::Status ReadValue(const std::string& where, ValueType type, GgufValue& out) {
    switch (type) {
      case ValueType::kFloat32:
      case ValueType::kFloat64: {
        WALSH_ASSIGN_OR_RETURN(out, ReadFloat(where, type));
        return absl::OkStatus();
      }
      case ValueType::kBool: {
        WALSH_ASSIGN_OR_RETURN(const int64_t value, ReadInteger(where, type));
        out = value != 0;
        return absl::OkStatus();
      }
      case ValueType::kString: {
        WALSH_ASSIGN_OR_RETURN(out, ReadText(where));
        return absl::OkStatus();
      }
      case ValueType::kArray:
        return ReadArray(where, out);
      default: {
        WALSH_ASSIGN_OR_RETURN(out, ReadInteger(where, type));
        return absl::OkStatus();
      }
    }
  }

  // A sparse file can claim any number of long strings.
  absl::StatusOr<std::string> ReadText(const std::string& where) {
    WALSH_ASSIGN_OR_RETURN(std::string text,
                           cursor_.ReadString(where, limits::kGgufStringBytesMax));
    n_text_bytes_ += static_cast<int64_t>(text.size());
    if (n_text_bytes_ <= limits::kGgufTextBytesMax) return text;
    return Malformed(absl::StrCat("more than ", limits::kGgufTextBytesMax,
                                  " bytes of strings in all, at ", where));
  }

  template <typename T>
  absl::StatusOr<int64_t> ReadAs(const std::string& where) {
    WALSH_ASSIGN_OR_RETURN(const T value, cursor_.Read<T>(where));
    if constexpr (std::is_same_v<T, uint64_t>) {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Malformed(absl::StrCat(where, " is ", value, ", beyond 2^63"));
      }
    }
    return static_cast<int64_t>(value);
  }

  absl::StatusOr<int64_t> ReadInteger(const std::string& where, ValueType type) {
    switch (type) {
      case ValueType::kUint8:
        return ReadAs<uint8_t>(where);
      case ValueType::kInt8:
        return ReadAs<int8_t>(where);
      case ValueType::kUint16:
        return ReadAs<uint16_t>(where);
      case ValueType::kInt16:
        return ReadAs<int16_t>(where);
      case ValueType::kUint32:
        return ReadAs<uint32_t>(where);
      case ValueType::kInt32:
        return ReadAs<int32_t>(where);
      case ValueType::kUint64:
        return ReadAs<uint64_t>(where);
      case ValueType::kInt64:
        return ReadAs<int64_t>(where);
      case ValueType::kBool: {
        WALSH_ASSIGN_OR_RETURN(const auto value, cursor_.Read<uint8_t>(where));
        if (value <= 1) return static_cast<int64_t>(value);
        return Malformed(absl::StrCat(where, " holds the boolean ", static_cast<int>(value)));
      }
      default:
        return Malformed(
            absl::StrCat(where, " has the unknown type ", static_cast<uint32_t>(type)));
    }
  }

  absl::StatusOr<double> ReadFloat(const std::string& where, ValueType type) {
    if (type == ValueType::kFloat64) return cursor_.Read<double>(where);
    WALSH_ASSIGN_OR_RETURN(const float value, cursor_.Read<float>(where));
    return static_cast<double>(value);
  }

  absl::Status ReadArray(const std::string& where, GgufValue& out) {
    WALSH_ASSIGN_OR_RETURN(const auto raw_type, cursor_.Read<uint32_t>(where));
    WALSH_ASSIGN_OR_RETURN(const auto count, cursor_.Read<uint64_t>(where));
    const auto type = static_cast<ValueType>(raw_type);
    if (type == ValueType::kArray) {
      return absl::UnimplementedError(
          absl::StrCat(file_.name(), ": ", where, " is an array of arrays"));
    }
    const int64_t item_bytes = MinimumBytes(type);
    if (item_bytes == 0) {
      return Malformed(absl::StrCat(where, " has the unknown item type ", raw_type));
    }
    if (count > static_cast<uint64_t>(limits::kGgufArrayItemsMax)) {
      return Malformed(
          absl::StrCat(where, " has ", count, " items, at most ", limits::kGgufArrayItemsMax));
    }
    const auto n = static_cast<int64_t>(count);
    n_items_ += n;
    if (n_items_ > limits::kGgufItemsMax) {
      return Malformed(
          absl::StrCat("more than ", limits::kGgufItemsMax, " array items in all, at ", where));
    }
    if (n * item_bytes > cursor_.remaining()) {
      return absl::DataLossError(absl::StrCat(file_.name(), ": truncated: ", where, " has ", n,
                                              " items of at least ", item_bytes, " bytes, ",
                                              cursor_.remaining(), " are left"));
    }
    if (type == ValueType::kString) {
      return ReadItems<std::string>(n, out, [&] { return ReadText(where); });
    }
    if (type == ValueType::kFloat32 || type == ValueType::kFloat64) {
      return ReadItems<double>(n, out, [&] { return ReadFloat(where, type); });
    }
    return ReadItems<int64_t>(n, out, [&] { return ReadInteger(where, type); });
  }

  template <typename T, typename ReadOne>
  static absl::Status ReadItems(int64_t n, GgufValue& out, ReadOne read_one) {
    std::vector<T> items;
    items.reserve(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      WALSH_ASSIGN_OR_RETURN(T item, read_one());
      items.push_back(std::move(item));
    }
    out = std::move(items);
    return absl::OkStatus();
  }

  absl::StatusOr<int64_t> Alignment() const {
    const auto it = out_.metadata.find(kAlignmentKey);
    if (it == out_.metadata.end()) return kAlignmentDefault;
    const auto* value = std::get_if<int64_t>(&it->second);
    if (value == nullptr || *value < 8 || *value > limits::kGgufAlignmentMax ||
        !std::has_single_bit(static_cast<uint64_t>(*value))) {
      return Malformed(absl::StrCat(kAlignmentKey, " must be a power of two from 8 to ",
                                    limits::kGgufAlignmentMax,
                                    value == nullptr ? "" : absl::StrCat(", is ", *value)));
    }
    return *value;
  }

  absl::Status ReadTensorInfo(int64_t alignment) {
    GgufTensor tensor;
    const std::string what = absl::StrCat("the name of tensor ", out_.tensors.size());
    WALSH_ASSIGN_OR_RETURN(tensor.name, cursor_.ReadString(what, limits::kTensorNameBytesMax));
    WALSH_RETURN_IF_ERROR(CheckName(what, tensor.name));
    const std::string where = absl::StrCat("tensor '", tensor.name, "'");
    WALSH_ASSIGN_OR_RETURN(const auto rank, cursor_.Read<uint32_t>(where));
    if (rank < 1 || rank > static_cast<uint32_t>(limits::kGgufTensorDimsMax)) {
      return Malformed(absl::StrCat(where, ": ", rank, " dimensions, must be 1 to ",
                                    limits::kGgufTensorDimsMax));
    }
    for (uint32_t i = 0; i < rank; ++i) {
      WALSH_ASSIGN_OR_RETURN(const int64_t dim, ReadAs<uint64_t>(where));
      tensor.dims.push_back(dim);
    }
    WALSH_ASSIGN_OR_RETURN(const auto type, cursor_.Read<uint32_t>(where));
    const std::optional<StorageType> known = StorageTypeFromGgml(type);
    if (!known.has_value()) {
      return absl::UnimplementedError(absl::StrCat(file_.name(), ": ", where, ": type ",
                                                   std::string(GgmlTypeName(type)), " (", type,
                                                   ") is not supported"));
    }
    tensor.type = *known;
    WALSH_ASSIGN_OR_RETURN(tensor.offset, ReadAs<uint64_t>(where));
    if (tensor.offset % alignment != 0) {
      return Malformed(absl::StrCat(where, ": offset ", tensor.offset,
                                    " is no multiple of the alignment ", alignment));
    }
    WALSH_ASSIGN_OR_RETURN(tensor.size_bytes, CheckedBytes(where, tensor));
    if (!tensor_names_.insert(tensor.name).second) {
      return Malformed(absl::StrCat(where, " appears twice"));
    }
    out_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  absl::StatusOr<int64_t> CheckedBytes(const std::string& where, const GgufTensor& tensor) const {
    const StorageTypeInfo& info = Info(tensor.type);
    int64_t elements = 1;
    for (const int64_t dim : tensor.dims) {
      if (dim == 0) return Malformed(absl::StrCat(where, ": a dimension is 0"));
      if (__builtin_mul_overflow(elements, dim, &elements)) {
        return Malformed(absl::StrCat(where, ": the shape's size overflows 64 bits"));
      }
    }
    if (tensor.dims[0] % info.block_elements != 0) {
      return Malformed(absl::StrCat(where, ": rows of ", tensor.dims[0], " elements are no whole ",
                                    std::string(info.name), " blocks of ", info.block_elements));
    }
    int64_t bytes = 0;
    if (__builtin_mul_overflow(elements / info.block_elements, info.block_bytes, &bytes)) {
      return Malformed(absl::StrCat(where, ": the shape's size overflows 64 bits"));
    }
    return bytes;
  }

  // Offsets become absolute once each tensor has been found where the one before it ends.
  absl::Status PlaceTensors(int64_t alignment) {
    if (out_.tensors.empty()) return absl::OkStatus();
    const auto round_up = [alignment](int64_t n) {
      return (n + alignment - 1) / alignment * alignment;
    };
    const int64_t data_begin = round_up(cursor_.position());
    const int64_t data_bytes = std::max<int64_t>(0, file_.size() - data_begin);
    std::sort(out_.tensors.begin(), out_.tensors.end(),
              [](const auto& a, const auto& b) { return a.offset < b.offset; });
    int64_t end = 0;
    for (GgufTensor& tensor : out_.tensors) {
      const std::string where = absl::StrCat("tensor '", tensor.name, "'");
      const int64_t expected = round_up(end);
      if (tensor.offset != expected) {
        return Malformed(absl::StrCat(
            where, tensor.offset < expected ? " overlaps" : " leaves a gap after",
            " the tensor before it: begins at ", tensor.offset, ", expected ", expected));
      }
      // Subtraction, because an offset near 2^63 plus a size would overflow.
      if (tensor.offset > data_bytes || tensor.size_bytes > data_bytes - tensor.offset) {
        return absl::DataLossError(absl::StrCat(file_.name(), ": truncated: ", where, " has ",
                                                tensor.size_bytes, " bytes at ", tensor.offset,
                                                " of the data, the file has ", data_bytes));
      }
      end = tensor.offset + tensor.size_bytes;
      tensor.offset += data_begin;
    }
    if (data_bytes > round_up(end)) {
      return Malformed(
          absl::StrCat(data_bytes - end, " bytes after the last tensor belong to none"));
    }
    return absl::OkStatus();
  }

  const RandomAccessFile& file_;
  Cursor cursor_;
  GgufContents out_;
  std::set<std::string> tensor_names_;
  uint64_t n_tensors_ = 0;
  uint64_t n_keys_ = 0;
  int64_t n_items_ = 0;
  int64_t n_text_bytes_ = 0;
};

}  // namespace

absl::StatusOr<GgufContents> ParseGguf(const RandomAccessFile& file) {
  return Parser(file).Parse();
}

}  // namespace walsh
