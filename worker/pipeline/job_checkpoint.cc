#include "worker/pipeline/job_checkpoint.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace walsh::pipeline {
namespace {

using nlohmann::json;
using Object = CheckpointStore::Object;

// Of a value in a message.
constexpr size_t kShownCharsMax = 80;

json ToJson(const Object& object) { return {object.sha256, object.size_bytes}; }
json ToJson(const std::vector<Object>& objects) {
  json list = json::array();
  for (const Object& object : objects) list.push_back(ToJson(object));
  return list;
}
json ToJson(const RecordedTensors::Entry& entry) { return {entry.name, entry.dtype, entry.shape}; }
json ToJson(const LinearReport& linear) {
  return {{"name", linear.name},        {"layer", linear.layer},
          {"bits", linear.bits},        {"relative_error", linear.relative_error},
          {"damp", linear.damp},        {"dead_columns", linear.dead_columns},
          {"fallback", linear.fallback}};
}

// The next ones throw json::exception.
Object ObjectOf(const json& value) {
  return {value.at(0).get<std::string>(), value.at(1).get<int64_t>()};
}
std::vector<Object> ObjectsOf(const json& value) {
  std::vector<Object> objects;
  for (const json& object : value) objects.push_back(ObjectOf(object));
  return objects;
}
RecordedTensors::Entry EntryOf(const json& value) {
  return {value.at(0).get<std::string>(), value.at(1).get<std::string>(),
          value.at(2).get<std::vector<int64_t>>()};
}
LinearReport LinearOf(const json& value) {
  LinearReport linear;
  value.at("name").get_to(linear.name);
  value.at("layer").get_to(linear.layer);
  value.at("bits").get_to(linear.bits);
  value.at("relative_error").get_to(linear.relative_error);
  value.at("damp").get_to(linear.damp);
  value.at("dead_columns").get_to(linear.dead_columns);
  value.at("fallback").get_to(linear.fallback);
  return linear;
}

std::string Shown(const json& flat, const std::string& field) {
  const auto it = flat.find(field);
  if (it == flat.end()) return "absent";
  std::string text = it->dump();
  if (text.size() > kShownCharsMax) text = text.substr(0, kShownCharsMax) + "…";
  return text;
}

// FAILED_PRECONDITION lists the members, as JSON pointers, in which the two differ.
absl::Status CompareIdentity(const json& kept, const json& asked) {
  const json before = kept.flatten();
  const json now = asked.flatten();
  std::set<std::string> fields;
  for (const auto& [field, value] : before.items()) fields.insert(field);
  for (const auto& [field, value] : now.items()) fields.insert(field);
  std::vector<std::string> differences;
  for (const std::string& field : fields) {
    const auto was = before.find(field), is = now.find(field);
    if (was != before.end() && is != now.end() && *was == *is) continue;
    differences.push_back(
        absl::StrCat(field.substr(1), " was ", Shown(before, field), ", is ", Shown(now, field)));
  }
  if (differences.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("the checkpoint of the job was made from something else: ",
                   absl::StrJoin(differences, "; ")));
}

std::string_view BytesOf(const Matrix& matrix) {
  return {reinterpret_cast<const char*>(matrix.data()),
          static_cast<size_t>(matrix.size()) * sizeof(float)};
}

}  // namespace

JobCheckpoint::JobCheckpoint(CheckpointStore& store, std::string job_name)
    : store_(store), job_name_(std::move(job_name)) {}

absl::Status JobCheckpoint::Open(json identity) {
  absl::StatusOr<CheckpointStore::Found> found = store_.Claim();
  // Who has it locked has it for a moment: better to come back than to do all layers again.
  if (absl::IsUnavailable(found.status())) return found.status();
  if (!found.ok()) return GiveUp(found.status());
  int n_damaged = found->n_damaged;
  for (const CheckpointStore::Generation& generation : found->generations) {
    const absl::Status status = Take(generation, identity);
    if (status.ok()) break;
    Clear();
    if (!absl::IsDataLoss(status)) return status;
    WALSH_LOG(Warning, "a generation of the job's checkpoint is damaged", {"job", job_name_},
              {"error", status});
    ++n_damaged;
  }
  identity_ = std::move(identity);
  if (n_layers() > 0) notice_ = absl::StrCat("layers done by an earlier run: ", n_layers());
  if (n_damaged > 0) {
    notice_ =
        absl::StrCat(n_layers() > 0 ? notice_ : "starts over", "; its checkpoint was damaged");
  }
  if (!notice_.empty()) {
    WALSH_LOG(Warning, "the job was begun before", {"job", job_name_}, {"notice", notice_});
  }
  return absl::OkStatus();
}

absl::Status JobCheckpoint::Take(const CheckpointStore::Generation& generation,
                                 const json& identity) {
  WALSH_RETURN_IF_ERROR(Parse(generation.manifest));
  WALSH_RETURN_IF_ERROR(CompareIdentity(identity_, identity));
  for (const Object& object : generation.objects) {
    WALSH_RETURN_IF_ERROR(store_.Check(object));
  }
  // What is read later is what was checked, sizes included.
  for (const Object& object : Objects()) {
    const bool is_checked = std::any_of(
        generation.objects.begin(), generation.objects.end(), [&](const Object& checked) {
          return checked.sha256 == object.sha256 && checked.size_bytes == object.size_bytes;
        });
    if (!is_checked) {
      return absl::DataLossError(absl::StrCat("the checkpoint's manifest names object ",
                                              object.sha256, " of ", object.size_bytes,
                                              " bytes, which is not one of its generation"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> JobCheckpoint::ReadOwnText() const {
  std::vector<int32_t> ids;
  if (own_text_.empty()) return ids;
  ids.resize(static_cast<size_t>(own_text_.front().size_bytes) / sizeof(int32_t));
  WALSH_RETURN_IF_ERROR(Read(own_text_.front(), std::as_writable_bytes(std::span(ids))));
  return ids;
}

absl::Status JobCheckpoint::KeepOwnText(std::span<const int32_t> ids) {
  if (!is_kept_) return absl::OkStatus();
  absl::StatusOr<Object> object =
      store_.Put({reinterpret_cast<const char*>(ids.data()), ids.size_bytes()});
  if (!object.ok()) return GiveUp(object.status());
  own_text_ = {*std::move(object)};
  const absl::Status committed = Commit();
  return committed.ok() ? committed : GiveUp(committed);
}

absl::Status JobCheckpoint::SetCalibration(json calibration) {
  if (!layers_.empty()) WALSH_RETURN_IF_ERROR(CompareIdentity(calibration_, calibration));
  calibration_ = std::move(calibration);
  return absl::OkStatus();
}

absl::Status JobCheckpoint::Restore(ArtifactWriter& writer, std::span<Matrix* const> activations,
                                    JobReport& report) {
  n_warnings_ = report.warnings.size();
  if (layers_.empty()) return absl::OkStatus();
  if (activations.size() != activations_.size()) {
    return absl::InternalError(absl::StrCat("the checkpoint has ", activations_.size(),
                                            " activations, the job ", activations.size()));
  }
  for (const Layer& layer : layers_) {
    RecordedTensors tensors{layer.tensors, std::string()};
    tensors.bytes.resize(static_cast<size_t>(layer.object.size_bytes));
    WALSH_RETURN_IF_ERROR(Read(layer.object, std::as_writable_bytes(std::span(tensors.bytes))));
    WALSH_RETURN_IF_ERROR(writer.WriteRecorded(tensors));
    report.linears.insert(report.linears.end(), layer.linears.begin(), layer.linears.end());
    report.warnings.insert(report.warnings.end(), layer.warnings.begin(), layer.warnings.end());
  }
  for (size_t i = 0; i < activations_.size(); ++i) {
    WALSH_RETURN_IF_ERROR(Read(activations_[i], std::as_writable_bytes(activations[i]->span())));
  }
  n_warnings_ = report.warnings.size();
  return absl::OkStatus();
}

absl::Status JobCheckpoint::KeepLayer(RecordedTensors tensors,
                                      std::span<const Matrix* const> activations,
                                      const JobReport& report, int64_t bytes_spared) {
  if (!is_kept_) return absl::OkStatus();
  const absl::Status kept = TryKeepLayer(std::move(tensors), activations, report, bytes_spared);
  return kept.ok() ? kept : GiveUp(kept);
}

absl::Status JobCheckpoint::TryKeepLayer(RecordedTensors tensors,
                                         std::span<const Matrix* const> activations,
                                         const JobReport& report, int64_t bytes_spared) {
  auto bytes_needed = static_cast<int64_t>(tensors.bytes.size());
  for (const Matrix* matrix : activations) {
    bytes_needed += static_cast<int64_t>(BytesOf(*matrix).size());
  }
  WALSH_ASSIGN_OR_RETURN(const int64_t bytes_free, store_.FreeBytes());
  if (bytes_free - bytes_needed < bytes_spared) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the checkpoint needs ", bytes_needed, " bytes of disk beside the ",
                     bytes_spared, " that the artifact still needs, ", bytes_free, " are free"));
  }
  Layer layer;
  WALSH_ASSIGN_OR_RETURN(layer.object, store_.Put(tensors.bytes));
  layer.tensors = std::move(tensors.entries);
  size_t n_linears = 0;
  for (const Layer& kept : layers_) n_linears += kept.linears.size();
  layer.linears.assign(report.linears.begin() + static_cast<int64_t>(n_linears),
                       report.linears.end());
  layer.warnings.assign(report.warnings.begin() + static_cast<int64_t>(n_warnings_),
                        report.warnings.end());
  n_warnings_ = report.warnings.size();
  layers_.push_back(std::move(layer));
  activations_.clear();
  for (const Matrix* matrix : activations) {
    WALSH_ASSIGN_OR_RETURN(activations_.emplace_back(), store_.Put(BytesOf(*matrix)));
  }
  return Commit();
}

absl::Status JobCheckpoint::Commit() { return store_.Commit({Manifest().dump(), Objects()}); }

std::vector<JobCheckpoint::Object> JobCheckpoint::Objects() const {
  std::vector<Object> objects = own_text_;
  for (const Layer& layer : layers_) objects.push_back(layer.object);
  objects.insert(objects.end(), activations_.begin(), activations_.end());
  return objects;
}

json JobCheckpoint::Manifest() const {
  json layers = json::array();
  for (const Layer& layer : layers_) {
    json tensors = json::array(), linears = json::array();
    for (const RecordedTensors::Entry& entry : layer.tensors) tensors.push_back(ToJson(entry));
    for (const LinearReport& linear : layer.linears) linears.push_back(ToJson(linear));
    layers.push_back({{"object", ToJson(layer.object)},
                      {"tensors", std::move(tensors)},
                      {"linears", std::move(linears)},
                      {"warnings", layer.warnings}});
  }
  return {{"identity", identity_},
          {"calibration", calibration_},
          {"own_text", ToJson(own_text_)},
          {"layers", std::move(layers)},
          {"activations", ToJson(activations_)}};
}

absl::Status JobCheckpoint::Parse(const std::string& manifest) {
  try {
    const json document = json::parse(manifest);
    identity_ = document.at("identity");
    calibration_ = document.at("calibration");
    own_text_ = ObjectsOf(document.at("own_text"));
    for (const json& value : document.at("layers")) {
      Layer layer{.object = ObjectOf(value.at("object")),
                  .tensors = {},
                  .linears = {},
                  .warnings = value.at("warnings").get<std::vector<std::string>>()};
      for (const json& entry : value.at("tensors")) layer.tensors.push_back(EntryOf(entry));
      for (const json& linear : value.at("linears")) layer.linears.push_back(LinearOf(linear));
      layers_.push_back(std::move(layer));
    }
    activations_ = ObjectsOf(document.at("activations"));
    return absl::OkStatus();
  } catch (const json::exception& e) {
    return absl::DataLossError(absl::StrCat("the checkpoint's manifest: ", e.what()));
  }
}

void JobCheckpoint::Clear() {
  identity_ = calibration_ = json();
  own_text_.clear();
  layers_.clear();
  activations_.clear();
}

absl::Status JobCheckpoint::Read(const Object& object, std::span<std::byte> into) const {
  const absl::Status status = store_.Get(object, into);
  // It was whole when the checkpoint was opened: the next try finds it so, or begins elsewhere.
  if (absl::IsDataLoss(status)) return absl::UnavailableError(status.message());
  return status;
}

absl::Status JobCheckpoint::GiveUp(const absl::Status& cause) {
  is_kept_ = false;
  if (absl::IsAborted(cause)) return cause;
  // A disk that is full is needed for the artifact. What was kept so far stays: an earlier layer is
  // better than none.
  store_.Discard().IgnoreError();
  notice_ = absl::StrCat("goes on without checkpoints: ", cause.message());
  WALSH_LOG(Warning, "the job goes on without checkpoints", {"job", job_name_}, {"error", cause});
  return absl::OkStatus();
}

std::string JobCheckpoint::TakeNotice() { return std::exchange(notice_, ""); }

}  // namespace walsh::pipeline
