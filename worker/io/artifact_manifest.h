// walsh.json: what an artifact says about itself, and the digests that prove its files.
//
// The text is canonical (members sorted, two spaces of indentation, one newline at the end) and
// carries its own digest, so that no byte of an artifact can change unnoticed.
//
// Errors:  DATA_LOSS         a digest, or a file that differs from its digest or size (named)
//          INVALID_ARGUMENT  a member is missing or malformed (named)
//          UNIMPLEMENTED     a later format version
//          NOT_FOUND         no walsh.json
// Threads: safe.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/io/artifact.h"

namespace walsh {

inline constexpr char kManifestFile[] = "walsh.json";
inline constexpr int kManifestVersion = 1;

struct ManifestFile {
  int64_t size_bytes = 0;
  std::vector<std::string> sha256;  // of each 64 MiB chunk
};

struct Manifest {
  nlohmann::json report;
  std::map<std::string, ManifestFile> files;  // all but walsh.json itself
  ArtifactInfo info;
};

// The digests of the named files of a directory. Asks `keep_going` every 64 MiB.
absl::StatusOr<std::map<std::string, ManifestFile>> DigestFiles(
    const std::string& directory, const std::vector<std::string>& names, int n_threads,
    const KeepGoing& keep_going);

// walsh.json's text: `report` with its members "files", "format_version" and "digest" set.
absl::StatusOr<std::string> ManifestText(nlohmann::json report,
                                         const std::map<std::string, ManifestFile>& files);
// Everything but `info`'s size, digest and time, which are the directory's.
absl::StatusOr<Manifest> ParseManifest(std::string_view text);

absl::StatusOr<Manifest> ReadManifest(const std::string& directory);

}  // namespace walsh
