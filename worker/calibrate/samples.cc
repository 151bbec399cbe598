#include "worker/calibrate/samples.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/io/bounded_json.h"
#include "worker/tokenizer/chat_template.h"

namespace walsh::calibrate {
namespace {

using nlohmann::json;

constexpr JsonBounds kBounds{limits::kCalibrationFileBytesMax, limits::kJsonDepthMax};

bool EndsWith(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

bool IsBlank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos;
}

absl::Status CheckUtf8(std::string_view text) {
  if (IsValidUtf8(text)) return absl::OkStatus();
  // Only now is it worth finding where.
  size_t low = 0, high = text.size();
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    const std::string_view head = text.substr(0, middle);
    if (IsValidUtf8(head.substr(0, middle - IncompleteUtf8Suffix(head)))) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return absl::InvalidArgumentError(absl::StrCat("the text is not UTF-8 near byte ", low));
}

class SampleReader {
 public:
  SampleReader(const Tokenizer& tokenizer, std::string_view chat_template)
      : template_source_(chat_template) {
    if (tokenizer.bos() >= 0) bos_ = tokenizer.TokenBytes(tokenizer.bos(), false);
    if (tokenizer.eos() >= 0) eos_ = tokenizer.TokenBytes(tokenizer.eos(), false);
  }

  void AddText(std::string text) { Add({std::move(text), false}); }

  absl::Status AddElement(const json& element, const std::string& where) {
    if (element.is_string()) {
      AddText(element.get<std::string>());
      return absl::OkStatus();
    }
    if (element.is_object()) {
      const auto text = element.find("text");
      const auto messages = element.find("messages");
      if (text != element.end() && text->is_string()) {
        AddText(text->get<std::string>());
        return absl::OkStatus();
      }
      if (messages != element.end() && messages->is_array()) return AddChat(*messages, where);
    }
    return absl::InvalidArgumentError(
        absl::StrCat(where,
                     ": a sample must be an object with a string \"text\" or an array "
                     "\"messages\""));
  }

  absl::StatusOr<SampleSet> Take() && {
    if (set_.samples.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the file has no sample with any text (", set_.dropped, " blank ones)"));
    }
    return std::move(set_);
  }

 private:
  void Add(Sample sample) {
    if (IsBlank(sample.text)) {
      ++set_.dropped;
    } else {
      set_.samples.push_back(std::move(sample));
    }
  }

  absl::Status AddChat(const json& messages, const std::string& where) {
    if (template_source_.empty()) {
      return absl::UnimplementedError(
          absl::StrCat(where, ": \"messages\" need a chat template, and this model has none"));
    }
    if (chat_template_ == nullptr) {
      WALSH_ASSIGN_OR_RETURN(chat_template_, ChatTemplate::Parse(template_source_));
    }
    ChatTemplate::Variables variables;
    variables.add_generation_prompt = false;
    variables.bos_token = bos_;
    variables.eos_token = eos_;
    for (const json& message : messages) {
      const bool is_message = message.is_object() && message.contains("role") &&
                              message["role"].is_string() && message.contains("content") &&
                              message["content"].is_string();
      if (!is_message) {
        return absl::InvalidArgumentError(absl::StrCat(
            where, ": a message must have a string \"role\" and a string \"content\""));
      }
      variables.messages.push_back(
          {message["role"].get<std::string>(), message["content"].get<std::string>()});
    }
    absl::StatusOr<std::string> text = chat_template_->Render(variables);
    if (!text.ok()) {
      return absl::Status(text.status().code(), absl::StrCat(where, ": ", text.status().message()));
    }
    Add({*std::move(text), true});
    return absl::OkStatus();
  }

  const std::string_view template_source_;
  std::unique_ptr<ChatTemplate> chat_template_;
  std::string bos_, eos_;
  SampleSet set_;
};

absl::Status ReadLines(std::string_view text, SampleReader& reader) {
  int64_t number = 0;
  while (!text.empty()) {
    ++number;
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (IsBlank(line)) continue;
    const std::string where = absl::StrCat("line ", number);
    WALSH_ASSIGN_OR_RETURN(const json element, ParseBoundedJson(where, line, kBounds));
    WALSH_RETURN_IF_ERROR(reader.AddElement(element, where));
  }
  return absl::OkStatus();
}

absl::Status ReadArray(const std::string& text, SampleReader& reader) {
  // The bounded parser takes objects only.
  WALSH_ASSIGN_OR_RETURN(
      const json document,
      ParseBoundedJson("the file", absl::StrCat("{\"samples\":", text, "}"), kBounds));
  const json& samples = document["samples"];
  if (document.size() != 1 || !samples.is_array()) {
    return absl::InvalidArgumentError("a .json file must hold an array");
  }
  for (size_t i = 0; i < samples.size(); ++i) {
    WALSH_RETURN_IF_ERROR(reader.AddElement(samples[i], absl::StrCat("element ", i)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SampleSet> ReadSamples(const NamedFile& file, const Tokenizer& tokenizer,
                                      std::string_view chat_template) {
  WALSH_ASSIGN_OR_RETURN(std::string text, ReadFile(file.path, limits::kCalibrationFileBytesMax));
  WALSH_RETURN_IF_ERROR(CheckUtf8(text));
  SampleReader reader(tokenizer, chat_template);
  if (EndsWith(file.shown(), ".jsonl")) {
    WALSH_RETURN_IF_ERROR(ReadLines(text, reader));
  } else if (EndsWith(file.shown(), ".json")) {
    WALSH_RETURN_IF_ERROR(ReadArray(text, reader));
  } else {
    reader.AddText(std::move(text));
  }
  return std::move(reader).Take();
}

}  // namespace walsh::calibrate
