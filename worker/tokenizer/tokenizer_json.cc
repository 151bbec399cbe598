// HF's tokenizer.json.
//
// Every part that is not known exactly is UNIMPLEMENTED by its name: a tokenizer that is almost
// right gives a model that is almost right. `truncation` and `padding` are ignored, as they concern
// batches, not the text.
//
// Source:  the serialisation of the `tokenizers` library, version 1.0 of the format.
#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"
#include "worker/tokenizer/bpe_tokenizer.h"
#include "worker/tokenizer/json_fields.h"
#include "worker/tokenizer/tokenizer_config.h"
#include "worker/tokenizer/tokenizer_json_stages.h"

namespace walsh {
namespace {

using nlohmann::json;
using MergeList = std::vector<std::pair<std::string, std::string>>;

absl::Status Malformed(std::string_view field, std::string_view problem) {
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer.json: ", std::string(field), ": ", std::string(problem)));
}

// "left right" or ["left", "right"].
absl::StatusOr<MergeList> ReadMerges(const json& model) {
  const json* list = Find(model, "merges");
  if (list == nullptr || !list->is_array()) return Malformed("model.merges", "is no list");
  MergeList merges;
  merges.reserve(list->size());
  for (size_t i = 0; i < list->size(); ++i) {
    const json& item = (*list)[i];
    std::string left;
    std::string right;
    if (item.is_string()) {
      const std::string& text = item.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
        left = text.substr(0, space);
        right = text.substr(space + 1);
      }
    } else if (item.is_array() && item.size() == 2 && item[0].is_string() && item[1].is_string()) {
      left = item[0].get<std::string>();
      right = item[1].get<std::string>();
    }
    if (left.empty() || right.empty()) {
      return Malformed("model.merges", absl::StrCat("item ", i, " is not a pair"));
    }
    merges.emplace_back(std::move(left), std::move(right));
  }
  return merges;
}

// Options that change what the model does and that walsh does not have must be off.
absl::Status CheckModel(const json& model) {
  WALSH_ASSIGN_OR_RETURN(const std::string type, StringField(model, "type", "BPE"));
  if (type != "BPE") {
    return absl::UnimplementedError(
        absl::StrCat("tokenizer.json: model type '", type, "'; walsh has BPE"));
  }
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    WALSH_ASSIGN_OR_RETURN(const std::string value, StringField(model, name, ""));
    if (!value.empty()) {
      return absl::UnimplementedError(
          absl::StrCat("tokenizer.json: model.", name, " '", value, "'"));
    }
  }
  const json* dropout = Find(model, "dropout");
  if (dropout != nullptr && !dropout->is_null() && *dropout != 0) {
    return absl::UnimplementedError("tokenizer.json: model.dropout");
  }
  return absl::OkStatus();
}

absl::Status ReadVocabulary(const json& model, Vocabulary& vocabulary) {
  const json* vocab = Find(model, "vocab");
  if (vocab == nullptr || !vocab->is_object()) return Malformed("model.vocab", "is no object");
  for (const auto& [spelling, id] : vocab->items()) {
    if (!id.is_number_integer()) {
      return Malformed("model.vocab", absl::StrCat("the id of '", spelling, "' is no integer"));
    }
    if (const absl::Status status = vocabulary.Add(spelling, id.get<int64_t>()); !status.ok()) {
      return Malformed("model.vocab", std::string(status.message()));
    }
  }
  return absl::OkStatus();
}

struct AddedTokenEntry {
  AddedToken token;
  bool is_normalized = false;
};

absl::StatusOr<AddedTokenEntry> ReadAddedToken(const json& item) {
  if (!item.is_object()) return Malformed("added_tokens", "an item is no object");
  AddedTokenEntry entry;
  WALSH_ASSIGN_OR_RETURN(entry.token.content, StringField(item, "content", std::nullopt));
  const json* id = Find(item, "id");
  if (id == nullptr || !id->is_number_integer() || *id < 0 || *id >= limits::kVocabMax) {
    return Malformed("added_tokens", absl::StrCat("'", entry.token.content, "' has no id below ",
                                                  limits::kVocabMax));
  }
  entry.token.id = id->get<int32_t>();
  WALSH_ASSIGN_OR_RETURN(entry.token.is_special, BoolField(item, "special", false));
  WALSH_ASSIGN_OR_RETURN(entry.token.is_single_word, BoolField(item, "single_word", false));
  WALSH_ASSIGN_OR_RETURN(entry.token.strips_left, BoolField(item, "lstrip", false));
  WALSH_ASSIGN_OR_RETURN(entry.token.strips_right, BoolField(item, "rstrip", false));
  WALSH_ASSIGN_OR_RETURN(entry.is_normalized,
                         BoolField(item, "normalized", !entry.token.is_special));
  return entry;
}

absl::Status ReadAddedTokens(const json& root, BpeTokenizerParts& parts) {
  std::vector<AddedTokenEntry> entries;
  if (const json* list = Find(root, "added_tokens"); list != nullptr && !list->is_null()) {
    if (!list->is_array()) return Malformed("added_tokens", "is no list");
    for (const json& item : *list) {
      WALSH_ASSIGN_OR_RETURN(AddedTokenEntry entry, ReadAddedToken(item));
      entries.push_back(std::move(entry));
    }
  }
  for (const AddedTokenEntry& entry : entries) {
    const AddedToken& token = entry.token;
    // Nothing is spelled at ids beyond the vocabulary either.
    if (token.content.empty() || parts.vocabulary->Spelling(token.id) != token.content) {
      if (const auto status = parts.vocabulary->Add(token.content, token.id); !status.ok()) {
        return Malformed("added_tokens", std::string(status.message()));
      }
    }
  }
  const size_t n = static_cast<size_t>(parts.vocabulary->size());
  parts.is_special.assign(n, false);
  parts.is_added.assign(n, false);
  for (AddedTokenEntry& entry : entries) {
    AddedToken& token = entry.token;
    parts.is_special[token.id] = token.is_special;
    parts.is_added[token.id] = true;
    // Those that are searched in normalized text are normalized themselves.
    if (entry.is_normalized) {
      WALSH_ASSIGN_OR_RETURN(token.content, parts.normalizer.Apply(token.content));
      parts.normalized_spellings[token.id] = token.content;
    }
    AddedTokens& set = entry.is_normalized ? parts.normalized_added : parts.raw_added;
    if (const auto status = set.Add(token); !status.ok()) {
      return Malformed("added_tokens", std::string(status.message()));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RankedBpeOptions> ReadModelOptions(const json& model, const Vocabulary& vocabulary) {
  RankedBpeOptions options;
  WALSH_ASSIGN_OR_RETURN(options.has_byte_fallback, BoolField(model, "byte_fallback", false));
  WALSH_ASSIGN_OR_RETURN(options.fuses_unknown, BoolField(model, "fuse_unk", false));
  WALSH_ASSIGN_OR_RETURN(options.ignores_merges, BoolField(model, "ignore_merges", false));
  WALSH_ASSIGN_OR_RETURN(const std::string unknown, StringField(model, "unk_token", ""));
  if (!unknown.empty()) {
    options.unknown = vocabulary.Find(unknown);
    if (options.unknown < 0) {
      return Malformed("model.unk_token", absl::StrCat("'", unknown, "' is no token"));
    }
  }
  return options;
}

absl::Status ReadModel(const json& root, BpeTokenizerParts& parts) {
  const json* model = Find(root, "model");
  if (model == nullptr || !model->is_object()) return Malformed("model", "is no object");
  WALSH_RETURN_IF_ERROR(CheckModel(*model));
  parts.vocabulary = std::make_unique<Vocabulary>();
  WALSH_RETURN_IF_ERROR(ReadVocabulary(*model, *parts.vocabulary));
  std::vector<bool> is_model_token;
  for (int32_t id = 0; id < parts.vocabulary->size(); ++id) {
    is_model_token.push_back(!parts.vocabulary->Spelling(id).empty());
  }
  WALSH_RETURN_IF_ERROR(ReadAddedTokens(root, parts));
  is_model_token.resize(static_cast<size_t>(parts.vocabulary->size()), false);

  WALSH_ASSIGN_OR_RETURN(RankedBpeOptions options, ReadModelOptions(*model, *parts.vocabulary));
  options.is_byte_level = parts.is_byte_level;
  options.is_model_token = std::move(is_model_token);
  WALSH_ASSIGN_OR_RETURN(const MergeList merges, ReadMerges(*model));
  absl::StatusOr<std::unique_ptr<BpeModel>> bpe =
      MakeRankedBpe(parts.vocabulary.get(), merges, options);
  if (!bpe.ok()) return Malformed("model.merges", std::string(bpe.status().message()));
  parts.model = *std::move(bpe);
  return absl::OkStatus();
}

// transformers 4 rebuilds the post-processor of Llama's tokenizers from their configuration,
// transformers 5 takes the file's. So do we; where the two contradict each other, prompts may
// differ from those that the model's author saw.
void WarnOfContradiction(const TokenizerConfig& config, const BpeTokenizerParts& parts) {
  if (config.tokenizer_class != "LlamaTokenizer" &&
      config.tokenizer_class != "LlamaTokenizerFast") {
    return;
  }
  const auto check = [](std::string_view field, std::optional<bool> wanted, int32_t id,
                        const std::vector<int32_t>& around) {
    const bool is_added = std::find(around.begin(), around.end(), id) != around.end();
    if (id < 0 || !wanted || *wanted == is_added) return;
    WALSH_LOG(
        Warning,
        "tokenizer_config.json contradicts the post-processor of tokenizer.json, which counts",
        {"field", std::string(field)}, {"value", *wanted});
  };
  check("add_bos_token", config.adds_bos, parts.bos, parts.prefix);
  check("add_eos_token", config.adds_eos, parts.eos, parts.suffix);
}

}  // namespace

absl::StatusOr<BpeTokenizerParts> ReadTokenizerJson(const TokenizerSource& source) {
  WALSH_ASSIGN_OR_RETURN(const json root, ParseBoundedJson("tokenizer.json", source.tokenizer_json,
                                                           {.bytes_max = limits::kJsonFileBytesMax,
                                                            .depth_max = limits::kJsonDepthMax}));
  BpeTokenizerParts parts;
  WALSH_RETURN_IF_ERROR(ReadNormalizer(root, parts));
  WALSH_RETURN_IF_ERROR(ReadPreTokenizer(root, parts));
  WALSH_RETURN_IF_ERROR(ReadDecoder(root, parts));
  WALSH_RETURN_IF_ERROR(ReadModel(root, parts));
  WALSH_RETURN_IF_ERROR(ReadPostProcessor(root, parts));
  WALSH_ASSIGN_OR_RETURN(const TokenizerConfig config,
                         ReadTokenizerConfig(source.tokenizer_config_json));
  parts.bos = parts.vocabulary->Find(config.bos_token);
  parts.eos = parts.vocabulary->Find(config.eos_token);
  WarnOfContradiction(config, parts);
  return parts;
}

}  // namespace walsh
