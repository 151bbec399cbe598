// A template's source to its tree.
//
// Source:  Jinja 3.1, "Template Designer Documentation"; precedence as its parser has it.
// Errors:  INVALID_ARGUMENT    syntax error, with the line
//          UNIMPLEMENTED       a statement outside the subset, by name and line
//          RESOURCE_EXHAUSTED  a source longer than limits::kTemplateBytesMax, or nested deeper
//          than
//                              limits::kTemplateDepthMax
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/ast.h"

namespace walsh::jinja {

absl::StatusOr<Block> ParseTemplate(std::string_view source);

}  // namespace walsh::jinja
