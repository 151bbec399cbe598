#include "worker/io/stored_tensor.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/out_of_memory.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

// Rows are read in pieces of about this size, so that only the result is ever whole in memory.
constexpr int64_t kPieceBytes = 4 << 20;

// Where HF's index `i` of `n` lies in a sequence permuted for interleaved RoPE.
int64_t InterleavedIndex(int64_t i, int64_t n, int64_t n_heads) {
  const int64_t head_dim = n / n_heads;
  const int64_t head = i / head_dim;
  const int64_t in_head = i % head_dim;
  const int64_t half = head_dim / 2;
  return head * head_dim + 2 * (in_head % half) + in_head / half;
}

// The inverse: HF's index of what lies at `i`.
int64_t UninterleavedIndex(int64_t i, int64_t n, int64_t n_heads) {
  const int64_t head_dim = n / n_heads;
  const int64_t head = i / head_dim;
  const int64_t in_head = i % head_dim;
  return head * head_dim + (in_head % 2) * (head_dim / 2) + in_head / 2;
}

absl::Status CheckRows(const StoredTensor& tensor, int64_t first, int64_t n) {
  if (first >= 0 && n >= 0 && first <= tensor.rows && n <= tensor.rows - first) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("tensor '", tensor.name, "': ", n,
                                                 " rows from row ", first, " asked for, it has ",
                                                 tensor.rows));
}

absl::Status CheckFinite(const RandomAccessFile& file, const StoredTensor& tensor,
                         int64_t first_row, const Matrix& values) {
  const std::span<const float> all = values.span();
  const auto bad = std::find_if(all.begin(), all.end(), [](float v) { return !std::isfinite(v); });
  if (bad == all.end()) return absl::OkStatus();
  return NotFiniteError(file, tensor, first_row, bad - all.begin(), *bad);
}

absl::Status ReadPlain(const RandomAccessFile& file, const StoredTensor& tensor, int64_t first,
                       Matrix& out) {
  const int64_t row_bytes = tensor.row_bytes();
  const int64_t piece_rows = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, row_bytes));
  std::vector<std::byte> piece(static_cast<size_t>(std::min(piece_rows, out.rows()) * row_bytes));
  for (int64_t row = 0; row < out.rows(); row += piece_rows) {
    const int64_t n = std::min(piece_rows, out.rows() - row);
    const std::span<std::byte> bytes(piece.data(), static_cast<size_t>(n * row_bytes));
    WALSH_RETURN_IF_ERROR(file.ReadAt(tensor.offset + (first + row) * row_bytes, bytes));
    Dequantize(tensor.type, bytes, {out.row(row), static_cast<size_t>(n * tensor.cols)});
  }
  return absl::OkStatus();
}

// Whole heads at a time would need no more reads, but Q and K are small: one read for each row.
absl::Status ReadInterleavedRows(const RandomAccessFile& file, const StoredTensor& tensor,
                                 int64_t first, Matrix& out) {
  const int64_t row_bytes = tensor.row_bytes();
  std::vector<std::byte> bytes(static_cast<size_t>(row_bytes));
  for (int64_t row = 0; row < out.rows(); ++row) {
    const int64_t stored = InterleavedIndex(first + row, tensor.rows, tensor.n_interleaved_heads);
    WALSH_RETURN_IF_ERROR(file.ReadAt(tensor.offset + stored * row_bytes, bytes));
    Dequantize(tensor.type, bytes, {out.row(row), static_cast<size_t>(tensor.cols)});
  }
  return absl::OkStatus();
}

Matrix UninterleaveElements(const Matrix& stored, int64_t n_heads) {
  Matrix out(1, stored.cols());
  for (int64_t i = 0; i < stored.cols(); ++i) {
    out(0, i) = stored(0, InterleavedIndex(i, stored.cols(), n_heads));
  }
  return out;
}

// One read for each row, to where it belongs. In the order of the file, so that the system reads
// ahead.
absl::Status ReadInterleavedBytes(const RandomAccessFile& file, const StoredTensor& tensor,
                                  int64_t first, int64_t n, std::span<std::byte> bytes) {
  if (n == 0) return absl::OkStatus();
  const auto row_bytes = static_cast<size_t>(tensor.row_bytes());
  const int64_t head_dim = tensor.rows / tensor.n_interleaved_heads;
  // The heads that have rows of these.
  const int64_t begin = first / head_dim * head_dim;
  const int64_t end = ((first + n - 1) / head_dim + 1) * head_dim;
  for (int64_t stored = begin; stored < end; ++stored) {
    const int64_t row = UninterleavedIndex(stored, tensor.rows, tensor.n_interleaved_heads) - first;
    if (row < 0 || row >= n) continue;
    WALSH_RETURN_IF_ERROR(
        file.ReadAt(tensor.offset + stored * tensor.row_bytes(),
                    bytes.subspan(static_cast<size_t>(row) * row_bytes, row_bytes)));
  }
  return absl::OkStatus();
}

absl::Status ReadInterleavedElements(const RandomAccessFile& file, const StoredTensor& tensor,
                                     std::span<std::byte> bytes) {
  const StorageTypeInfo& info = Info(tensor.type);
  if (info.block_elements != 1) {
    return absl::UnimplementedError(
        absl::StrCat(file.name(), ": tensor '", tensor.name, "' is ", std::string(info.name),
                     ": elements in blocks cannot be put in order as they are stored"));
  }
  std::vector<std::byte> stored(bytes.size());
  WALSH_RETURN_IF_ERROR(file.ReadAt(tensor.offset, stored));
  for (int64_t i = 0; i < tensor.cols; ++i) {
    const int64_t from = InterleavedIndex(i, tensor.cols, tensor.n_interleaved_heads);
    std::copy_n(stored.begin() + from * info.block_bytes, info.block_bytes,
                bytes.begin() + i * info.block_bytes);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Matrix> ReadStoredRows(const RandomAccessFile& file, const StoredTensor& tensor,
                                      int64_t first, int64_t n) {
  WALSH_RETURN_IF_ERROR(CheckRows(tensor, first, n));
  Matrix out;
  try {
    out = Matrix(n, tensor.cols);
  } catch (const std::bad_alloc&) {
    return OutOfMemoryError(
        absl::StrCat("tensor '", tensor.name, "': no memory for ", n, " rows of ", tensor.cols));
  }
  const bool is_permuted = tensor.n_interleaved_heads > 0;
  if (is_permuted && !tensor.is_one_dimensional) {
    WALSH_RETURN_IF_ERROR(ReadInterleavedRows(file, tensor, first, out));
  } else {
    WALSH_RETURN_IF_ERROR(ReadPlain(file, tensor, first, out));
  }
  if (is_permuted && tensor.is_one_dimensional) {
    out = UninterleaveElements(out, tensor.n_interleaved_heads);
  }
  if (tensor.added != 0) {
    for (float& value : out.span()) value += tensor.added;
  }
  WALSH_RETURN_IF_ERROR(file.CheckUnchanged());
  WALSH_RETURN_IF_ERROR(CheckFinite(file, tensor, first, out));
  return out;
}

absl::Status ReadStoredBytes(const RandomAccessFile& file, const StoredTensor& tensor,
                             int64_t first, int64_t n, std::span<std::byte> bytes) {
  WALSH_RETURN_IF_ERROR(CheckRows(tensor, first, n));
  if (static_cast<int64_t>(bytes.size()) != n * tensor.row_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", tensor.name, "': a buffer of ",
                                                   bytes.size(), " bytes, rows ", first, " to ",
                                                   first + n, " have ", n * tensor.row_bytes()));
  }
  if (tensor.added != 0) {
    return absl::UnimplementedError(absl::StrCat(file.name(), ": tensor '", tensor.name,
                                                 "' is stored less ", tensor.added,
                                                 ": its values are not those that are stored"));
  }
  if (tensor.n_interleaved_heads == 0) {
    WALSH_RETURN_IF_ERROR(file.ReadAt(tensor.offset + first * tensor.row_bytes(), bytes));
  } else if (tensor.is_one_dimensional) {
    if (n > 0) WALSH_RETURN_IF_ERROR(ReadInterleavedElements(file, tensor, bytes));
  } else {
    WALSH_RETURN_IF_ERROR(ReadInterleavedBytes(file, tensor, first, n, bytes));
  }
  return file.CheckUnchanged();
}

absl::Status NotFiniteError(const RandomAccessFile& file, const StoredTensor& tensor,
                            int64_t first_row, int64_t index, float value) {
  const std::string place =
      tensor.is_one_dimensional
          ? absl::StrCat("[", index, "]")
          : absl::StrCat("[", first_row + index / tensor.cols, ", ", index % tensor.cols, "]");
  return absl::DataLossError(absl::StrCat(file.name(), ": tensor '", tensor.name, "' is ", value,
                                          " at ", place, ", must be finite"));
}

}  // namespace walsh
