#include "client/commands/evaluation_flags.h"

#include <map>

#include "common/status_macros.h"

namespace walsh::client {
namespace {

const std::map<std::string, v1::TextEvaluation::Format> kFormats = {
    {"auto", v1::TextEvaluation::FORMAT_UNSPECIFIED}, {"wikitext", v1::TextEvaluation::WIKITEXT}};

}  // namespace

void AddTextFormatFlag(CLI::App& command, const std::string& flag, std::string& format) {
  std::vector<std::string> names;
  for (const auto& [name, value] : kFormats) names.push_back(name);
  command
      .add_option(flag, format, "auto: by the file's name; wikitext: rows, joined by blank lines")
      ->check(CLI::IsMember(names))
      ->capture_default_str();
}

v1::TextEvaluation::Format TextFormatOf(const std::string& name) { return kFormats.at(name); }

absl::Status AddTasks(const std::vector<std::string>& paths, int limit,
                      google::protobuf::RepeatedPtrField<v1::TaskEvaluation>* tasks) {
  for (const std::string& path : paths) {
    v1::TaskEvaluation& task = *tasks->Add();
    task.set_uri(SourceReference(path));
    task.set_limit(limit);
    WALSH_RETURN_IF_ERROR(CheckUtf8(task.uri(), "task's path"));
  }
  return absl::OkStatus();
}

}  // namespace walsh::client
