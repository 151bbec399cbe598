#include "worker/io/file_checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/io/expected_tensors.h"

namespace walsh {
namespace {

class FileCheckpoint final : public Checkpoint {
 public:
  explicit FileCheckpoint(CheckpointContents contents) : contents_(std::move(contents)) {}

  const ModelConfig& config() const override { return contents_.config; }
  const TokenizerSource& tokenizer() const override { return contents_.tokenizer; }
  std::string license() const override { return contents_.license; }
  const std::map<std::string, std::string>& side_files() const override {
    return contents_.side_files;
  }
  bool Has(std::string_view tensor) const override { return contents_.tensors.contains(tensor); }

  absl::StatusOr<Matrix> Read(std::string_view tensor) const override {
    WALSH_ASSIGN_OR_RETURN(const auto* located, Find(tensor));
    return ReadStoredRows(*contents_.files[located->file_index], located->tensor, 0,
                          located->tensor.rows);
  }
  absl::StatusOr<Matrix> ReadRows(std::string_view tensor, int64_t first,
                                  int64_t n) const override {
    WALSH_ASSIGN_OR_RETURN(const auto* located, Find(tensor));
    return ReadStoredRows(*contents_.files[located->file_index], located->tensor, first, n);
  }

  absl::StatusOr<StoredForm> FormOf(std::string_view tensor) const override {
    WALSH_ASSIGN_OR_RETURN(const auto* located, Find(tensor));
    const StoredTensor& stored = located->tensor;
    return StoredForm{.type = stored.type,
                      .rows = stored.rows,
                      .cols = stored.cols,
                      .size_bytes = stored.size_bytes()};
  }
  absl::Status ReadStored(std::string_view tensor, int64_t first, int64_t n,
                          std::span<std::byte> bytes) const override {
    WALSH_ASSIGN_OR_RETURN(const auto* located, Find(tensor));
    return ReadStoredBytes(*contents_.files[located->file_index], located->tensor, first, n, bytes);
  }

  int64_t size_bytes() const override {
    int64_t bytes = 0;
    for (const auto& file : contents_.files) bytes += file->size();
    return bytes;
  }

  // The type that most bytes of the weights have.
  std::string format() const override {
    std::map<std::string_view, int64_t> bytes_by_type;
    for (const auto& [name, located] : contents_.tensors) {
      bytes_by_type[Info(located.tensor.type).name] += located.tensor.size_bytes();
    }
    const auto most =
        std::max_element(bytes_by_type.begin(), bytes_by_type.end(),
                         [](const auto& a, const auto& b) { return a.second < b.second; });
    return absl::StrCat(contents_.format_family, " ", std::string(most->first));
  }

  absl::StatusOr<std::string> Fingerprint(int n_threads,
                                          const KeepGoing& keep_going) const override {
    Sha256 digest;
    for (const std::string& path : contents_.fingerprint_paths) {
      WALSH_ASSIGN_OR_RETURN(const std::vector<std::string> chunks,
                             Sha256FileChunks(path, n_threads, keep_going));
      digest.Update(BaseName(path));
      for (const std::string& chunk : chunks) digest.Update(absl::StrCat(" ", chunk));
      digest.Update("\n");
    }
    for (const auto& file : contents_.files) WALSH_RETURN_IF_ERROR(file->CheckUnchanged());
    return digest.HexDigest();
  }

 private:
  absl::StatusOr<const CheckpointContents::Located*> Find(std::string_view tensor) const {
    const auto it = contents_.tensors.find(tensor);
    if (it != contents_.tensors.end()) return &it->second;
    return absl::NotFoundError(
        absl::StrCat("the checkpoint has no tensor '", std::string(tensor), "'"));
  }

  const CheckpointContents contents_;
};

// Gives a tied embedding both of its names, whichever one the file has.
void ShareTiedEmbedding(CheckpointContents& contents) {
  if (!contents.config.tied_embeddings) return;
  auto& tensors = contents.tensors;
  const auto embedding = tensors.find(kEmbeddingTensor);
  const auto head = tensors.find(kLmHeadTensor);
  if (embedding != tensors.end()) {
    tensors.insert_or_assign(std::string(kLmHeadTensor), embedding->second);
  } else if (head != tensors.end()) {
    tensors.insert_or_assign(std::string(kEmbeddingTensor), head->second);
  }
}

// Puts the parts of fused linears, which are ranges of rows, in their place.
absl::Status SplitFusedLinears(CheckpointContents& contents) {
  auto& tensors = contents.tensors;
  for (const FusedTensor& fused : FusedTensors(contents.config)) {
    const auto it = tensors.find(fused.name);
    if (it == tensors.end()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor '", fused.name, "' is missing"));
    }
    const CheckpointContents::Located whole = it->second;
    const StoredTensor& stored = whole.tensor;
    const int64_t cols = fused.parts.front().cols;
    if (stored.is_one_dimensional || stored.rows != fused.rows() || stored.cols != cols) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor '", fused.name, "' has shape [", stored.rows, ", ", stored.cols,
                       "], the configuration implies [", fused.rows(), ", ", cols, "]"));
    }
    tensors.erase(it);
    int64_t row = 0;
    for (const ExpectedTensor& part : fused.parts) {
      CheckpointContents::Located piece = whole;
      piece.tensor.offset += row * stored.row_bytes();
      piece.tensor.rows = part.rows;
      row += part.rows;
      if (tensors.try_emplace(part.name, std::move(piece)).second) continue;
      return absl::InvalidArgumentError(absl::StrCat("tensors '", fused.name, "' and '", part.name,
                                                     "' are both there, must be one of them"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> MakeFileCheckpoint(CheckpointContents contents) {
  WALSH_RETURN_IF_ERROR(SplitFusedLinears(contents));
  ShareTiedEmbedding(contents);
  std::map<std::string, TensorShape, std::less<>> shapes;
  for (const auto& [name, located] : contents.tensors) {
    shapes[name] = {.rows = located.tensor.rows,
                    .cols = located.tensor.cols,
                    .is_one_dimensional = located.tensor.is_one_dimensional};
  }
  WALSH_RETURN_IF_ERROR(CheckTensors(contents.config, shapes));
  return std::make_unique<FileCheckpoint>(std::move(contents));
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& path) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) {
      return absl::NotFoundError(absl::StrCat("no such model: '", BaseName(path), "'"));
    }
    return ErrnoStatus(errno, absl::StrCat("opening model '", BaseName(path), "'"));
  }
  if (S_ISDIR(info.st_mode)) return OpenHfCheckpoint(path);
  const std::string suffix = ".gguf";
  if (path.size() >= suffix.size() &&
      path.compare(path.size() - suffix.size(), suffix.size(), suffix) == 0) {
    return OpenGgufCheckpoint(path);
  }
  return absl::UnimplementedError(
      absl::StrCat("'", BaseName(path),
                   "' is neither a directory with config.json nor a .gguf file: walsh reads "
                   "safetensors and GGUF"));
}

std::string LayerTensor(int64_t layer, std::string_view suffix) {
  return absl::StrCat("model.layers.", layer, ".", std::string(suffix));
}

}  // namespace walsh
