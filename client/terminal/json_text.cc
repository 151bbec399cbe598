#include "client/terminal/json_text.h"

#include <google/protobuf/util/json_util.h>

namespace walsh::client {
namespace {

std::string Json(const google::protobuf::Message& message, bool indented) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = indented;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  // An Any of a type that this build does not know is the only thing that cannot be printed.
  if (!status.ok()) return "{\"unprintable\": \"" + message.GetTypeName() + "\"}\n";
  if (json.empty() || json.back() != '\n') json += '\n';
  return json;
}

}  // namespace

std::string JsonText(const google::protobuf::Message& message) { return Json(message, true); }

std::string JsonLine(const google::protobuf::Message& message) { return Json(message, false); }

}  // namespace walsh::client
