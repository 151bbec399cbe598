// Messages as JSON for scripts: protobuf's mapping with the field names of the .proto files, fields
// at their default included. 64-bit integers are strings, as that mapping has them.
#pragma once

#include <google/protobuf/message.h>

#include <string>

namespace walsh::client {

std::string JsonText(const google::protobuf::Message& message);  // indented, ends with a newline
std::string JsonLine(const google::protobuf::Message& message);  // one line, ends with a newline

}  // namespace walsh::client
