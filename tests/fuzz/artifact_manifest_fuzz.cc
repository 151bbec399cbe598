// walsh.json of an artifact: what is accepted can be written again and is then accepted as it is,
// or a refusal.

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "common/sha256.h"
#include "tests/fuzz/json_mutator.h"
#include "tests/fuzz/mutate_bytes.h"
#include "tests/fuzz/refusal.h"
#include "worker/io/artifact_manifest.h"

namespace walsh::fuzz {
namespace {

// Canonical, with the digest that it then has: otherwise nearly every change ends there.
std::optional<std::string> Signed(std::string_view text) {
  nlohmann::json report = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!report.is_object()) return std::nullopt;
  report.erase("digest");
  report["digest"] = Sha256Hex(report.dump(2) + "\n");
  return report.dump(2) + "\n";
}

size_t Mutate(uint8_t* data, size_t size, size_t size_max, uint32_t seed) {
  if (seed % 4 == 0) return LLVMFuzzerMutate(data, size, size_max);
  const auto mutated = MutateJson({reinterpret_cast<const char*>(data), size}, seed / 4);
  const auto manifest = mutated ? Signed(*mutated) : std::nullopt;
  return manifest ? Deliver(*manifest, data, size_max) : LLVMFuzzerMutate(data, size, size_max);
}

void Check(std::string_view text) {
  const absl::StatusOr<Manifest> manifest = ParseManifest(text);
  if (!manifest.ok()) {
    CheckRefusal(manifest.status(),
                 {absl::StatusCode::kInvalidArgument, absl::StatusCode::kDataLoss,
                  absl::StatusCode::kUnimplemented});
    return;
  }
  // Not always the same text: members of a file's entry that nobody reads are left out.
  const absl::StatusOr<std::string> again = ManifestText(manifest->report, manifest->files);
  WALSH_CHECK(again.ok());
  if (*again == text) return;  // what follows has been seen
  const absl::StatusOr<Manifest> reread = ParseManifest(*again);
  WALSH_CHECK_EQ(reread.status(), absl::OkStatus());
  const absl::StatusOr<std::string> same = ManifestText(reread->report, reread->files);
  WALSH_CHECK(same.ok());
  WALSH_CHECK_EQ(*same, *again);
}

}  // namespace
}  // namespace walsh::fuzz

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  return walsh::fuzz::Mutate(data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  walsh::fuzz::Check({reinterpret_cast<const char*>(data), size});
  return 0;
}
