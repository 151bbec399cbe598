// SentencePiece's .model file.
//
// Read by our own parser of the wire format. Models of the BPE kind with identity normalization are
// known (Llama 1 and 2, Mistral, TinyLlama); a compiled character map, collapsed white space or
// another kind of model is UNIMPLEMENTED by its name.
//
// Source:  sentencepiece_model.proto of google/sentencepiece (field numbers and defaults).
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/tokenizer/protobuf_wire.h"
#include "worker/tokenizer/sentencepiece_vocabulary.h"
#include "worker/tokenizer/tokenizer_config.h"

namespace walsh {
namespace {

enum class ModelType : int32_t { kUnigram = 1, kBpe = 2 };

struct TrainerSpec {
  int32_t model_type = static_cast<int32_t>(ModelType::kUnigram);
  bool treats_space_as_suffix = false;
  int32_t unknown = 0;
  int32_t bos = 1;
  int32_t eos = 2;
};

struct NormalizerSpec {
  std::string name;
  bool has_character_map = false;
  bool adds_dummy_prefix = true;
  bool removes_extra_spaces = true;
  bool escapes_spaces = true;
};

struct ModelProto {
  SentencePieceVocabulary vocabulary;
  TrainerSpec trainer;
  NormalizerSpec normalizer;
};

absl::Status WrongType(std::string_view message, const WireField& field) {
  return absl::InvalidArgumentError(absl::StrCat(std::string(message), ": field ", field.number,
                                                 " has wire type ", static_cast<int>(field.type)));
}

absl::Status ReadPiece(std::string_view message, SentencePieceVocabulary& vocabulary) {
  std::string piece;
  float score = 0;
  int32_t type = static_cast<int32_t>(PieceType::kNormal);
  for (WireReader reader(message); !reader.done();) {
    WALSH_ASSIGN_OR_RETURN(const WireField field, reader.Next());
    constexpr WireField::Type kTypes[] = {WireField::Type::kBytes, WireField::Type::kFixed32,
                                          WireField::Type::kVarint};
    if (field.number > 3) continue;
    if (field.type != kTypes[field.number - 1]) return WrongType("piece", field);
    if (field.number == 1) piece = std::string(field.bytes);
    if (field.number == 2) score = field.AsFloat();
    if (field.number == 3) {
      type =
          field.value > std::numeric_limits<int32_t>::max() ? 0 : static_cast<int32_t>(field.value);
    }
  }
  const size_t index = vocabulary.pieces.size();
  if (index == static_cast<size_t>(limits::kVocabMax)) {
    return absl::InvalidArgumentError(absl::StrCat("more than ", limits::kVocabMax, " pieces"));
  }
  if (!IsValidUtf8(piece)) {
    return absl::InvalidArgumentError(absl::StrCat("piece ", index, " is not valid UTF-8"));
  }
  vocabulary.pieces.push_back(std::move(piece));
  vocabulary.scores.push_back(score);
  vocabulary.types.push_back(type);
  return absl::OkStatus();
}

absl::StatusOr<TrainerSpec> ReadTrainerSpec(std::string_view message) {
  TrainerSpec spec;
  for (WireReader reader(message); !reader.done();) {
    WALSH_ASSIGN_OR_RETURN(const WireField field, reader.Next());
    // Negative ids (none) come as the 64-bit two's complement.
    const int32_t value = static_cast<int32_t>(static_cast<uint32_t>(field.value));
    switch (field.number) {
      case 3:
        spec.model_type = value;
        break;
      case 24:
        spec.treats_space_as_suffix = value != 0;
        break;
      case 40:
        spec.unknown = value;
        break;
      case 41:
        spec.bos = value;
        break;
      case 42:
        spec.eos = value;
        break;
      default:
        continue;
    }
    if (field.type != WireField::Type::kVarint) return WrongType("trainer_spec", field);
  }
  return spec;
}

absl::StatusOr<NormalizerSpec> ReadNormalizerSpec(std::string_view message) {
  NormalizerSpec spec;
  for (WireReader reader(message); !reader.done();) {
    WALSH_ASSIGN_OR_RETURN(const WireField field, reader.Next());
    const bool is_text = field.number == 1 || field.number == 2 || field.number == 6;
    switch (field.number) {
      case 1:
        spec.name = std::string(field.bytes);
        break;
      case 2:
        spec.has_character_map |= !field.bytes.empty();
        break;
      case 3:
        spec.adds_dummy_prefix = field.value != 0;
        break;
      case 4:
        spec.removes_extra_spaces = field.value != 0;
        break;
      case 5:
        spec.escapes_spaces = field.value != 0;
        break;
      case 6:
        spec.has_character_map |= !field.bytes.empty();
        break;
      default:
        continue;
    }
    if (field.type != (is_text ? WireField::Type::kBytes : WireField::Type::kVarint)) {
      return WrongType("normalizer_spec", field);
    }
  }
  return spec;
}

absl::StatusOr<ModelProto> ReadModelProto(std::string_view text) {
  ModelProto model;
  for (WireReader reader(text); !reader.done();) {
    WALSH_ASSIGN_OR_RETURN(const WireField field, reader.Next());
    if (field.number > 3) continue;
    if (field.type != WireField::Type::kBytes) return WrongType("model", field);
    if (field.number == 1) {
      WALSH_RETURN_IF_ERROR(ReadPiece(field.bytes, model.vocabulary));
    } else if (field.number == 2) {
      WALSH_ASSIGN_OR_RETURN(model.trainer, ReadTrainerSpec(field.bytes));
    } else {
      WALSH_ASSIGN_OR_RETURN(model.normalizer, ReadNormalizerSpec(field.bytes));
    }
  }
  if (model.vocabulary.pieces.empty()) return absl::InvalidArgumentError("no pieces");
  return model;
}

absl::Status CheckKnown(const ModelProto& model) {
  if (model.trainer.model_type != static_cast<int32_t>(ModelType::kBpe)) {
    return absl::UnimplementedError(absl::StrCat(
        "model type ", model.trainer.model_type,
        model.trainer.model_type == static_cast<int32_t>(ModelType::kUnigram) ? " (unigram)" : "",
        "; walsh has 2 (BPE)"));
  }
  const char* unknown = model.normalizer.has_character_map      ? "a character map"
                        : model.normalizer.removes_extra_spaces ? "remove_extra_whitespaces"
                        : !model.normalizer.escapes_spaces      ? "unescaped white space"
                        : model.trainer.treats_space_as_suffix  ? "treat_whitespace_as_suffix"
                                                                : nullptr;
  if (unknown == nullptr) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat("normalizer '", model.normalizer.name, "' with ", unknown));
}

absl::Status CheckTrainerIds(const TrainerSpec& trainer, size_t n_pieces) {
  for (const int32_t id : {trainer.unknown, trainer.bos, trainer.eos}) {
    if (id < -1 || id >= static_cast<int64_t>(n_pieces)) {
      return absl::InvalidArgumentError(
          absl::StrCat("trainer_spec has the id ", id, ", there are ", n_pieces, " pieces"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<BpeTokenizerParts> Read(const TokenizerSource& source) {
  WALSH_ASSIGN_OR_RETURN(ModelProto model, ReadModelProto(source.sentencepiece_model));
  WALSH_RETURN_IF_ERROR(CheckKnown(model));
  WALSH_RETURN_IF_ERROR(CheckTrainerIds(model.trainer, model.vocabulary.pieces.size()));
  model.vocabulary.unknown = model.trainer.unknown;
  model.vocabulary.adds_dummy_prefix = model.normalizer.adds_dummy_prefix;
  WALSH_ASSIGN_OR_RETURN(BpeTokenizerParts parts, MakeSentencePieceParts(model.vocabulary));
  parts.bos = model.trainer.bos;
  parts.eos = model.trainer.eos;
  // The file has no rule of its own; the models that use it begin with BOS unless their
  // configuration says otherwise.
  WALSH_ASSIGN_OR_RETURN(const TokenizerConfig config,
                         ReadTokenizerConfig(source.tokenizer_config_json));
  if (config.adds_bos.value_or(true) && parts.bos >= 0) parts.prefix.push_back(parts.bos);
  if (config.adds_eos.value_or(false) && parts.eos >= 0) parts.suffix.push_back(parts.eos);
  return parts;
}

}  // namespace

absl::StatusOr<BpeTokenizerParts> ReadSentencePieceModel(const TokenizerSource& source) {
  if (static_cast<int64_t>(source.sentencepiece_model.size()) > limits::kJsonFileBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("tokenizer.model has ",
                                                   source.sentencepiece_model.size(),
                                                   " bytes, at most ", limits::kJsonFileBytesMax));
  }
  absl::StatusOr<BpeTokenizerParts> parts = Read(source);
  if (parts.ok()) return parts;
  return absl::Status(parts.status().code(),
                      absl::StrCat("tokenizer.model: ", std::string(parts.status().message())));
}

}  // namespace walsh
