#include "worker/pipeline/stored_generation.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"

namespace walsh::pipeline {
namespace {

using nlohmann::json;

constexpr size_t kDigestChars = 64;

absl::StatusOr<int64_t> Integer(const json& value) {
  const std::optional<int64_t> integer = Int64Of(value);
  if (integer.has_value()) return *integer;
  return absl::DataLossError(absl::StrCat("a generation of the checkpoint: ", value.type_name(),
                                          " that is no integer of 64 bits"));
}

}  // namespace

std::string ToText(const StoredGeneration& stored) {
  json objects = json::array();
  for (const CheckpointStore::Object& object : stored.generation.objects) {
    objects.push_back({object.sha256, object.size_bytes});
  }
  const json document = {{"fencing_token", stored.fencing_token},
                         {"manifest", stored.generation.manifest},
                         {"objects", std::move(objects)}};
  const std::string body = document.dump();
  return absl::StrCat(Sha256Hex(body), "\n", body);
}

absl::StatusOr<StoredGeneration> FromText(std::string_view text) {
  if (text.size() <= kDigestChars || text[kDigestChars] != '\n' ||
      Sha256Hex(text.substr(kDigestChars + 1)) != text.substr(0, kDigestChars)) {
    return absl::DataLossError("a generation of the checkpoint differs from its digest");
  }
  try {
    const json document = json::parse(text.substr(kDigestChars + 1));
    StoredGeneration stored;
    WALSH_ASSIGN_OR_RETURN(stored.fencing_token, Integer(document.at("fencing_token")));
    stored.generation.manifest = document.at("manifest").get<std::string>();
    for (const json& object : document.at("objects")) {
      WALSH_ASSIGN_OR_RETURN(const int64_t size_bytes, Integer(object.at(1)));
      stored.generation.objects.push_back({object.at(0).get<std::string>(), size_bytes});
    }
    return stored;
  } catch (const json::exception& e) {
    return absl::DataLossError(absl::StrCat("a generation of the checkpoint: ", e.what()));
  }
}

absl::Status CheckToken(int64_t stored_token, int64_t fencing_token) {
  if (stored_token <= fencing_token) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("the checkpoint belongs to the holder of token ",
                                         stored_token, ", this one has ", fencing_token));
}

absl::Status DamagedObject(const CheckpointStore::Object& object) {
  return absl::DataLossError(
      absl::StrCat("object ", object.sha256, " of the checkpoint is damaged or missing"));
}

}  // namespace walsh::pipeline
