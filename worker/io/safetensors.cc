#include "worker/io/safetensors.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <exception>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <unordered_set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

using nlohmann::json;

constexpr int64_t kLengthBytes = 8;
constexpr char kMetadataKey[] = "__metadata__";

struct Dtype {
  std::string_view name;
  int64_t bytes;
};
constexpr std::array<Dtype, 16> kDtypes = {{{"BOOL", 1},
                                            {"U8", 1},
                                            {"I8", 1},
                                            {"F8_E5M2", 1},
                                            {"F8_E4M3", 1},
                                            {"F8_E8M0", 1},
                                            {"I16", 2},
                                            {"U16", 2},
                                            {"F16", 2},
                                            {"BF16", 2},
                                            {"I32", 4},
                                            {"U32", 4},
                                            {"F32", 4},
                                            {"F64", 8},
                                            {"I64", 8},
                                            {"U64", 8}}};

bool IsPrintable(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

// Builds the entries from the parser's events. Offsets are relative to the data until the end.
//
//   depth 1: the header; its keys name tensors       depth 2: one tensor, or __metadata__
//   depth 3: an array of numbers (shape, data_offsets)
class HeaderBuilder {
 public:
  struct Tensor {
    SafetensorsEntry entry;
    std::vector<int64_t> offsets;  // begin, end
    bool has_dtype = false;
    bool has_shape = false;
    bool has_offsets = false;
  };

  explicit HeaderBuilder(std::string file) : file_(std::move(file)) {}
  const absl::Status& status() const { return status_; }
  std::vector<Tensor>& tensors() { return tensors_; }

  bool null() { return Unexpected("null"); }
  bool boolean(bool) { return Unexpected("a boolean"); }
  bool number_float(json::number_float_t, const std::string&) { return Unexpected("a fraction"); }
  bool binary(json::binary_t&) { return Unexpected("binary data"); }
  bool number_integer(json::number_integer_t) { return Unexpected("a negative number"); }

  bool number_unsigned(json::number_unsigned_t value) {
    if (depth_ != 3) return Unexpected("a number");
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Fail(absl::StrCat(member_, " holds ", value, ", beyond 2^63"));
    }
    std::vector<int64_t>& list = in_shape() ? current().entry.shape : current().offsets;
    const int64_t items_max = in_shape() ? limits::kTensorDimsMax : 2;
    if (static_cast<int64_t>(list.size()) == items_max) {
      return in_shape() ? Fail(absl::StrCat("more than ", limits::kTensorDimsMax, " dimensions"))
                        : Fail("data_offsets has more than 2 numbers");
    }
    list.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(std::string& value) {
    if (in_metadata_ && depth_ == 2) return true;
    if (depth_ != 2 || member_ != "dtype") return Unexpected("a string");
    if (SafetensorsDtypeBytes(value) == 0) {
      status_ = absl::UnimplementedError(
          absl::StrCat(file_, ": ", subject_, ": dtype '", Shown(value), "' is not known"));
      return false;
    }
    current().entry.dtype = value;
    current().has_dtype = true;
    return true;
  }

  bool start_object(size_t) {
    if (depth_ >= 2) return Fail("nested deeper than the format allows");
    ++depth_;
    return true;
  }
  bool end_object() {
    --depth_;
    const bool is_tensor_end = depth_ == 1 && !in_metadata_;
    if (depth_ == 1) in_metadata_ = false;
    return !is_tensor_end || CheckComplete();
  }

  bool start_array(size_t) {
    if (depth_ != 2 || in_metadata_) return Unexpected("an array");
    if (member_ != "shape" && member_ != "data_offsets") return Unexpected("an array");
    (in_shape() ? current().has_shape : current().has_offsets) = true;
    ++depth_;
    return true;
  }
  bool end_array() {
    --depth_;
    if (!in_shape() && current().offsets.size() != 2) return Fail("data_offsets has no 2 numbers");
    return true;
  }

  bool key(std::string& key) { return depth_ == 1 ? TensorKey(key) : MemberKey(key); }

  bool parse_error(size_t position, const std::string&, const json::exception&) {
    status_ = absl::InvalidArgumentError(
        absl::StrCat(file_, ": header: invalid JSON at byte ", kLengthBytes + position));
    return false;
  }

 private:
  Tensor& current() { return tensors_.back(); }
  bool in_shape() const { return member_ == "shape"; }

  bool TensorKey(const std::string& name) {
    subject_ = "header";
    member_.clear();
    in_metadata_ = name == kMetadataKey;
    if (name.empty() || static_cast<int>(name.size()) > limits::kTensorNameBytesMax) {
      return Fail(absl::StrCat("a tensor's name has ", name.size(), " bytes, must be 1 to ",
                               limits::kTensorNameBytesMax));
    }
    if (!IsPrintable(name)) {
      return Fail(absl::StrCat("the name of tensor ", tensors_.size(), " is not printable ASCII"));
    }
    if (!names_.insert(name).second) return Fail(absl::StrCat("key '", name, "' appears twice"));
    if (in_metadata_) return true;
    if (static_cast<int>(tensors_.size()) == limits::kTensorsMax) {
      return Fail(absl::StrCat("more than ", limits::kTensorsMax, " tensors"));
    }
    subject_ = absl::StrCat("tensor '", name, "'");
    tensors_.emplace_back();
    current().entry.name = name;
    return true;
  }

  bool MemberKey(const std::string& key) {
    if (in_metadata_) {
      if (static_cast<int>(metadata_keys_.size()) == limits::kTensorsMax) {
        return Fail(absl::StrCat(kMetadataKey, " has more than ", limits::kTensorsMax, " keys"));
      }
      if (metadata_keys_.insert(key).second) return true;
      return Fail(absl::StrCat(kMetadataKey, " has key '", Shown(key), "' twice"));
    }
    member_ = key;
    const bool is_repeated = (key == "dtype" && current().has_dtype) ||
                             (key == "shape" && current().has_shape) ||
                             (key == "data_offsets" && current().has_offsets);
    if (is_repeated) return Fail(absl::StrCat("member '", key, "' appears twice"));
    if (key == "dtype" || key == "shape" || key == "data_offsets") return true;
    return Fail(absl::StrCat("unknown member '", Shown(key), "'"));
  }

  bool CheckComplete() {
    const Tensor& t = current();
    if (!t.has_dtype) return Fail("member 'dtype' is missing");
    if (!t.has_shape) return Fail("member 'shape' is missing");
    if (!t.has_offsets) return Fail("member 'data_offsets' is missing");
    return true;
  }

  static std::string Shown(const std::string& text) {
    if (!IsPrintable(text)) return "?";
    return text.size() <= 64 ? text : text.substr(0, 64) + "…";
  }
  bool Fail(const std::string& message) {
    status_ = absl::InvalidArgumentError(absl::StrCat(file_, ": ", subject_, ": ", message));
    return false;
  }
  bool Unexpected(const char* what) {
    return Fail(absl::StrCat("unexpected ", what,
                             member_.empty() ? "" : absl::StrCat(" in '", Shown(member_), "'")));
  }

  const std::string file_;
  std::vector<Tensor> tensors_;
  std::unordered_set<std::string> names_;
  std::unordered_set<std::string> metadata_keys_;
  std::string subject_ = "header";  // what a message is about
  std::string member_;              // the last key inside a tensor
  int depth_ = 0;
  bool in_metadata_ = false;
  absl::Status status_;
};

absl::StatusOr<int64_t> ReadHeaderLength(const RandomAccessFile& file) {
  if (file.size() < kLengthBytes) {
    return absl::DataLossError(absl::StrCat(file.name(), ": truncated: ", file.size(),
                                            " bytes, a header length alone takes ", kLengthBytes));
  }
  uint64_t length = 0;
  WALSH_RETURN_IF_ERROR(file.ReadAt(0, std::as_writable_bytes(std::span(&length, 1))));
  if (length > static_cast<uint64_t>(limits::kSafetensorsHeaderBytesMax)) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": header of ", length,
                                                   " bytes, at most ",
                                                   limits::kSafetensorsHeaderBytesMax));
  }
  const auto signed_length = static_cast<int64_t>(length);
  if (signed_length > file.size() - kLengthBytes) {
    return absl::DataLossError(absl::StrCat(file.name(), ": truncated: header of ", length,
                                            " bytes in a file of ", file.size()));
  }
  return signed_length;
}

absl::StatusOr<std::string> ReadHeader(const RandomAccessFile& file) {
  WALSH_ASSIGN_OR_RETURN(const int64_t length, ReadHeaderLength(file));
  std::string header(static_cast<size_t>(length), '\0');
  WALSH_RETURN_IF_ERROR(file.ReadAt(kLengthBytes, std::as_writable_bytes(std::span(header))));
  if (header.empty() || header.front() != '{') {
    return absl::InvalidArgumentError(
        absl::StrCat(file.name(), ": header does not start with '{'"));
  }
  if (!IsValidUtf8(header)) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": header is not UTF-8"));
  }
  return header;
}

// Product of the shape times the dtype's size, in 64 bits. A dimension of 0 excuses no overflow of
// the others: who multiplies them in another order meets it.
absl::StatusOr<int64_t> CheckedBytes(const std::string& file, const SafetensorsEntry& entry) {
  int64_t bytes = SafetensorsDtypeBytes(entry.dtype);
  bool is_empty = false;
  for (const int64_t dim : entry.shape) {
    if (dim == 0) {
      is_empty = true;
    } else if (__builtin_mul_overflow(bytes, dim, &bytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat(file, ": tensor '", entry.name, "': the shape's size overflows 64 bits"));
    }
  }
  return is_empty ? 0 : bytes;
}

absl::Status PlaceTensor(const std::string& file, int64_t data_begin, int64_t expected_begin,
                         HeaderBuilder::Tensor& tensor) {
  SafetensorsEntry& entry = tensor.entry;
  const int64_t begin = tensor.offsets[0];
  const int64_t end = tensor.offsets[1];
  const std::string where = absl::StrCat(file, ": tensor '", entry.name, "': ");
  if (end < begin) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, "ends at ", end, " before it begins at ", begin));
  }
  WALSH_ASSIGN_OR_RETURN(entry.size_bytes, CheckedBytes(file, entry));
  if (end - begin != entry.size_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(where, "data_offsets span ", end - begin,
                                                   " bytes, its shape and dtype take ",
                                                   entry.size_bytes));
  }
  if (begin != expected_begin) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, begin < expected_begin ? "overlaps" : "leaves a gap after",
                     " the tensor before it: begins at ", begin, ", expected ", expected_begin));
  }
  entry.offset = data_begin + begin;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<SafetensorsEntry>> PlaceTensors(
    const RandomAccessFile& file, int64_t data_begin, std::vector<HeaderBuilder::Tensor> tensors) {
  std::sort(tensors.begin(), tensors.end(),
            [](const auto& a, const auto& b) { return a.offsets < b.offsets; });
  std::vector<SafetensorsEntry> entries;
  entries.reserve(tensors.size());
  const int64_t data_bytes = file.size() - data_begin;
  int64_t end = 0;
  for (HeaderBuilder::Tensor& tensor : tensors) {
    WALSH_RETURN_IF_ERROR(PlaceTensor(file.name(), data_begin, end, tensor));
    end = tensor.offsets[1];
    if (end > data_bytes) {
      return absl::DataLossError(absl::StrCat(file.name(), ": truncated: tensor '",
                                              tensor.entry.name, "' ends at byte ", end,
                                              " of the data, the file has ", data_bytes));
    }
    entries.push_back(std::move(tensor.entry));
  }
  if (end != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": ", data_bytes - end,
                                                   " bytes after the last tensor belong to none"));
  }
  return entries;
}

}  // namespace

int64_t SafetensorsDtypeBytes(std::string_view dtype) {
  const auto it = std::find_if(kDtypes.begin(), kDtypes.end(),
                               [&](const Dtype& known) { return known.name == dtype; });
  return it == kDtypes.end() ? 0 : it->bytes;
}

absl::StatusOr<std::vector<SafetensorsEntry>> ParseSafetensors(const RandomAccessFile& file) {
  WALSH_ASSIGN_OR_RETURN(const std::string header, ReadHeader(file));
  HeaderBuilder builder(file.name());
  try {
    if (!json::sax_parse(header.begin(), header.end(), &builder)) return builder.status();
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": header: ", e.what()));
  }
  return PlaceTensors(file, kLengthBytes + static_cast<int64_t>(header.size()),
                      std::move(builder.tensors()));
}

}  // namespace walsh
