#include "worker/io/artifact_manifest.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "common/version.h"
#include "worker/io/bounded_json.h"
#include "worker/io/random_access_file.h"

namespace walsh {
namespace {

using nlohmann::json;

constexpr char kDigest[] = "digest";
constexpr char kFiles[] = "files";
constexpr char kVersion[] = "format_version";
constexpr size_t kHexDigits = 64;

absl::Status Malformed(const std::string& message) {
  return absl::InvalidArgumentError(absl::StrCat(kManifestFile, ": ", message));
}

bool IsHexDigest(const json& value) {
  if (!value.is_string()) return false;
  const auto& text = value.get_ref<const std::string&>();
  return text.size() == kHexDigits && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

// A file of the artifact's own directory.
bool IsPlainName(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name.front() != '.' &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return c > 0x20 && c < 0x7f && c != '/' && c != '\\'; });
}

std::string Canonical(const json& document) { return document.dump(2) + "\n"; }

absl::StatusOr<ManifestFile> ParseFile(const std::string& name, const json& entry) {
  const std::string where = absl::StrCat("member '", kFiles, "', file '", name, "'");
  if (!entry.is_object() || !entry.contains("size_bytes") || !entry.contains("sha256") ||
      !entry["size_bytes"].is_number_unsigned() || !entry["sha256"].is_array()) {
    return Malformed(absl::StrCat(where, " has no size_bytes and list sha256"));
  }
  ManifestFile file;
  const auto size = entry["size_bytes"].get<uint64_t>();
  if (size > static_cast<uint64_t>(limits::kArtifactFileBytesMax)) {
    return Malformed(
        absl::StrCat(where, ": ", size, " bytes, at most ", limits::kArtifactFileBytesMax));
  }
  file.size_bytes = static_cast<int64_t>(size);
  const auto n_chunks = (file.size_bytes + kHashChunkBytes - 1) / kHashChunkBytes;
  if (static_cast<int64_t>(entry["sha256"].size()) != n_chunks) {
    return Malformed(absl::StrCat(where, " has ", entry["sha256"].size(), " digests, ",
                                  file.size_bytes, " bytes make ", n_chunks));
  }
  for (const json& digest : entry["sha256"]) {
    if (!IsHexDigest(digest)) return Malformed(absl::StrCat(where, " has a malformed digest"));
    file.sha256.push_back(digest.get<std::string>());
  }
  return file;
}

absl::StatusOr<std::map<std::string, ManifestFile>> ParseFiles(const json& report) {
  const auto files = report.find(kFiles);
  if (files == report.end() || !files->is_object()) {
    return Malformed(absl::StrCat("member '", kFiles, "' is missing"));
  }
  std::map<std::string, ManifestFile> out;
  for (const auto& [name, entry] : files->items()) {
    if (!IsPlainName(name) || name == kManifestFile) {
      return Malformed(absl::StrCat("member '", kFiles, "' holds no plain file name: '",
                                    name.substr(0, 255), "'"));
    }
    WALSH_ASSIGN_OR_RETURN(out[name], ParseFile(name, entry));
  }
  return out;
}

absl::Status CheckDigest(const json& report) {
  const auto digest = report.find(kDigest);
  if (digest == report.end() || !IsHexDigest(*digest)) {
    return Malformed(absl::StrCat("member '", kDigest, "' is missing or malformed"));
  }
  json body = report;
  body.erase(kDigest);
  if (Sha256Hex(Canonical(body)) == digest->get<std::string>()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(kManifestFile, ": its contents differ from its own digest"));
}

// A member of a member, of the right type, or the fallback: information, not structure.
template <typename T>
T Get(const json& report, const char* object, const char* member, T fallback) {
  const auto it = report.find(object);
  if (it == report.end() || !it->is_object()) return fallback;
  const auto value = it->find(member);
  if (value == it->end()) return fallback;
  if constexpr (std::is_same_v<T, std::string>) {
    return value->is_string() ? value->get<std::string>() : fallback;
  } else if constexpr (std::is_same_v<T, bool>) {
    return value->is_boolean() ? value->get<bool>() : fallback;
  } else if constexpr (std::is_integral_v<T>) {
    static_assert(std::is_same_v<T, int64_t>, "a narrower one would wrap");
    return Int64Of(*value).value_or(fallback);
  } else {
    return value->is_number() ? value->get<T>() : fallback;
  }
}

// Null where there is no such object.
const json* Object(const json& report, const char* name) {
  const auto it = report.find(name);
  return it == report.end() || !it->is_object() ? nullptr : &*it;
}

std::string GridName(const json& report) {
  if (Get(report, "quantization", "grid", std::string()) == "codebook") return "codebook";
  const bool has_float_zeros = Get(report, "quantization", "zero_point", std::string()) == "float";
  return has_float_zeros ? "float-zero" : "uniform";
}

// Bits of overrides that are not the model's.
std::vector<int> OverrideBits(const json& report, int model_bits) {
  std::set<int> bits;
  const json* quantization = Object(report, "quantization");
  if (quantization == nullptr || !quantization->contains("overrides")) return {};
  for (const json& entry : (*quantization)["overrides"]) {
    if (!entry.is_object() || !entry.contains("bits")) continue;
    const int64_t n = Int64Of(entry["bits"]).value_or(0);
    if ((n == 2 || n == 3 || n == 4 || n == 8) && n != model_bits) bits.insert(static_cast<int>(n));
  }
  return {bits.begin(), bits.end()};
}

// Of what is rounded at run time, "activations" or "kv_cache"; 0 where it is not.
int RunTimeBits(const json& report, const char* member) {
  const json* online = Object(report, "online_transforms");
  const int64_t bits = online == nullptr ? 0 : Get(*online, member, "bits", int64_t{0});
  return bits == 2 || bits == 4 || bits == 8 ? static_cast<int>(bits) : 0;
}

absl::StatusOr<ArtifactInfo> ParseInfo(const json& report) {
  ArtifactInfo info;
  const int64_t bits = Get(report, "quantization", "bits", int64_t{0});
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return Malformed("member 'quantization.bits' must be 2, 3, 4 or 8");
  }
  info.bits = static_cast<int>(bits);
  info.group_size = Get(report, "quantization", "group_size", int64_t{0});
  if (info.group_size < -1 || info.group_size == 0 || info.group_size > limits::kIntermediateMax) {
    return Malformed(absl::StrCat("member 'quantization.group_size' must be 1 to ",
                                  limits::kIntermediateMax, ", or -1 for channels"));
  }
  info.symmetric = Get(report, "quantization", "symmetric", false);
  info.bits_per_weight = Get(report, "quantization", "bits_per_weight", 0.0);
  info.override_bits = OverrideBits(report, info.bits);
  info.grid = GridName(report);
  info.activation_bits = RunTimeBits(report, "activations");
  info.kv_cache_bits = RunTimeBits(report, "kv_cache");
  info.method = Get(report, "quantization", "method", std::string());
  info.rotation = Get(report, "rotation", "kind", std::string("none"));
  info.rotation_block = Get(report, "rotation", "block", int64_t{0});
  if (info.rotation_block < 0 || info.rotation_block > limits::kHiddenMax) {
    return Malformed(absl::StrCat("member 'rotation.block' must be 0 to ", limits::kHiddenMax));
  }
  info.perplexity_before = Get(report, "quality", "perplexity_before", 0.0);
  info.perplexity_after = Get(report, "quality", "perplexity_after", 0.0);
  return info;
}

}  // namespace

absl::StatusOr<std::map<std::string, ManifestFile>> DigestFiles(
    const std::string& directory, const std::vector<std::string>& names, int n_threads,
    const KeepGoing& keep_going) {
  std::map<std::string, ManifestFile> out;
  for (const std::string& name : names) {
    const std::string path = absl::StrCat(directory, "/", name);
    WALSH_ASSIGN_OR_RETURN(const auto file, OpenRandomAccessFile(path));
    WALSH_ASSIGN_OR_RETURN(std::vector<std::string> chunks,
                           Sha256FileChunks(path, n_threads, keep_going));
    WALSH_RETURN_IF_ERROR(file->CheckUnchanged());
    out[name] = {.size_bytes = file->size(), .sha256 = std::move(chunks)};
  }
  return out;
}

absl::StatusOr<std::string> ManifestText(json report,
                                         const std::map<std::string, ManifestFile>& files) {
  if (!report.is_object()) return absl::InvalidArgumentError("the report is not an object");
  json entries = json::object();
  for (const auto& [name, file] : files) {
    entries[name] = {{"size_bytes", file.size_bytes}, {"sha256", file.sha256}};
  }
  report[kFiles] = std::move(entries);
  report[kVersion] = kManifestVersion;
  report.erase(kDigest);
  try {
    const std::string digest = Sha256Hex(Canonical(report));
    report[kDigest] = digest;
    return Canonical(report);
  } catch (const json::exception& e) {
    // Text that is not UTF-8 cannot be written.
    return absl::InvalidArgumentError(absl::StrCat("the report cannot be written: ", e.what()));
  }
}

absl::StatusOr<Manifest> ParseManifest(std::string_view text) {
  Manifest out;
  WALSH_ASSIGN_OR_RETURN(out.report, ParseBoundedJson(kManifestFile, text,
                                                      {.bytes_max = limits::kJsonFileBytesMax,
                                                       .depth_max = limits::kJsonDepthMax}));
  const auto version = out.report.find(kVersion);
  if (version == out.report.end() || !version->is_number_integer()) {
    return Malformed(absl::StrCat("member '", kVersion, "' is missing"));
  }
  if (*version != kManifestVersion) {
    return absl::UnimplementedError(absl::StrCat(kManifestFile, ": format version ",
                                                 version->dump(), ", this walsh reads ",
                                                 kManifestVersion));
  }
  WALSH_RETURN_IF_ERROR(CheckDigest(out.report));
  // One document has one spelling: a changed byte that left the meaning alone shows here.
  if (Canonical(out.report) != text) {
    return absl::DataLossError(absl::StrCat(kManifestFile, ": not in canonical form"));
  }
  WALSH_ASSIGN_OR_RETURN(out.files, ParseFiles(out.report));
  WALSH_ASSIGN_OR_RETURN(out.info, ParseInfo(out.report));
  return out;
}

absl::StatusOr<Manifest> ReadManifest(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/", kManifestFile);
  const absl::StatusOr<std::string> text = ReadSmallFile(path, limits::kJsonFileBytesMax);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(
        absl::StrCat("'", BaseName(directory), "' is no artifact: it has no ", kManifestFile));
  }
  WALSH_RETURN_IF_ERROR(text.status());
  WALSH_ASSIGN_OR_RETURN(Manifest out, ParseManifest(*text));
  out.info.sha256 = Sha256Hex(*text);
  out.info.size_bytes = static_cast<int64_t>(text->size());
  for (const auto& [name, file] : out.files) out.info.size_bytes += file.size_bytes;
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) return ErrnoStatus(errno, "examining walsh.json");
  out.info.create_time_unix = info.st_mtim.tv_sec;
  return out;
}

}  // namespace walsh
