#include "worker/service/model_conversions.h"

#include <algorithm>
#include <filesystem>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/publish.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/interop/export.h"
#include "worker/interop/import.h"
#include "worker/io/artifact.h"
#include "worker/service/disk_check.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using interop::ExportFormat;
using v1::ExportModelRequest;

// Of what is not finished yet; workers may share a folder of exports.
std::string BuildPrefix(const std::string& worker_id) {
  return absl::StrCat(".tmp-", worker_id, "@");
}

absl::Status Busy() {
  absl::Status status = absl::ResourceExhaustedError(
      "another export or import is running on this worker; one runs at a time");
  SetErrorInfo(status, "CONVERSION_RUNNING");
  SetRetryDelay(status, absl::Seconds(5));
  return status;
}

absl::StatusOr<ExportFormat> ToFormat(ExportModelRequest::Format format) {
  switch (format) {
    case ExportModelRequest::DEQUANTIZED:
      return ExportFormat::kDequantized;
    case ExportModelRequest::GPTQ_V2:
      return ExportFormat::kGptqV2;
    case ExportModelRequest::GPTQ:
      return ExportFormat::kGptq;
    case ExportModelRequest::COMPRESSED_TENSORS:
      return ExportFormat::kCompressedTensors;
    case ExportModelRequest::GGUF:
      return ExportFormat::kGguf;
    default:
      break;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("format: ", static_cast<int>(format),
                   ", must be DEQUANTIZED, GPTQ_V2, GPTQ, COMPRESSED_TENSORS or GGUF"));
}

absl::StatusOr<StorageType> ToDtype(ExportModelRequest::DataType type) {
  switch (type) {
    case ExportModelRequest::DATA_TYPE_UNSPECIFIED:
    case ExportModelRequest::BFLOAT16:
      return StorageType::kBf16;
    case ExportModelRequest::FLOAT16:
      return StorageType::kF16;
    case ExportModelRequest::FLOAT32:
      return StorageType::kF32;
    default:
      return absl::InvalidArgumentError(absl::StrCat("data_type: ", static_cast<int>(type),
                                                     ", must be BFLOAT16, FLOAT16 or FLOAT32"));
  }
}

bool IsBeneath(const fs::path& root, const fs::path& path) {
  const auto [end, unused] = std::mismatch(root.begin(), root.end(), path.begin(), path.end());
  return end == root.end() && path != root;
}

// Removed when it goes, unless it was published.
class BuildDirectory {
 public:
  explicit BuildDirectory(std::string path) : path_(std::move(path)) {}
  ~BuildDirectory() {
    if (const absl::Status status = RemoveTree(path_); !status.ok()) {
      WALSH_LOG(Warning, "a temporary folder stays", {"error", status});
    }
  }
  BuildDirectory(const BuildDirectory&) = delete;
  BuildDirectory& operator=(const BuildDirectory&) = delete;
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

absl::Status OutsideRoot(const std::string& output) {
  return absl::InvalidArgumentError(
      absl::StrCat("output: '", output,
                   "' does not lie beneath this worker's folder of exports (--export-root)"));
}

absl::Status CheckSpelling(const std::string& output) {
  if (output.size() > static_cast<size_t>(limits::kPathBytesMax)) {
    return absl::InvalidArgumentError(
        absl::StrCat("output: ", output.size(), " bytes, at most ", limits::kPathBytesMax));
  }
  const bool has_control = std::any_of(output.begin(), output.end(), [](char c) {
    return absl::ascii_iscntrl(static_cast<unsigned char>(c));
  });
  if (has_control || !IsValidUtf8(output)) {
    return absl::InvalidArgumentError("output: has control characters or is not UTF-8");
  }
  for (const fs::path& part : fs::path(output)) {
    if (part.native().size() <= limits::kFileNameBytesMax) continue;
    return absl::InvalidArgumentError(absl::StrCat("output: a part has ", part.native().size(),
                                                   " bytes, at most ", limits::kFileNameBytesMax));
  }
  return absl::OkStatus();
}

// That `path` can be made: beneath folders, and not inside of another export.
absl::Status CheckParents(const fs::path& root, const fs::path& path) {
  for (fs::path parent = path.parent_path(); parent != root; parent = parent.parent_path()) {
    std::error_code error;
    const fs::file_status status = fs::status(parent, error);
    if (!fs::exists(status)) continue;
    const std::string name = parent.lexically_relative(root).string();
    if (!fs::is_directory(status)) {
      return absl::InvalidArgumentError(absl::StrCat("output: '", name, "' is no folder"));
    }
    if (fs::exists(parent / interop::kExportManifestFile, error)) {
      return absl::InvalidArgumentError(absl::StrCat("output: '", name, "' is an export itself"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelConversions>> ModelConversions::Open(Options options,
                                                                         ModelStore* models) {
  WALSH_RETURN_IF_ERROR(MakeDirectories(options.export_root));
  std::error_code error;
  options.export_root = fs::canonical(options.export_root, error).string();
  if (error) return ErrnoStatus(error.value(), "find the folder of exports");
  for (const auto& entry : fs::directory_iterator(options.export_root, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(BuildPrefix(options.worker_id))) continue;
    if (const absl::Status status = RemoveTree(entry.path().string()); !status.ok()) {
      WALSH_LOG(Warning, "a temporary folder stays", {"name", name}, {"error", status});
    }
  }
  if (error) return ErrnoStatus(error.value(), "list the exports");
  return std::unique_ptr<ModelConversions>(new ModelConversions(std::move(options), models));
}

absl::StatusOr<std::string> ModelConversions::OutputDirectory(const std::string& output) const {
  WALSH_RETURN_IF_ERROR(CheckSpelling(output));
  const fs::path root(options_.export_root);
  fs::path path = (root / output).lexically_normal();  // an absolute `output` stands for itself
  if (!path.has_filename()) path = path.parent_path();
  if (!IsBeneath(root, path)) return OutsideRoot(output);
  for (const fs::path& part : path.lexically_relative(root)) {
    if (!part.string().starts_with('.')) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("output: '", output, "' has a part that begins with a dot"));
  }
  // Folders that are there may be links that lead away.
  std::error_code error;
  const fs::path parent = fs::weakly_canonical(path.parent_path(), error);
  if (error || (parent != root && !IsBeneath(root, parent))) return OutsideRoot(output);
  WALSH_RETURN_IF_ERROR(CheckParents(root, path));
  if (!fs::exists(fs::symlink_status(path, error))) return path.string();
  absl::Status status = absl::AlreadyExistsError(
      absl::StrCat("the folder of exports has '", path.lexically_relative(root).string(),
                   "' already; remove it, or name another output"));
  SetErrorInfo(status, "EXPORT_EXISTS");
  return status;
}

absl::StatusOr<v1::ModelExport> ModelConversions::Export(const ExportModelRequest& request,
                                                         const ConversionProgress& progress) {
  const std::unique_lock running(running_, std::try_to_lock);
  if (!running.owns_lock()) return Busy();
  WALSH_ASSIGN_OR_RETURN(const std::string id, ParseModelName("name", request.name()));
  interop::ExportOptions options{.model_name = id};
  WALSH_ASSIGN_OR_RETURN(options.format, ToFormat(request.format()));
  WALSH_ASSIGN_OR_RETURN(options.dtype, ToDtype(request.data_type()));
  WALSH_ASSIGN_OR_RETURN(const std::string source, models_->ArtifactDirectory(id));
  const std::string output =
      request.output().empty()
          ? absl::StrCat(id, "-", std::string(interop::FormatName(options.format)))
          : request.output();
  WALSH_ASSIGN_OR_RETURN(const std::string directory, OutputDirectory(output));
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactReader> artifact,
                         ArtifactReader::Open(source, /*verify=*/true, options_.n_threads,
                                              [&progress] { return progress(0, 0); }));
  WALSH_RETURN_IF_ERROR(interop::CheckExportable(*artifact, options));
  WALSH_ASSIGN_OR_RETURN(const int64_t free_bytes, FreeBytes(options_.export_root));
  WALSH_RETURN_IF_ERROR(CheckDisk("the export",
                                  interop::ExportBytesMax(artifact->config(), options), free_bytes,
                                  options_.export_root));
  const BuildDirectory build(
      absl::StrCat(options_.export_root, "/", BuildPrefix(options_.worker_id), id));
  WALSH_RETURN_IF_ERROR(RemoveTree(build.path()));  // nothing of another run may be published
  WALSH_RETURN_IF_ERROR(MakeDirectories(build.path()));
  WALSH_ASSIGN_OR_RETURN(const interop::ExportReport report,
                         interop::ExportArtifact(*artifact, options, build.path(), progress));
  WALSH_RETURN_IF_ERROR(MakeDirectories(fs::path(directory).parent_path().string()));
  WALSH_RETURN_IF_ERROR(PublishDirectory(build.path(), directory));
  WALSH_LOG(Info, "model exported", {"model", id}, {"format", interop::FormatName(options.format)},
            {"size_bytes", report.size_bytes});
  v1::ModelExport result;
  result.set_directory(directory);
  for (const std::string& file : report.files) result.add_files(file);
  result.set_size_bytes(report.size_bytes);
  for (const std::string& warning : report.warnings) result.add_warnings(warning);
  result.set_worker(WorkerName(options_.worker_id));
  return result;
}

absl::StatusOr<v1::Model> ModelConversions::Import(const v1::ImportModelRequest& request,
                                                   const ConversionProgress& progress) {
  const std::unique_lock running(running_, std::try_to_lock);
  if (!running.owns_lock()) return Busy();
  WALSH_ASSIGN_OR_RETURN(const std::string id, ParseModelName("model_name", request.model_name()));
  WALSH_RETURN_IF_ERROR(models_->CheckNameIsFree(id));
  References references(options_.sources, options_.resolve, FetchExtent::kWhole,
                        [&progress](int64_t, int64_t) { return progress(0, 0); });
  WALSH_ASSIGN_OR_RETURN(const std::string source, references.ResolveModel(request.source_model()));
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<interop::GptqCheckpoint> checkpoint,
                         interop::GptqCheckpoint::Open(source));
  const BuildDirectory build(models_->TemporaryDirectory(absl::StrCat("import-", id), 0));
  WALSH_ASSIGN_OR_RETURN(const int64_t free_bytes,
                         FreeBytes(fs::path(build.path()).parent_path().string()));
  WALSH_RETURN_IF_ERROR(
      CheckDisk("the import", checkpoint->size_bytes(), free_bytes, build.path()));
  WALSH_RETURN_IF_ERROR(
      interop::ImportGptq(*checkpoint, build.path(), options_.n_threads, progress));
  WALSH_ASSIGN_OR_RETURN(v1::Model model, models_->Publish(build.path(), id, ""));
  WALSH_RETURN_IF_ERROR(models_->Keep(id, {}, {}));
  WALSH_LOG(Info, "model imported", {"model", id}, {"size_bytes", model.size_bytes()});
  return model;
}

}  // namespace walsh::service
