#include "worker/tokenizer/tokenizer_json_stages.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/json_fields.h"

namespace walsh {
namespace {

using nlohmann::json;

// One replacement may not multiply a prompt's size.
constexpr size_t kReplacementBytesMax = 64;

absl::Status Malformed(std::string_view stage, std::string_view problem) {
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer.json: ", std::string(stage), ": ", std::string(problem)));
}

absl::Status Unknown(std::string_view stage, std::string_view what) {
  return absl::UnimplementedError(absl::StrCat("tokenizer.json: ", std::string(stage), " '",
                                               std::string(what), "' is not known to walsh"));
}

absl::Status InStage(std::string_view stage, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("tokenizer.json: ", std::string(stage), ": ",
                                                  std::string(status.message())));
}

// A stage as the list of its parts: nothing for null, `list_field` flattened for a Sequence.
absl::Status Flatten(const json& stage, const char* name, const char* list_field,
                     std::vector<const json*>& parts) {
  if (stage.is_null()) return absl::OkStatus();
  if (!stage.is_object()) return Malformed(name, "is no object");
  const json* type = Find(stage, "type");
  if (type == nullptr || !type->is_string()) return Malformed(name, "has no type");
  if (*type != "Sequence") {
    parts.push_back(&stage);
    return absl::OkStatus();
  }
  const json* list = Find(stage, list_field);
  if (list == nullptr || !list->is_array()) {
    return Malformed(name, absl::StrCat("its Sequence has no list '", list_field, "'"));
  }
  for (const json& item : *list) WALSH_RETURN_IF_ERROR(Flatten(item, name, list_field, parts));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<const json*>> StageParts(const json& root, const char* name,
                                                    const char* list_field) {
  std::vector<const json*> parts;
  if (const json* stage = Find(root, name)) {
    WALSH_RETURN_IF_ERROR(Flatten(*stage, name, list_field, parts));
  }
  return parts;
}

std::string TypeOf(const json& stage) { return stage.at("type").get<std::string>(); }

// {"String": "…"} or {"Regex": "…"}
struct Pattern {
  bool is_regex = false;
  std::string text;
};

absl::StatusOr<Pattern> ReadPattern(const json& stage) {
  const json* pattern = Find(stage, "pattern");
  if (pattern != nullptr && pattern->is_object() && pattern->size() == 1) {
    const auto item = pattern->begin();
    const bool is_regex = item.key() == "Regex";
    if ((is_regex || item.key() == "String") && item->is_string()) {
      return Pattern{.is_regex = is_regex, .text = item->get<std::string>()};
    }
  }
  return absl::InvalidArgumentError("field 'pattern' is neither {\"String\"} nor {\"Regex\"}");
}

// -- Normalizer

absl::StatusOr<NormalizerStep> ReadNormalizerStep(const json& stage) {
  const std::string type = TypeOf(stage);
  NormalizerStep step;
  if (type == "NFC") {
    step.kind = NormalizerStep::Kind::kNfc;
  } else if (type == "Prepend") {
    step.kind = NormalizerStep::Kind::kPrepend;
    WALSH_ASSIGN_OR_RETURN(step.content, StringField(stage, "prepend", std::nullopt));
  } else if (type == "Replace") {
    step.kind = NormalizerStep::Kind::kReplace;
    WALSH_ASSIGN_OR_RETURN(Pattern pattern, ReadPattern(stage));
    if (pattern.is_regex) return Unknown("normalizer Replace with the pattern", pattern.text);
    if (pattern.text.empty()) return absl::InvalidArgumentError("an empty pattern");
    step.pattern = std::move(pattern.text);
    WALSH_ASSIGN_OR_RETURN(step.content, StringField(stage, "content", std::nullopt));
  } else {
    return Unknown("normalizer", type);
  }
  if (step.content.size() > kReplacementBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("a replacement of ", step.content.size(),
                                                   " bytes, at most ", kReplacementBytesMax));
  }
  return step;
}

// -- Pre-tokenizer

absl::Status AddSplitter(std::string_view pattern, PreTokenizer& pre_tokenizer) {
  WALSH_ASSIGN_OR_RETURN(RegexSplitter splitter, RegexSplitter::Create(pattern));
  pre_tokenizer.splitters.push_back(std::move(splitter));
  return absl::OkStatus();
}

absl::Status ReadSplit(const json& stage, PreTokenizer& pre_tokenizer) {
  WALSH_ASSIGN_OR_RETURN(const Pattern pattern, ReadPattern(stage));
  WALSH_ASSIGN_OR_RETURN(const std::string behavior, StringField(stage, "behavior", std::nullopt));
  WALSH_ASSIGN_OR_RETURN(const bool inverts, BoolField(stage, "invert", false));
  if (!pattern.is_regex) return Unknown("pre_tokenizer Split at the string", pattern.text);
  // Every character of a text is in some match of the known patterns, so that to remove what is
  // between the matches removes nothing.
  const bool keeps_all = (behavior == "Isolated" && !inverts) || (behavior == "Removed" && inverts);
  if (!keeps_all) {
    return Unknown("pre_tokenizer Split with behavior",
                   absl::StrCat(behavior, inverts ? ", inverted" : ""));
  }
  return AddSplitter(pattern.text, pre_tokenizer);
}

absl::Status ReadByteLevel(const json& stage, BpeTokenizerParts& parts) {
  parts.is_byte_level = true;
  WALSH_ASSIGN_OR_RETURN(const bool adds_prefix_space, BoolField(stage, "add_prefix_space", true));
  WALSH_ASSIGN_OR_RETURN(const bool uses_regex, BoolField(stage, "use_regex", true));
  if (adds_prefix_space) {
    if (!parts.pre_tokenizer.splitters.empty()) {
      return Unknown("pre_tokenizer ByteLevel after a split, with", "add_prefix_space");
    }
    parts.pre_tokenizer.adds_prefix_space = true;
  }
  return uses_regex ? AddSplitter(kGpt2Pattern, parts.pre_tokenizer) : absl::OkStatus();
}

absl::Status ReadMetaspace(const json& stage, PreTokenizer& pre_tokenizer) {
  if (!pre_tokenizer.splitters.empty() || pre_tokenizer.adds_prefix_space ||
      pre_tokenizer.metaspace) {
    return Unknown("pre_tokenizer Metaspace after", "another one");
  }
  WALSH_ASSIGN_OR_RETURN(const std::string replacement,
                         StringField(stage, "replacement", kMetaspace));
  if (replacement != kMetaspace) return Unknown("pre_tokenizer Metaspace for", replacement);
  // Older files have only add_prefix_space.
  WALSH_ASSIGN_OR_RETURN(const bool adds_prefix_space, BoolField(stage, "add_prefix_space", true));
  WALSH_ASSIGN_OR_RETURN(
      const std::string scheme,
      StringField(stage, "prepend_scheme", adds_prefix_space ? "always" : "never"));
  PreTokenizer::Metaspace metaspace;
  if (scheme == "always") {
    metaspace.prepend = PreTokenizer::Metaspace::Prepend::kAlways;
  } else if (scheme == "first") {
    metaspace.prepend = PreTokenizer::Metaspace::Prepend::kFirst;
  } else if (scheme == "never") {
    metaspace.prepend = PreTokenizer::Metaspace::Prepend::kNever;
  } else {
    return Unknown("pre_tokenizer Metaspace with prepend_scheme", scheme);
  }
  WALSH_ASSIGN_OR_RETURN(metaspace.splits, BoolField(stage, "split", true));
  pre_tokenizer.metaspace = metaspace;
  return absl::OkStatus();
}

absl::Status ReadPreTokenizerPart(const json& stage, BpeTokenizerParts& parts) {
  const std::string type = TypeOf(stage);
  // ByteLevel turns text into its alphabet, which no later stage expects.
  if (parts.is_byte_level) return Unknown("pre_tokenizer after ByteLevel", type);
  if (type == "Split") return ReadSplit(stage, parts.pre_tokenizer);
  if (type == "ByteLevel") return ReadByteLevel(stage, parts);
  if (type == "Metaspace") return ReadMetaspace(stage, parts.pre_tokenizer);
  if (type == "Digits") {
    WALSH_ASSIGN_OR_RETURN(const bool one_by_one, BoolField(stage, "individual_digits", false));
    return AddSplitter(one_by_one ? kDigitPattern : kDigitsPattern, parts.pre_tokenizer);
  }
  return Unknown("pre_tokenizer", type);
}

// -- Decoder

absl::StatusOr<bool> IsStripOfOneSpace(const json& stage) {
  WALSH_ASSIGN_OR_RETURN(const std::string content, StringField(stage, "content", std::nullopt));
  const json* start = Find(stage, "start");
  const json* stop = Find(stage, "stop");
  return content == " " && start != nullptr && *start == 1 && stop != nullptr && *stop == 0;
}

absl::StatusOr<bool> IsMetaspaceReplace(const json& stage) {
  WALSH_ASSIGN_OR_RETURN(const Pattern pattern, ReadPattern(stage));
  WALSH_ASSIGN_OR_RETURN(const std::string content, StringField(stage, "content", std::nullopt));
  return !pattern.is_regex && pattern.text == kMetaspace && content == " ";
}

absl::Status ReadDecoderPart(const json& stage, bool& is_byte_level, bool& has_metaspace,
                             BpeTokenizerParts& parts) {
  const std::string type = TypeOf(stage);
  if (type == "ByteLevel") {
    is_byte_level = true;
  } else if (type == "ByteFallback") {
    parts.has_byte_fallback = true;
  } else if (type == "Replace") {
    WALSH_ASSIGN_OR_RETURN(has_metaspace, IsMetaspaceReplace(stage));
    if (!has_metaspace) return Unknown("decoder Replace with", Find(stage, "pattern")->dump());
  } else if (type == "Strip") {
    WALSH_ASSIGN_OR_RETURN(parts.strips_leading_space, IsStripOfOneSpace(stage));
    if (!parts.strips_leading_space) return Unknown("decoder", stage.dump());
  } else if (type == "Metaspace") {
    has_metaspace = true;
    WALSH_ASSIGN_OR_RETURN(const bool adds_space, BoolField(stage, "add_prefix_space", true));
    WALSH_ASSIGN_OR_RETURN(const std::string scheme,
                           StringField(stage, "prepend_scheme", adds_space ? "always" : "never"));
    parts.strips_leading_space = scheme != "never";
  } else if (type != "Fuse") {
    return Unknown("decoder", type);
  }
  return absl::OkStatus();
}

// -- Post-processor

absl::Status ReadSpecialPiece(const json& item, const json& stage, const Vocabulary& vocabulary,
                              std::vector<int32_t>& ids) {
  const json* name = Find(item, "id");
  const json* table = Find(stage, "special_tokens");
  if (name == nullptr || !name->is_string() || table == nullptr || !table->is_object()) {
    return absl::InvalidArgumentError("TemplateProcessing without special_tokens");
  }
  const auto entry = table->find(name->get<std::string>());
  const json* entry_ids =
      entry == table->end() || !entry->is_object() ? nullptr : Find(*entry, "ids");
  if (entry_ids == nullptr || !entry_ids->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat("no ids for '", name->get<std::string>(), "'"));
  }
  for (const json& id : *entry_ids) {
    if (!id.is_number_integer() || id < 0 || id >= vocabulary.size()) {
      return absl::InvalidArgumentError(absl::StrCat("'", name->get<std::string>(),
                                                     "' has an id outside the vocabulary of ",
                                                     vocabulary.size()));
    }
    ids.push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

// What TemplateProcessing puts around one text.
absl::Status ReadTemplate(const json& stage, BpeTokenizerParts& parts) {
  const json* single = Find(stage, "single");
  if (single == nullptr || !single->is_array()) {
    return absl::InvalidArgumentError("TemplateProcessing without the list 'single'");
  }
  bool seen_text = false;
  std::vector<int32_t> before;
  for (const json& item : *single) {
    const json* special = item.is_object() ? Find(item, "SpecialToken") : nullptr;
    const json* sequence = item.is_object() ? Find(item, "Sequence") : nullptr;
    if (special != nullptr) {
      WALSH_RETURN_IF_ERROR(
          ReadSpecialPiece(*special, stage, *parts.vocabulary, seen_text ? parts.suffix : before));
    } else if (sequence != nullptr && !seen_text) {
      seen_text = true;
    } else {
      return absl::InvalidArgumentError("TemplateProcessing: 'single' is not one text with tokens");
    }
  }
  if (!seen_text) return absl::InvalidArgumentError("TemplateProcessing: 'single' has no text");
  // A later processor's tokens go around those of an earlier one.
  parts.prefix.insert(parts.prefix.begin(), before.begin(), before.end());
  return absl::OkStatus();
}

}  // namespace

absl::Status ReadNormalizer(const json& root, BpeTokenizerParts& parts) {
  WALSH_ASSIGN_OR_RETURN(const auto stages, StageParts(root, "normalizer", "normalizers"));
  for (const json* stage : stages) {
    absl::StatusOr<NormalizerStep> step = ReadNormalizerStep(*stage);
    if (!step.ok()) return InStage("normalizer", step.status());
    parts.normalizer.steps.push_back(*std::move(step));
  }
  return absl::OkStatus();
}

absl::Status ReadPreTokenizer(const json& root, BpeTokenizerParts& parts) {
  WALSH_ASSIGN_OR_RETURN(const auto stages, StageParts(root, "pre_tokenizer", "pretokenizers"));
  for (const json* stage : stages) {
    if (const auto status = ReadPreTokenizerPart(*stage, parts); !status.ok()) {
      return InStage("pre_tokenizer", status);
    }
  }
  return absl::OkStatus();
}

absl::Status ReadDecoder(const json& root, BpeTokenizerParts& parts) {
  WALSH_ASSIGN_OR_RETURN(const auto stages, StageParts(root, "decoder", "decoders"));
  bool is_byte_level = false;
  bool has_metaspace = false;
  for (const json* stage : stages) {
    if (const auto status = ReadDecoderPart(*stage, is_byte_level, has_metaspace, parts);
        !status.ok()) {
      return InStage("decoder", status);
    }
  }
  if (is_byte_level != parts.is_byte_level || has_metaspace == is_byte_level) {
    return Unknown("decoder", "one that does not undo the pre-tokenizer and normalizer");
  }
  return absl::OkStatus();
}

absl::Status ReadPostProcessor(const json& root, BpeTokenizerParts& parts) {
  WALSH_ASSIGN_OR_RETURN(const auto stages, StageParts(root, "post_processor", "processors"));
  for (const json* stage : stages) {
    const std::string type = TypeOf(*stage);
    if (type == "ByteLevel") continue;  // only changes offsets
    if (type != "TemplateProcessing") return Unknown("post_processor", type);
    if (const auto status = ReadTemplate(*stage, parts); !status.ok()) {
      return InStage("post_processor", status);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh
